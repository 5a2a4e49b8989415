// Where a job's time has gone: the ledger, if this release keeps one.

import { h, s } from "./dom.js";
import { span } from "./format.js";

const CATEGORIES = ["productive", "lost_work", "restart", "stall", "idle"];

export function seconds(ledger) {
  if (!ledger) return null;
  const found = {};
  for (const name of CATEGORIES) {
    const value = ledger[name] ?? ledger[`${name}_s`] ?? 0;
    found[name] = typeof value === "number" ? value : 0;
  }
  return found;
}

export function ratio(ledger) {
  if (!ledger) return null;
  if (typeof ledger.goodput === "number") return ledger.goodput;
  const found = seconds(ledger);
  const counted = found.productive + found.lost_work + found.restart + found.stall;
  return counted > 0 ? found.productive / counted : null;
}

export function percent(ledger) {
  const value = ratio(ledger);
  return value === null ? "–" : `${(100 * value).toFixed(1)} %`;
}

export function bar(ledger) {
  const found = seconds(ledger);
  const whole = Object.values(found).reduce((sum, one) => sum + one, 0) || 1;
  const text = CATEGORIES.map((name) => `${name.replace("_", " ")} ${span(found[name])}`).join(", ");
  let at = 0;
  const pieces = CATEGORIES.map((name) => {
    const width = (1000 * found[name]) / whole;
    const piece = s("rect", { x: at, y: 0, width, height: 16, class: `part-${name}` }, s("title", {}, `${name} ${span(found[name])}`));
    at += width;
    return piece;
  });
  return h(
    "div",
    {},
    s("svg", { viewBox: "0 0 1000 16", preserveAspectRatio: "none", class: "bar", role: "img", "aria-label": text }, pieces),
    h("ul", { class: "legend" }, CATEGORIES.map((name) => h("li", {}, h("span", { class: `swatch part-${name}`, "aria-hidden": "true" }), ` ${name.replace("_", " ")} ${span(found[name])}`))),
  );
}
