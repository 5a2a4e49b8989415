// A table whose rows are changed in place: focus, selection and a screen reader's place survive.

import { h, say } from "./dom.js";

export class Table {
  // columns: {title, cell(row) -> node or text, sort?: name, number?: true}
  constructor(caption, columns, { onSort = null, empty = "Nothing to show." } = {}) {
    this.columns = columns;
    this.rows = new Map();
    this.texts = new Map();
    this.onSort = onSort;
    this.headings = columns.map((column) => this.heading(column));
    this.body = h("tbody");
    this.empty = h("p", { class: "quiet" }, empty);
    this.element = h(
      "div",
      { class: "table" },
      h(
        "div",
        { class: "scroll", role: "region", "aria-label": caption, tabindex: "0" },
        h("table", {}, h("caption", { class: "unseen" }, caption), h("thead", {}, h("tr", {}, this.headings)), this.body),
      ),
      this.empty,
    );
  }

  heading(column) {
    const attributes = { scope: "col", class: column.number ? "number" : null };
    if (!column.sort || !this.onSort) return h("th", attributes, column.title);
    const button = h("button", { type: "button", onclick: () => this.onSort(column.sort) }, column.title);
    return h("th", { ...attributes, "data-sort": column.sort }, button);
  }

  sorted(name) {
    for (const heading of this.headings) {
      if (heading.dataset.sort === name) heading.setAttribute("aria-sort", "descending");
      else heading.removeAttribute("aria-sort");
    }
  }

  // Show the rows of `order`; `values` maps a key to its row.
  show(order, values) {
    for (const [key, row] of this.rows) {
      if (!order.includes(key)) {
        row.remove();
        this.rows.delete(key);
        this.texts.delete(key);
      }
    }
    let before = null;
    for (const key of order) {
      const value = values.get(key);
      if (value === undefined) continue;
      const row = this.row(key, value);
      const expected = before ? before.nextSibling : this.body.firstChild;
      if (expected !== row) this.body.insertBefore(row, expected);
      before = row;
    }
    this.empty.hidden = this.rows.size > 0;
  }

  row(key, value) {
    const text = JSON.stringify(value);
    let row = this.rows.get(key);
    if (row && this.texts.get(key) === text) return row;
    if (!row) {
      row = h("tr", { "data-key": key });
      row.append(...this.columns.map((column, index) => this.cell(column, index)));
      this.rows.set(key, row);
    }
    this.texts.set(key, text);
    this.columns.forEach((column, index) => {
      const cell = row.children[index];
      const content = column.cell(value);
      if (typeof content === "string" || typeof content === "number") {
        say(cell, String(content));
        return;
      }
      // A link that says the same stays the same element: it may have the focus.
      const held = cell.firstChild;
      const same = held && cell.childNodes.length === 1 && held.isEqualNode?.(content);
      if (!same) cell.replaceChildren(content);
    });
    return row;
  }

  cell(column, index) {
    const attributes = { class: column.number ? "number" : null };
    return index === 0 ? h("th", { scope: "row", ...attributes }) : h("td", attributes);
  }
}

// Where one is in a long list, and the way on.
export class Pager {
  constructor(size, onMove) {
    this.size = size;
    this.offset = 0;
    this.text = h("span", { class: "quiet" });
    this.back = h("button", { type: "button", onclick: () => this.move(-size, onMove) }, "Previous");
    this.next = h("button", { type: "button", onclick: () => this.move(size, onMove) }, "Next");
    this.element = h("nav", { class: "pager", "aria-label": "Rows" }, this.back, this.text, this.next);
  }

  move(by, onMove) {
    this.offset = Math.max(0, this.offset + by);
    onMove();
  }

  show(total) {
    const last = Math.min(total, this.offset + this.size);
    say(this.text, total ? `${this.offset + 1} to ${last} of ${total}` : "none");
    this.back.disabled = this.offset === 0;
    this.next.disabled = last >= total;
    this.element.hidden = total <= this.size && this.offset === 0;
    if (this.offset >= total && this.offset > 0 && total > 0) this.back.focus();
  }
}
