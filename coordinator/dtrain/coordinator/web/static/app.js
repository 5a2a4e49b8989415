// The frame around every page: who leads, how fresh this is, theme, token, announcements.

import { unlock } from "./acting.js";
import * as agents from "./agents.js";
import * as checkpoints from "./checkpoints.js";
import { $, h, say } from "./dom.js";
import { setClock, span, tick } from "./format.js";
import * as job from "./job.js";
import * as jobs from "./jobs.js";
import { Live, token } from "./live.js";
import * as replicas from "./replicas.js";

const STALE_S = 10;
const THEMES = ["auto", "light", "dark"];

const parts = new Map();
let hello = null;
let replica = "";
let staticDigest = "";
let live = null;
let problem = "";
let away = "";
let stale = "";

const shell = {
  main: $("main"),
  restart: () => live?.restart(),
  announce,
  canAct: () => Boolean(hello?.can_act && token.get()),
  unlocked() {
    showToken();
    live.restart();
  },
};

const page = mount();
document.title = `${page.title} · dtrain`;
live = new Live(page.query, {
  hello(told, origin) {
    hello = told;
    setClock(told.now);
    say($("cluster-name"), told.cluster);
    if (replica && replica !== told.replica) announce(`Now served by replica ${told.replica}; ${replica} is away.`);
    away = origin === location.origin ? "" : `Replica ${new URL(location.href).host} does not answer: this page goes on with ${told.replica}.`;
    if (staticDigest && staticDigest !== told.static) announce("The dashboard was upgraded; reload the page to see all of it.");
    staticDigest = staticDigest || told.static;
    replica = told.replica;
    problem = "";
    showAge(told.age_s);
    showToken();
    showLink();
  },
  parts(told) {
    if (told.reset) parts.clear();
    for (const name of told.gone) parts.delete(name);
    for (const [name, value] of Object.entries(told.set)) parts.set(name, value);
    document.documentElement.dataset.revision = told.revision;
    showLeader();
    page.update(parts, told);
  },
  alive(told) {
    showAge(told.age_s);
    showLink();
  },
  lost(why) {
    problem = `Not live: ${why}. Trying again…`;
    showLink();
  },
  locked() {
    problem = "This dashboard needs its token.";
    showLink();
    unlock(shell);
  },
});

setInterval(tick, 1000);
setUpTheme();
$("token-button").addEventListener("click", () => {
  if (!token.get()) return unlock(shell);
  token.set("");
  showToken();
  live.restart();
});
for (const link of document.querySelectorAll("header nav a")) {
  const at = link.getAttribute("href");
  const here = at === "/" ? /^\/($|jobs\/)/.test(location.pathname) : location.pathname.startsWith(at);
  if (here) link.setAttribute("aria-current", "page");
}

function mount() {
  const name = /^\/jobs\/([^/]+)$/.exec(location.pathname);
  if (name) return job.mount(shell, decodeURIComponent(name[1]));
  const pages = { "/agents": agents, "/replicas": replicas, "/checkpoints": checkpoints };
  return (pages[location.pathname] || jobs).mount(shell);
}

function showLeader() {
  const cluster = parts.get("cluster");
  if (!cluster) return;
  live.siblings = Object.values(cluster.replicas).filter((url) => url.startsWith("http"));
  const text = cluster.leader ? `Leader ${cluster.leader}, term ${cluster.term}` : "No leader at the moment; training goes on";
  if ($("leader").textContent !== text) {
    if ($("leader").textContent) announce(text);
    say($("leader"), text);
  }
}

function showAge(seconds) {
  if (seconds === null || seconds === undefined) stale = "This replica has not read etcd yet.";
  else stale = seconds > STALE_S ? `What is shown is ${span(seconds)} old: etcd cannot be reached.` : "";
}

function showLink() {
  const text = problem ? "not live" : `live from ${replica}`;
  say($("link-text"), text);
  $("link-dot").className = problem || stale ? "bad" : "good";
  const notices = [problem, away, stale].filter(Boolean);
  if ($("notice").textContent !== notices.join("")) $("notice").replaceChildren(...notices.map((one) => h("p", {}, one)));
}

function showToken() {
  const button = $("token-button");
  button.hidden = !hello?.can_act;
  say(button, token.get() ? "Lock changes" : "Unlock changes");
  page.acting?.();
}

function announce(text) {
  const log = $("announce");
  log.append(h("p", {}, text));
  while (log.children.length > 20) log.firstChild.remove();
}

function setUpTheme() {
  const button = $("theme-button");
  const stored = () => {
    const chosen = document.documentElement.dataset.theme;
    return THEMES.includes(chosen) ? chosen : "auto";
  };
  const show = () => say(button, `Theme: ${stored()}`);
  button.addEventListener("click", () => {
    const next = THEMES[(THEMES.indexOf(stored()) + 1) % THEMES.length];
    if (next === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = next;
    try {
      localStorage.setItem("dtrain-theme", next);
    } catch {
      // It holds for this page.
    }
    show();
  });
  show();
}
