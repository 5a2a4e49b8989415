// Where a job's time has gone. What passes now belongs to the category in `doing`, as the ledger says.

import { h, s } from "./dom.js";
import { nowMs, span } from "./format.js";

const HEADLINES = ["productive", "lost_work", "restart", "stall", "idle"];
// Time in which nobody could have expected progress: goodput is a share of the rest.
const NOT_WANTED = ["idle.queued", "idle.paused", "idle.suspended"];

function spentMs(ledger) {
  const found = { ...ledger.spent };
  if (ledger.doing) found[ledger.doing] = (found[ledger.doing] || 0) + Math.max(0, nowMs() - ledger.until_ms);
  return found;
}

export function ratio(ledger) {
  if (!ledger) return null;
  const found = spentMs(ledger);
  const wanted = Object.entries(found).reduce((sum, [name, ms]) => sum + (NOT_WANTED.includes(name) ? 0 : ms), 0);
  return wanted > 0 ? (found.productive || 0) / wanted : null;
}

export function percent(ledger) {
  const value = ratio(ledger);
  return value === null ? "–" : `${(100 * value).toFixed(1)} %`;
}

export function bar(ledger) {
  const found = Object.fromEntries(HEADLINES.map((name) => [name, 0]));
  for (const [name, ms] of Object.entries(spentMs(ledger))) found[name.split(".")[0]] = (found[name.split(".")[0]] || 0) + ms / 1000;
  const whole = Object.values(found).reduce((sum, one) => sum + one, 0) || 1;
  const words = (name) => `${name.replace("_", " ")} ${span(found[name])}`;
  let at = 0;
  const pieces = HEADLINES.map((name) => {
    const width = (1000 * found[name]) / whole;
    const piece = s("rect", { x: at, y: 0, width, height: 16, class: `part-${name}` }, s("title", {}, words(name)));
    at += width;
    return piece;
  });
  return h(
    "div",
    {},
    s("svg", { viewBox: "0 0 1000 16", preserveAspectRatio: "none", class: "bar", role: "img", "aria-label": HEADLINES.map(words).join(", ") }, pieces),
    h("ul", { class: "legend" }, HEADLINES.map((name) => h("li", {}, h("span", { class: `swatch part-${name}`, "aria-hidden": "true" }), ` ${words(name)}`))),
  );
}
