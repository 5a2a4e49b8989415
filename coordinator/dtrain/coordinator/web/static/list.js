// A page that is one long table: filter, search, sort, pages. What is chosen is in the address.

import { h } from "./dom.js";
import { Pager, Table } from "./table.js";

const ROWS = 100;
const TYPING_MS = 200;

export function listPage(shell, { page, title, caption, empty, filters, columns, extra = null }) {
  const asked = new URLSearchParams(location.search);
  const state = { phase: asked.get("phase") || "", text: asked.get("text") || "", sort: asked.get("sort") || "" };
  const choose = (changed) => {
    Object.assign(state, changed);
    pager.offset = 0;
    remember(state);
    shell.restart();
  };
  const pager = new Pager(ROWS, () => shell.restart());
  const table = new Table(caption, columns, {
    onSort: (sort) => {
      choose({ sort: sort === "newest" ? "" : sort });
      table.sorted(sort);
    },
    empty,
  });
  table.sorted(state.sort || "newest");
  const select = h(
    "select",
    { id: "filter", onchange: () => choose({ phase: select.value }) },
    filters.map(([value, text]) => h("option", { value, selected: value === state.phase }, text)),
  );
  let typing;
  const search = h("input", {
    id: "search",
    type: "search",
    value: state.text,
    spellcheck: "false",
    oninput: () => {
      clearTimeout(typing);
      typing = setTimeout(() => choose({ text: search.value.trim() }), TYPING_MS);
    },
  });
  document.addEventListener("keydown", (event) => {
    const typed = /^(INPUT|TEXTAREA|SELECT)$/.test(document.activeElement?.tagName || "");
    if (event.key === "/" && !typed && !event.ctrlKey && !event.metaKey) {
      event.preventDefault();
      search.focus();
    }
  });
  const count = h("p", { class: "quiet", id: "count" });
  shell.main.replaceChildren(
    h("h1", {}, title),
    h(
      "form",
      { class: "tools", role: "search", onsubmit: (event) => event.preventDefault() },
      h("label", { for: "filter" }, "Show "),
      select,
      h("label", { for: "search" }, "Name contains "),
      search,
      count,
    ),
    table.element,
    pager.element,
  );
  return {
    title,
    query: () => ({ page, ...state, offset: String(pager.offset), limit: String(ROWS) }),
    update(parts) {
      const list = parts.get("list");
      if (!list) return;
      const rows = new Map(list.order.map((key) => [key, parts.get(`row:${key}`)]));
      table.show(list.order, rows);
      pager.show(list.total);
      const text = `${list.total} ${list.total === 1 ? "row" : "rows"}`;
      if (count.textContent !== text) count.textContent = text;
      extra?.(parts);
    },
  };
}

function remember(state) {
  const found = new URLSearchParams(Object.entries(state).filter(([, value]) => value));
  history.replaceState(null, "", found.size ? `?${found}` : location.pathname);
}
