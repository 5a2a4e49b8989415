// The machines.

import { badge } from "./badges.js";
import { h } from "./dom.js";
import { ago } from "./format.js";
import { listPage } from "./list.js";
import { act } from "./acting.js";

export function mount(shell) {
  return listPage(shell, {
    page: "agents",
    title: "Agents",
    caption: "Agents, live",
    empty: "No agent fits.",
    filters: [["", "All agents"], ...["Ready", "Cordoned", "Draining", "Blocked", "Lost"].map((name) => [name.toLowerCase(), name])],
    columns: [
      { title: "Name", sort: "name", cell: (row) => row.name },
      { title: "Status", sort: "status", cell: (row) => badge(row.status) },
      { title: "Slots used", number: true, cell: (row) => `${row.busy}/${row.slots}` },
      { title: "Jobs", cell: (row) => links(row.jobs) },
      { title: "Host", cell: (row) => row.host },
      { title: "Version", cell: (row) => row.version },
      { title: "Since", cell: (row) => ago(row.since) },
      { title: "Reason", cell: (row) => h("span", { class: "reason", title: row.reason }, row.reason) },
      { title: "Change", cell: (row) => change(shell, row) },
    ],
  });
}

function links(jobs) {
  const found = jobs.slice(0, 3).flatMap((name, index) => [index ? ", " : "", h("a", { href: `/jobs/${encodeURIComponent(name)}` }, name)]);
  return h("span", {}, found, jobs.length > 3 ? ` and ${jobs.length - 3} more` : "", jobs.length ? "" : "–");
}

function change(shell, row) {
  if (!shell.canAct()) return h("span", { class: "quiet" }, "–");
  const path = (action) => `/api/agents/${encodeURIComponent(row.name)}/${action}`;
  if (row.cordon) {
    return h("button", { type: "button", onclick: () => act(shell, `Let ranks on ${row.name} again?`, path("uncordon")) }, `Uncordon ${row.name}`);
  }
  const ask = { name: "reason", label: "Why, for those who find it", value: "", required: true };
  return h("button", { type: "button", onclick: () => act(shell, `Keep new ranks off ${row.name}?`, path("cordon"), [ask]) }, `Cordon ${row.name}`);
}
