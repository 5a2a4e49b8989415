// The coordinators: which one leads, and what each of them says is wrong.

import { badge } from "./badges.js";
import { h } from "./dom.js";
import { ago, span } from "./format.js";
import { get } from "./live.js";
import { listPage } from "./list.js";

const ASK_MS = 5000;

export function mount(shell) {
  let infos = {};
  const problems = h("section", { "aria-label": "Problems", hidden: true });
  const page = listPage(shell, {
    page: "replicas",
    title: "Replicas",
    caption: "Coordinator replicas, live",
    empty: "No replica is registered: etcd has no record of one.",
    filters: [["", "All replicas"]],
    columns: [
      { title: "Name", cell: (row) => row.name },
      { title: "Role", cell: (row) => badge(row.role) },
      { title: "Term", number: true, cell: (row) => row.term || "–" },
      { title: "Address", cell: (row) => row.address },
      { title: "Mirror age", number: true, cell: (row) => age(infos[row.name]) },
      { title: "Version", cell: (row) => row.version },
      { title: "Host", cell: (row) => `${row.host} (pid ${row.pid})` },
      { title: "Since", cell: (row) => ago(row.since) },
      { title: "Dashboard", cell: (row) => (/^https?:/.test(row.dashboard) ? h("a", { href: row.dashboard }, row.dashboard) : "–") },
    ],
  });
  shell.main.append(problems);
  let parts = new Map();
  const show = () => {
    const found = new Map();
    for (const [key, value] of parts) {
      found.set(key, key.startsWith("row:") ? { ...value, asked: infos[value.name] || null } : value);
    }
    page.update(found);
    const sentences = Object.entries(infos).flatMap(([name, info]) => [...(info.problems || []), ...(info.problem ? [info.problem] : [])].map((text) => `${name}: ${text}`));
    problems.hidden = sentences.length === 0;
    problems.replaceChildren(h("h2", {}, "Problems"), h("ul", {}, sentences.map((text) => h("li", {}, text))));
  };
  const ask = async () => {
    try {
      infos = await get("/api/replicas");
      show();
    } catch {
      // The link says that our replica is away.
    }
    setTimeout(ask, ASK_MS);
  };
  ask();
  return {
    ...page,
    update(found) {
      parts = found;
      show();
    },
  };
}

function age(info) {
  if (!info) return "…";
  return info.problem ? "no answer" : span(info.mirror_age_s);
}
