// Checkpoints of all jobs.

import { badge } from "./badges.js";
import { h } from "./dom.js";
import { ago, bytes } from "./format.js";
import { listPage } from "./list.js";

export const columns = [
  { title: "Number", number: true, cell: (row) => `${row.seq}${row.latest ? " (newest)" : ""}` },
  { title: "State", cell: (row) => badge(row.state) },
  { title: "Step", number: true, cell: (row) => row.step ?? "–" },
  { title: "Attempt", number: true, cell: (row) => row.attempt || "–" },
  { title: "Ranks", number: true, cell: (row) => row.world || "–" },
  { title: "Size", number: true, cell: (row) => bytes(row.bytes) },
  { title: "Pinned", cell: (row) => (row.pinned ? "yes" : "") },
  { title: "Verified", cell: (row) => (row.verified_at ? ago(row.verified_at) : "") },
  { title: "Age", cell: (row) => ago(row.at) },
  { title: "Note", cell: (row) => h("span", { class: "reason", title: row.note || "" }, row.note || "") },
];

export function mount(shell) {
  return listPage(shell, {
    page: "checkpoints",
    title: "Checkpoints",
    caption: "Checkpoints of all jobs, live",
    empty: "No checkpoint fits.",
    filters: [["", "All checkpoints"], ...["Committed", "Open", "Bad", "Deleting"].map((name) => [name.toLowerCase(), name])],
    columns: [{ title: "Job", sort: "name", cell: (row) => h("a", { href: `/jobs/${encodeURIComponent(row.job)}` }, row.job) }, ...columns],
  });
}
