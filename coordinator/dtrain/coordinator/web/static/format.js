// Numbers and times for people. Times tick by the replica's clock, not by this machine's.

import { h } from "./dom.js";

let offsetMs = 0;

export function setClock(epochSeconds) {
  offsetMs = epochSeconds * 1000 - Date.now();
}

export function nowMs() {
  return Date.now() + offsetMs;
}

export function span(seconds) {
  if (!Number.isFinite(seconds)) return "–";
  if (seconds > 0 && seconds < 1) return `${number(1000 * seconds)} ms`;
  const whole = Math.max(0, Math.round(seconds));
  if (seconds < 10 && seconds % 1 !== 0) return `${seconds.toFixed(1)}s`;
  if (whole < 60) return `${whole}s`;
  if (whole < 3600) return `${Math.floor(whole / 60)}m${String(whole % 60).padStart(2, "0")}s`;
  if (whole < 172800) return `${Math.floor(whole / 3600)}h${String(Math.floor((whole % 3600) / 60)).padStart(2, "0")}m`;
  return `${Math.floor(whole / 86400)}d${Math.floor((whole % 86400) / 3600)}h`;
}

export function bytes(count) {
  if (count === null || count === undefined) return "–";
  let value = count;
  for (const unit of ["B", "kB", "MB", "GB", "TB"]) {
    if (value < 1000 || unit === "TB") return `${value < 10 && unit !== "B" ? value.toFixed(1) : Math.round(value)} ${unit}`;
    value /= 1000;
  }
  return "–";
}

export function number(value) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (value !== 0 && Math.abs(value) < 0.001) return value.toExponential(2);
  return Math.abs(value) >= 1000 ? String(Math.round(value)) : String(Number(value.toPrecision(4)));
}

// A time element that says how long ago it was; tick() keeps all of them true.
export function ago(iso) {
  if (!iso || Number.isNaN(Date.parse(iso))) return document.createTextNode("–");
  const element = h("time", { datetime: iso, title: iso });
  element.textContent = agoText(iso);
  return element;
}

function agoText(iso) {
  return `${span(Math.floor((nowMs() - Date.parse(iso)) / 1000))} ago`;
}

export function tick() {
  for (const element of document.querySelectorAll("time[datetime]")) {
    const text = agoText(element.dateTime);
    if (element.textContent !== text) element.textContent = text;
  }
}
