// Checkpoints on their way to the store or to the ranks: a bar each, that screen readers can read.

import { h, s, say } from "./dom.js";
import { bytes, span } from "./format.js";

const TITLES = { save: "Saving", restore: "Restoring" };

export class Moving {
  constructor() {
    this.element = h("section", { id: "moving", "aria-label": "Checkpoints on their way", hidden: true });
    this.shown = new Map();
  }

  // Elements stay while their checkpoint moves: whoever reads one is not interrupted every second.
  show(list) {
    const keys = list.map((one) => `${one.kind}:${one.seq}`);
    for (const [key, row] of this.shown) {
      if (keys.includes(key)) continue;
      row.element.remove();
      this.shown.delete(key);
    }
    for (const [place, key] of keys.entries()) {
      if (!this.shown.has(key)) {
        this.shown.set(key, makeRow());
        this.element.append(this.shown.get(key).element);
      }
      fill(this.shown.get(key), list[place]);
    }
    this.element.hidden = !list.length;
  }
}

function makeRow() {
  const done = s("rect", { x: 0, y: 0, width: 0, height: 16, class: "part-productive" });
  const drawing = s("svg", { viewBox: "0 0 1000 16", preserveAspectRatio: "none", class: "bar", "aria-hidden": "true" }, s("rect", { x: 0, y: 0, width: 1000, height: 16, class: "part-idle" }), done);
  const bar = h("div", { role: "progressbar", "aria-valuemin": "0", "aria-valuemax": "100" }, drawing);
  const text = h("p", {});
  return { element: h("div", {}, text, bar), bar, done, text };
}

function fill(row, one) {
  const known = one.total_bytes > 0;
  const percent = known ? Math.min(100, Math.floor((100 * one.done_bytes) / one.total_bytes)) : 0;
  const words = sentence(one, percent);
  say(row.text, words);
  row.bar.setAttribute("aria-label", `${TITLES[one.kind] || one.kind} checkpoint ${one.seq}`);
  row.bar.setAttribute("aria-valuetext", words);
  // Without a value it is a bar of unknown length.
  if (known) row.bar.setAttribute("aria-valuenow", String(percent));
  else row.bar.removeAttribute("aria-valuenow");
  row.done.setAttribute("width", String(known ? (1000 * one.done_bytes) / one.total_bytes : 0));
}

function sentence(one, percent) {
  const where = one.kind === "save" ? " in the store" : "";
  const what = `${TITLES[one.kind] || one.kind} checkpoint ${one.seq} (step ${one.step})`;
  if (!one.total_bytes) return `${what}: ${bytes(one.done_bytes)} so far${where}${pace(one)}`;
  if (one.done_bytes >= one.total_bytes) return `${what}: all ${bytes(one.total_bytes)}${where || " here"}`;
  return `${what}: ${bytes(one.done_bytes)} of ${bytes(one.total_bytes)} (${percent} %)${where}${pace(one)}`;
}

function pace(one) {
  if (!one.bytes_per_s) return "";
  const left = Number.isFinite(one.left_s) ? `, about ${span(Math.ceil(one.left_s))} left` : "";
  return `, ${bytes(one.bytes_per_s)}/s${left}`;
}
