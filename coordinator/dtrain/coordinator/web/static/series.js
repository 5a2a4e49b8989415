// What the ranks reported over time. The numbers lie at the agents and are asked for while somebody looks.

import { chart } from "./chart.js";
import { h } from "./dom.js";
import { number, span } from "./format.js";
import { get } from "./live.js";

const EVERY_MS = 3000;
const KNOWN = [
  ["loss", "Loss", number],
  ["step_s", "Step time", span],
  ["throughput", "Steps per second", number],
  ["stall_s", "Checkpoint stall", span],
  ["upload_s", "Upload time", span],
];

export function seriesPanel(job) {
  const box = h("div", { class: "charts" });
  const note = h("p", { class: "quiet" });
  const element = h("section", { "aria-labelledby": "series-title" }, h("h2", { id: "series-title" }, "Progress"), note, box);
  let marks = [];
  let text = "";
  async function read() {
    try {
      const found = await get(`/api/jobs/${encodeURIComponent(job)}/series`);
      const key = JSON.stringify([found.series, marks.length]);
      if (key !== text) {
        text = key;
        box.replaceChildren(...KNOWN.map(([name, title, show]) => chart(title, found.series[name] || [], marks, show)));
      }
      note.textContent = found.note || "";
    } catch (error) {
      // Replicas of a former release keep none.
      element.hidden = !text && (error.status === 404 || error.status === 405);
      note.textContent = error.message;
    }
    setTimeout(read, EVERY_MS);
  }
  read();
  return {
    element,
    marks(story) {
      marks = [...story.marks, ...story.attempts.slice(1).map((one) => ({ kind: "attempt", at: one.from, text: `attempt ${one.number}` }))];
    },
  };
}
