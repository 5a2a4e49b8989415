// Everything about one job: the answer first, then what it rests on.

import { act } from "./acting.js";
import { badge } from "./badges.js";
import { columns as checkpointColumns } from "./checkpoints.js";
import { h, say } from "./dom.js";
import { ago, number, span } from "./format.js";
import { bar, percent } from "./goodput.js";
import { logPanel } from "./logs.js";
import { Moving } from "./moving.js";
import { seriesPanel } from "./series.js";
import { Pager, Table } from "./table.js";
import { draw, story } from "./timeline.js";

const RANKS = 100;
const DRAW_MS = 1000;

export function mount(shell, name) {
  const view = new JobPage(shell, name);
  return {
    title: name,
    query: () => ({ page: "job", name, offset: String(view.pager.offset), limit: String(RANKS) }),
    update: (parts, told) => view.update(parts, told),
    acting: () => view.acting(),
  };
}

class JobPage {
  constructor(shell, name) {
    this.shell = shell;
    this.name = name;
    this.said = "";
    this.attempt = 0;
    this.pager = new Pager(RANKS, () => shell.restart());
    this.title = h("h1", {}, name);
    this.phase = h("span", {});
    this.title.append(this.phase);
    this.reason = h("p", { class: "lead", id: "reason" });
    this.tools = h("div", { class: "tools", role: "group", "aria-label": "Change this job" });
    this.facts = h("dl", { class: "facts" });
    this.failure = h("section", { class: "card", "aria-label": "Root cause", id: "failure", hidden: true });
    this.moving = new Moving();
    this.goodput = h("section", { "aria-labelledby": "goodput-title", hidden: true });
    this.timeline = h("div", { id: "timeline-box" });
    this.conditions = h("ul", {});
    this.spec = h("pre", { tabindex: "0", "aria-label": "Job file as stored" });
    this.series = seriesPanel(name);
    this.log = logPanel(name);
    this.ranks = new Table("Ranks of the current attempt, those first that are behind", RANK_COLUMNS, { empty: "No rank runs." });
    this.members = new Table("Machines of the current attempt", MEMBER_COLUMNS, { empty: "No machine is assigned." });
    this.checkpoints = new Table("Checkpoints of this job", checkpointColumns, { empty: "None yet." });
    this.events = new Table("Events, newest first", EVENT_COLUMNS, { empty: "Nothing has happened yet." });
    this.events.element.firstChild.classList.add("tall");
    shell.main.replaceChildren(
      this.title,
      this.reason,
      this.tools,
      this.failure,
      this.moving.element,
      this.facts,
      section("timeline-title", "Timeline", this.timeline),
      this.goodput,
      this.series.element,
      section("ranks-title", "Ranks", this.ranks.element, this.pager.element),
      section("members-title", "Machines", this.members.element),
      section("checkpoints-title", "Checkpoints", this.checkpoints.element),
      section("events-title", "Events", this.events.element),
      this.log.element,
      h("details", {}, h("summary", {}, "Conditions"), this.conditions),
      h("details", {}, h("summary", {}, "Job file"), this.spec),
    );
    setInterval(() => this.drawTimeline(), DRAW_MS);
  }

  update(parts) {
    const head = parts.get("head");
    if (!head) {
      say(this.reason, `There is no job ${this.name}, or no more.`);
      return;
    }
    this.head = head;
    this.rows = (kind) => [...parts].filter(([key]) => key.startsWith(`${kind}:`)).map(([, value]) => value);
    this.showHead(head);
    this.showFailure(head);
    const ranks = parts.get("ranks");
    this.ranks.show(ranks.order.map(String), new Map(ranks.order.map((rank) => [String(rank), parts.get(`rank:${rank}`)])));
    this.pager.show(ranks.total);
    const members = parts.get("members");
    this.members.show(members.rows.map((row) => row.agent), new Map(members.rows.map((row) => [row.agent, row])));
    const checkpoints = this.rows("checkpoint").sort((a, b) => b.seq - a.seq);
    this.checkpoints.show(checkpoints.map((row) => String(row.seq)), new Map(checkpoints.map((row) => [String(row.seq), row])));
    const events = this.rows("event").sort((a, b) => b.seq - a.seq);
    this.events.show(events.map((row) => String(row.seq)), new Map(events.map((row) => [String(row.seq), row])));
    const text = JSON.stringify(parts.get("spec"), null, 2);
    say(this.spec, text);
    this.drawTimeline();
    if (head.attempt !== this.attempt) {
      if (this.attempt) this.log.restart();
      this.attempt = head.attempt;
    }
  }

