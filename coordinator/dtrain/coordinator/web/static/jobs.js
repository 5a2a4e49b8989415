// The list of jobs.

import { badge } from "./badges.js";
import { h } from "./dom.js";
import { ago } from "./format.js";
import { listPage } from "./list.js";
import { percent } from "./goodput.js";

export function mount(shell) {
  return listPage(shell, {
    page: "jobs",
    title: "Jobs",
    caption: "Jobs, live",
    empty: "No job fits. Submit one: dtrain submit job.yaml",
    filters: [
      ["", "All jobs"],
      ["active", "Active"],
      ["failed", "With a failure"],
      ...["QUEUED", "RUNNING", "RECOVERING", "SUSPENDED", "SUCCEEDED", "FAILED", "CANCELLED"].map((name) => [name, name]),
    ],
    columns: [
      { title: "Name", sort: "name", cell: (row) => h("a", { href: `/jobs/${encodeURIComponent(row.name)}` }, row.name) },
      { title: "Phase", sort: "phase", cell: (row) => badge(row.phase) },
      { title: "Step", sort: "step", number: true, cell: (row) => row.step },
      { title: "Attempt", sort: "attempt", number: true, cell: (row) => row.attempt },
      { title: "Ranks", number: true, cell: (row) => `${row.live}/${row.world}` },
      { title: "Last checkpoint", cell: (row) => (row.latest ? `${row.latest.seq} (step ${row.latest.step})` : "–") },
      { title: "Goodput", number: true, cell: (row) => percent(row.ledger) },
      { title: "Submitted", sort: "newest", cell: (row) => ago(row.submitted_at) },
      { title: "Reason", cell: (row) => h("span", { class: "reason", title: row.reason }, row.reason) },
    ],
  });
}
