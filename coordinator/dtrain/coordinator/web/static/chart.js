// A line over time, with the job's faults, checkpoints and attempts marked in it.

import { h, s } from "./dom.js";
import { number, nowMs, span } from "./format.js";

const WIDTH = 400;
const HEIGHT = 110;
const LEFT = 56;
const BOTTOM = 16;

// points: [[epoch seconds, step, value], …] in order of time; marks as in timeline.js.
export function chart(title, points, marks, show = number) {
  const drawn = points.filter((point) => point[2] !== null);
  const last = drawn.at(-1);
  const caption = h("figcaption", {}, title, h("span", {}, last ? show(last[2]) : "nothing yet"));
  if (!drawn.length) return h("figure", {}, caption, h("p", { class: "quiet" }, "No rank has reported it."));
  const from = drawn[0][0];
  const to = Math.max(last[0], from + 1);
  const values = drawn.map((point) => point[2]);
  let low = Math.min(...values);
  let high = Math.max(...values);
  if (high - low < 1e-12) {
    const room = Math.abs(high) * 0.1 || 1;
    low -= room;
    high += room;
  }
  const x = (at) => LEFT + ((WIDTH - LEFT) * (at - from)) / (to - from);
  const y = (value) => 6 + (HEIGHT - BOTTOM - 10) * (1 - (value - low) / (high - low));
  const shown = marks.filter((mark) => mark.at / 1000 >= from && mark.at / 1000 <= to);
  const label = `${title}: newest ${show(last[2])} at step ${last[1]}, between ${show(Math.min(...values))} and ${show(Math.max(...values))} in ${span(to - from)}`;
  return h(
    "figure",
    {},
    caption,
    s(
      "svg",
      { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": label },
      [low, high].map((value) => s("line", { x1: LEFT, x2: WIDTH, y1: y(value), y2: y(value), class: "axis" })),
      s("text", { x: LEFT - 4, y: y(high) + 4, "text-anchor": "end" }, show(high)),
      s("text", { x: LEFT - 4, y: y(low) + 4, "text-anchor": "end" }, show(low)),
      shown.map((mark) => s("line", { x1: x(mark.at / 1000), x2: x(mark.at / 1000), y1: 4, y2: HEIGHT - BOTTOM, class: `mark-${mark.kind}` }, s("title", {}, mark.text))),
      s("path", { class: "line", d: drawn.map((point, index) => `${index ? "L" : "M"}${x(point[0]).toFixed(1)} ${y(point[2]).toFixed(1)}`).join("") }),
      s("text", { x: LEFT, y: HEIGHT - 3 }, `${span(nowMs() / 1000 - from)} ago`),
      s("text", { x: WIDTH, y: HEIGHT - 3, "text-anchor": "end" }, `step ${last[1]}`),
    ),
  );
}