  showHead(head) {
    if (this.phase.textContent !== head.phase) this.phase.replaceChildren(badge(head.phase));
    say(this.reason, head.reason);
    // Steps go by too fast to be read out; a phase or an attempt is news.
    const news = `${this.name} is ${head.phase}${head.attempt ? `, attempt ${head.attempt}` : ""}`;
    if (this.said && this.said !== news) this.shell.announce(`${news}: ${head.reason}`);
    this.said = news;
    const window = head.restarts.at.filter((at) => at >= Date.now() / 1000 - head.restarts.window_s).length;
    const facts = [
      ["Step", String(head.step)],
      ["Attempt", String(head.attempt)],
      ["Ranks", `${head.live} of ${head.world} run`],
      ["Phase since", ago(head.since)],
      ["Submitted", ago(head.submitted_at)],
      ["Newest checkpoint", head.latest ? `${head.latest.seq} (step ${head.latest.step})` : "none"],
      ["Restored from", head.restore ? `${head.restore.seq} (step ${head.restore.step})` : "the beginning"],
      ["Restarts", `${window} of ${head.restarts.max} in ${span(head.restarts.window_s)}`],
      ["Goodput", percent(head.ledger)],
      ["Wanted", head.wanted === "run" ? "run" : `${head.wanted}${head.by ? ` (by ${head.by})` : ""}`],
      ["Size", `${head.nodes[0] === head.nodes[1] ? head.nodes[0] : `${head.nodes[0]} to ${head.nodes[1]}`} machines`],
      ["Program", head.program],
    ];
    const text = JSON.stringify(facts.map(([label, value]) => [label, value.dateTime || value]));
    if (text !== this.factsText) {
      this.factsText = text;
      this.facts.replaceChildren(...facts.map(([label, value]) => h("div", {}, h("dt", {}, label), h("dd", { id: `fact-${label.toLowerCase().replaceAll(" ", "-")}` }, value))));
    }
    const conditions = head.conditions.map((one) => `${one.type} is ${one.status}${one.reason ? `, ${one.reason}` : ""}${one.message ? `: ${one.message}` : ""}`);
    if (JSON.stringify(conditions) !== this.conditionsText) {
      this.conditionsText = JSON.stringify(conditions);
      this.conditions.replaceChildren(...conditions.map((one) => h("li", {}, one)));
    }
    this.goodput.hidden = !head.ledger;
    this.moving.show(head.moving || []);
    this.acting();
  }

  showFailure(head) {
    const failure = head.failure;
    const text = JSON.stringify(failure);
    if (text === this.failureText) return;
    this.failureText = text;
    this.failure.hidden = !failure;
    if (!failure) return;
    const who = [failure.rank !== undefined && failure.rank !== null ? `rank ${failure.rank}` : "", failure.agent ? `on ${failure.agent}` : "", failure.pid ? `pid ${failure.pid}` : ""].filter(Boolean).join(" ");
    const shown = [
      h("h2", {}, `Root cause of attempt ${failure.attempt ?? 0}: ${who}`),
      h("p", {}, `${failure.message}${failure.step ? ` (at step ${failure.step})` : ""}`),
      failure.log_tail ? h("pre", { tabindex: "0", "aria-label": "End of its log" }, failure.log_tail) : null,
      failure.also?.length ? h("p", { class: "quiet" }, `Because of it, too: ${failure.also.join("; ")}`) : null,
    ];
    this.failure.replaceChildren(...shown.filter(Boolean));
  }

