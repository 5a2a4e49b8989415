// Changes: asked for in words, confirmed, made with the token through the same API as the CLI's.

import { $, h } from "./dom.js";
import { post, token } from "./live.js";

export function unlock(shell) {
  const input = h("input", { id: "token-input", type: "password", autocomplete: "off", required: true });
  const trouble = h("p", { class: "trouble", role: "alert" });
  const form = h(
    "form",
    {
      onsubmit: async (event) => {
        event.preventDefault();
        token.set(input.value.trim());
        try {
          await post("/api/session", {});
          $("dialog").close();
          shell.unlocked();
        } catch (error) {
          token.set("");
          trouble.textContent = error.message;
          input.select();
        }
      },
    },
    h("h2", { id: "dialog-title" }, "Unlock changes"),
    h("p", {}, h("label", { for: "token-input" }, "The dashboard's token (in the file that --dashboard-token-file names)")),
    input,
    trouble,
    buttons("Unlock"),
  );
  open(form);
}

// fields: {name, label, value, type?, required?}
export function act(shell, question, path, fields = [], choose = (values) => values) {
  const inputs = fields.map((field) => h("input", { id: `field-${field.name}`, name: field.name, type: field.type || "text", value: field.value, required: field.required, min: field.type === "number" ? "1" : null }));
  const trouble = h("p", { class: "trouble", role: "alert" });
  const form = h(
    "form",
    {
      onsubmit: async (event) => {
        event.preventDefault();
        const values = Object.fromEntries(inputs.map((input) => [input.name, input.type === "number" ? Number(input.value) : input.value]));
        try {
          await post(path, choose(values));
          $("dialog").close();
          shell.announce("Accepted; the page shows what becomes of it.");
        } catch (error) {
          trouble.textContent = error.fix ? `${error.message} (${error.fix})` : error.message;
          if (error.status === 401) {
            token.set("");
            unlock(shell);
          }
        }
      },
    },
    h("h2", { id: "dialog-title" }, question),
    fields.map((field, index) => h("p", {}, h("label", { for: `field-${field.name}` }, field.label), " ", inputs[index])),
    trouble,
    buttons("Yes"),
  );
  open(form);
}

function buttons(yes) {
  return h(
    "p",
    { class: "buttons" },
    h("button", { type: "submit", class: "primary" }, yes),
    h("button", { type: "button", onclick: () => $("dialog").close() }, "Leave it"),
  );
}

function open(form) {
  const dialog = $("dialog");
  dialog.replaceChildren(form);
  if (!dialog.open) dialog.showModal();
}
