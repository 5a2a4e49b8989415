// The end of one rank's log, and what is added to it.

import { h } from "./dom.js";
import { get } from "./live.js";

const EVERY_MS = 2000;
const CHARACTERS_MAX = 200000;

export function logPanel(job) {
  const output = h("pre", { tabindex: "0", "aria-label": "Log" });
  const rank = h("input", { id: "log-rank", type: "number", min: "0", value: "0" });
  const stream = h("select", { id: "log-stream" }, ["stdout", "stderr"].map((name) => h("option", { value: name }, name)));
  const where = h("span", { class: "quiet" });
  const panel = h(
    "section",
    { "aria-labelledby": "log-title" },
    h("h2", { id: "log-title" }, "Log"),
    h("p", { class: "tools" }, h("label", { for: "log-rank" }, "Rank"), rank, h("label", { for: "log-stream" }, "Stream"), stream, where),
    output,
  );
  let offset = null;
  let turn = 0;
  const restart = () => {
    offset = null;
    turn += 1;
    output.textContent = "";
    read(turn);
  };
  rank.addEventListener("change", restart);
  stream.addEventListener("change", restart);
  async function read(mine) {
    if (mine !== turn) return;
    try {
      const asked = new URLSearchParams({ rank: rank.value || "0", stream: stream.value });
      if (offset !== null) asked.set("offset", offset);
      const part = await get(`/api/jobs/${encodeURIComponent(job)}/log?${asked}`);
      if (mine !== turn) return;
      offset = part.next_offset;
      where.textContent = `attempt ${part.attempt} on ${part.agent}`;
      if (part.text) {
        const atEnd = output.scrollTop + output.clientHeight >= output.scrollHeight - 20;
        output.textContent = (output.textContent + part.text).slice(-CHARACTERS_MAX);
        if (atEnd) output.scrollTop = output.scrollHeight;
      }
    } catch (error) {
      if (mine !== turn) return;
      where.textContent = error.message;
    }
    setTimeout(() => read(mine), EVERY_MS);
  }
  read(turn);
  // Another attempt writes another file.
  return { element: panel, restart };
}