  drawTimeline() {
    if (!this.head) return;
    if (this.head.ledger) this.goodput.replaceChildren(h("h2", { id: "goodput-title" }, `Goodput ${percent(this.head.ledger)}`), bar(this.head.ledger));
    const found = story(this.head, this.rows("event"), this.rows("checkpoint"));
    this.series.marks(found);
    // While nothing moves there is nothing to draw again.
    const text = JSON.stringify([found.attempts.map((one) => [one.number, one.from, one.over]), found.marks, this.head.finished ? 0 : Math.round(found.to / DRAW_MS)]);
    if (text === this.timelineText) return;
    this.timelineText = text;
    this.timeline.replaceChildren(draw(found));
  }

  acting() {
    const can = this.shell.canAct() && this.head && !this.head.finished;
    const suspended = this.head && ["SUSPENDED", "SUSPENDING"].includes(this.head.phase);
    const paused = this.head?.paused;
    const text = `${can} ${suspended} ${paused}`;
    if (text === this.toolsText) return;
    this.toolsText = text;
    this.tools.hidden = !can;
    if (!can) {
      this.tools.replaceChildren();
      return;
    }
    const path = (action) => `/api/jobs/${encodeURIComponent(this.name)}/${action}`;
    const button = (label, action, question, ...rest) => h("button", { type: "button", onclick: () => act(this.shell, question, path(action), ...rest) }, label);
    const nodes = this.head.nodes;
    this.tools.replaceChildren(
      button("Checkpoint now", "checkpoint", `Take a checkpoint of ${this.name} now?`),
      suspended ? button("Resume", "resume", `Let ${this.name} go on?`) : button("Suspend", "suspend", `Suspend ${this.name} at a checkpoint, and free its machines?`),
      paused ? button("Unpause", "unpause", `Let ${this.name} go on?`) : button("Pause", "pause", `Hold all ranks of ${this.name} at one step? They keep their machines.`),
      button("Scale", "scale", `How many machines for ${this.name}?`, [
        { name: "min", label: "At least", type: "number", value: nodes[0], required: true },
        { name: "max", label: "At most", type: "number", value: nodes[1], required: true },
      ]),
      button("Cancel", "cancel", `Cancel ${this.name} for good?`),
    );
  }
}

function section(id, title, ...children) {
  return h("section", { "aria-labelledby": id }, h("h2", { id }, title), children);
}

const RANK_COLUMNS = [
  { title: "Rank", number: true, cell: (row) => row.rank },
  { title: "Agent", cell: (row) => row.agent },
  { title: "State", cell: (row) => badge(row.phase || "no report") },
  { title: "Step", number: true, cell: (row) => (row.step < 0 ? "–" : row.step) },
  { title: "Step time", number: true, cell: (row) => milliseconds(row.step_s) },
  { title: "Own part", number: true, cell: (row) => milliseconds(row.own_s) },
  { title: "Data wait", number: true, cell: (row) => milliseconds(row.data_s) },
  { title: "Pid", number: true, cell: (row) => row.pid ?? "–" },
  { title: "Exit", number: true, cell: (row) => row.exit_code ?? "" },
  { title: "Reported", cell: (row) => [...(row.nonfinite || []).map((name) => `${name} not finite`), ...Object.entries(row.metrics || {}).map(([name, value]) => `${name} ${number(value)}`)].join(", ") },
];

const MEMBER_COLUMNS = [
  { title: "Agent", cell: (row) => row.agent },
  { title: "State", cell: (row) => badge(row.phase || "no report") },
  { title: "Ranks", cell: (row) => (row.nproc > 1 ? `${row.first_rank} to ${row.first_rank + row.nproc - 1}` : String(row.first_rank)) },
  { title: "Note", cell: (row) => h("span", { class: "reason", title: row.note }, row.note) },
];

const EVENT_COLUMNS = [
  { title: "When", cell: (row) => ago(row.last || row.first) },
  { title: "Type", cell: (row) => row.type },
  { title: "Reason", cell: (row) => row.reason },
  { title: "About", cell: (row) => row.object || "" },
  { title: "Attempt", number: true, cell: (row) => row.attempt || "" },
  { title: "Count", number: true, cell: (row) => row.count },
  { title: "Message", cell: (row) => h("span", { class: "reason", title: row.message }, row.message) },
];

function milliseconds(seconds) {
  return seconds === null || seconds === undefined || seconds === 0 ? "–" : `${number(1000 * seconds)} ms`;
}
