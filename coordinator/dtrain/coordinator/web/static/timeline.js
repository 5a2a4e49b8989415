// One line of time for a job: its attempts, what went wrong, its checkpoints, changes of leader.

import { h, s } from "./dom.js";
import { nowMs, span } from "./format.js";

const WIDTH = 1000;
const FAULTS = new Set([
  "RankExited", "RankSignaled", "AgentLost", "MassLoss", "PrepareTimeout", "ProcessUnkillable", "HangFound", "NonFiniteMetric",
  "UserError", "BudgetExhausted", "DoNotRetry", "CheckpointAborted", "CheckpointQuarantined", "StoreUnavailable", "JobFailed", "MachineSuspected",
]);

// What happened when: {attempts: [{number, from, to}], marks: [{kind, at, text}], from, to}, times in ms.
export function story(head, events, checkpoints) {
  const marks = [];
  const starts = [];
  const ends = [];
  // Retention removes records long before the events that told of them.
  const committed = new Map();
  for (const event of events) {
    const at = Date.parse(event.last || event.first);
    if (Number.isNaN(at)) continue;
    const first = Date.parse(event.first || event.last);
    if (event.reason === "AttemptStarted") starts.push({ number: event.attempt, from: Number.isNaN(first) ? at : first });
    else if (event.reason === "CheckpointCommitted" || event.reason === "CheckpointSettled") committed.set(event.object, { at, text: event.message });
    else if (event.reason === "LeaderChanged") marks.push({ kind: "leader", at, text: event.message });
    else if (FAULTS.has(event.reason)) {
      marks.push({ kind: "fault", at, text: `${event.reason}: ${event.message}` });
      if (!event.reason.startsWith("Checkpoint")) ends.push(at);
    }
  }
  for (const row of checkpoints) {
    const at = Date.parse(row.at);
    if (row.state === "Committed" && !Number.isNaN(at)) committed.set(`checkpoint/${row.seq}`, { at, text: `checkpoint ${row.seq}, step ${row.step}` });
  }
  for (const { at, text } of committed.values()) marks.push({ kind: "checkpoint", at, text });
  starts.sort((a, b) => a.number - b.number);
  const end = head.finished ? Date.parse(head.finished_at) || Math.max(...marks.map((mark) => mark.at), nowMs()) : nowMs();
  const attempts = starts.map((start, index) => {
    const next = starts[index + 1];
    const until = next ? next.from : end;
    // It was over when the first thing went wrong in it, if something did.
    const fault = ends.filter((at) => at >= start.from && at <= until).sort((a, b) => a - b)[0];
    return { ...start, to: next && fault ? fault : until, over: Boolean(next) || head.finished };
  });
  const submitted = Date.parse(head.submitted_at);
  const from = Math.min(...[submitted, ...attempts.map((one) => one.from), ...marks.map((one) => one.at)].filter((at) => !Number.isNaN(at)));
  return { attempts, marks, from: Number.isFinite(from) ? from : end - 1000, to: Math.max(end, from + 1000) };
}

export function draw({ attempts, marks, from, to }) {
  const x = (at) => (WIDTH * (at - from)) / (to - from);
  const bars = attempts.flatMap(({ number, from: begun, to: ended, over }) => {
    const width = Math.max(3, x(ended) - x(begun));
    const label = width > 24 ? s("text", { x: x(begun) + 5, y: 27, class: "attempt-text" }, String(number)) : null;
    return [s("rect", { x: x(begun), y: 12, width, height: 22, rx: 3, class: over ? "attempt over" : "attempt" }, s("title", {}, `attempt ${number}, ${span((ended - begun) / 1000)}`)), label];
  });
  const shapes = marks.map(({ kind, at, text }) => {
    const title = s("title", {}, `${text} (${new Date(at).toISOString()})`);
    const place = x(at);
    if (kind === "fault") return s("path", { d: `M${place} 4 l6 8 h-12 z`, class: "mark-fault" }, title);
    if (kind === "checkpoint") return s("circle", { cx: place, cy: 44, r: 4, class: "mark-checkpoint" }, title);
    return s("line", { x1: place, x2: place, y1: 2, y2: 52, class: "mark-leader" }, title);
  });
  const count = (kind) => marks.filter((mark) => mark.kind === kind).length;
  const label = `${attempts.length} attempts, ${count("fault")} faults, ${count("checkpoint")} checkpoints and ${count("leader")} changes of leader in ${span((to - from) / 1000)}`;
  return h(
    "div",
    { class: "scroll" },
    s(
      "svg",
      { viewBox: `-8 0 ${WIDTH + 16} 66`, role: "img", "aria-label": label, id: "timeline" },
      s("line", { x1: 0, x2: WIDTH, y1: 44, y2: 44, class: "axis" }),
      bars,
      shapes,
      s("text", { x: 0, y: 63 }, `${span((nowMs() - from) / 1000)} ago`),
      s("text", { x: WIDTH, y: 63, "text-anchor": "end" }, to >= nowMs() - 2000 ? "now" : `${span((nowMs() - to) / 1000)} ago`),
    ),
    h(
      "ul",
      { class: "legend" },
      [["attempt", "attempt"], ["fault", "fault"], ["checkpoint", "committed checkpoint"], ["leader", "new leader"]].map(([kind, text]) =>
        h("li", {}, h("span", { class: `swatch ${kind}`, "aria-hidden": "true" }), ` ${text}`),
      ),
    ),
  );
}
