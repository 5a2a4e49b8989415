// Phases and states in colour and, always, in words.

import { h } from "./dom.js";

const TONES = {
  RUNNING: "good", SUCCEEDED: "good", Ready: "good", Committed: "good", leader: "good", TRAINING: "good", DONE: "good",
  RECOVERING: "warn", SUSPENDING: "warn", CANCELLING: "warn", Draining: "warn", Cordoned: "warn", Open: "info",
  STARTING: "info", RESTORING: "info", CHECKPOINTING: "info", READY: "info",
  FAILED: "bad", Lost: "bad", Blocked: "bad", Bad: "bad", ERROR: "bad",
};

export function badge(text) {
  return h("span", { class: `badge ${TONES[text] || "plain"}` }, text || "–");
}
