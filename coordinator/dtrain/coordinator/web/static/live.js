// The page's link to the cluster: one stream of changes, from whichever replica answers.
//
// It is read with fetch, not EventSource, so that the token can travel in a header. When our own
// replica is gone the other replicas of the cluster are asked; the revision seen last goes along,
// so that nothing older is ever shown.

const TOKEN_KEY = "dtrain-token";
const SILENCE_MS = 20000;
const PAUSE_MS_FIRST = 300;
const PAUSE_MS_MAX = 5000;

export const token = {
  get() {
    try {
      return sessionStorage.getItem(TOKEN_KEY) || "";
    } catch {
      return "";
    }
  },
  set(value) {
    try {
      if (value) sessionStorage.setItem(TOKEN_KEY, value);
      else sessionStorage.removeItem(TOKEN_KEY);
    } catch {
      // Storage may be forbidden: then the token is asked for again.
    }
  },
};

function authorized(headers = {}) {
  const known = token.get();
  return known ? { ...headers, Authorization: `Bearer ${known}` } : headers;
}

export class Refused extends Error {
  constructor(status, told) {
    super(told.error || `the dashboard answered ${status}`);
    this.status = status;
    this.fix = told.fix || "";
  }
}

export async function get(path) {
  return answer(await fetch(path, { headers: authorized() }));
}

export async function post(path, document) {
  const headers = authorized({ "Content-Type": "application/json" });
  return answer(await fetch(path, { method: "POST", headers, body: JSON.stringify(document) }));
}

async function answer(response) {
  const told = await response.json().catch(() => ({}));
  if (!response.ok) throw new Refused(response.status, told);
  return told;
}

export class Live {
  // told.hello(hello, origin), told.parts({revision, reset, set, gone}), told.alive(alive),
  // told.lost(why), told.locked(): what happens to the link.
  constructor(query, told) {
    this.query = query;
    this.told = told;
    this.seen = 0;
    this.siblings = [];
    this.restarts = 0;
    this.run();
  }

  // What is looked at has changed: begin again at once.
  restart() {
    this.restarts += 1;
    this.stop?.abort();
    this.wake?.();
  }

  async run() {
    let pause = PAUSE_MS_FIRST;
    let failures = 0;
    for (;;) {
      const restarts = this.restarts;
      const others = this.siblings.filter((origin) => origin !== location.origin);
      // Our own replica first, each other one in turn when it does not answer.
      const turn = failures % (others.length + 1);
      const origin = turn ? others[turn - 1] : location.origin;
      try {
        await this.read(origin, () => {
          failures = 0;
          pause = PAUSE_MS_FIRST;
        });
        failures += 1;
      } catch (error) {
        if (restarts !== this.restarts) continue;
        if (error instanceof Refused && error.status === 401 && origin === location.origin) {
          this.told.locked();
          await this.sleep(60000);
          continue;
        }
        failures += 1;
        this.told.lost(error instanceof Refused ? error.message : "it does not answer");
      }
      if (restarts !== this.restarts) continue;
      if (failures > others.length) {
        await this.sleep(pause + Math.random() * pause);
        pause = Math.min(PAUSE_MS_MAX, 2 * pause);
      }
    }
  }

  sleep(ms) {
    return new Promise((resolve) => {
      const timer = setTimeout(resolve, ms);
      this.wake = () => {
        clearTimeout(timer);
        resolve();
      };
    });
  }

  async read(origin, onHello) {
    const stop = new AbortController();
    this.stop = stop;
    let silence;
    const heard = () => {
      clearTimeout(silence);
      silence = setTimeout(() => stop.abort(), SILENCE_MS);
    };
    heard();
    try {
      const asked = new URLSearchParams({ ...this.query(), seen: String(this.seen) });
      // A header would have the browser ask another origin for permission first.
      const headers = origin === location.origin ? authorized() : {};
      const response = await fetch(`${origin}/api/stream?${asked}`, { headers, signal: stop.signal, cache: "no-store" });
      if (!response.ok) throw new Refused(response.status, await response.json().catch(() => ({})));
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      let text = "";
      for (;;) {
        const { value, done } = await reader.read();
        if (done) return;
        heard();
        text += value;
        let end;
        while ((end = text.indexOf("\n\n")) >= 0) {
          this.take(text.slice(0, end), origin, onHello);
          text = text.slice(end + 2);
        }
      }
    } finally {
      clearTimeout(silence);
    }
  }

  take(block, origin, onHello) {
    let name = "";
    let data = "";
    for (const line of block.split("\n")) {
      if (line.startsWith("event: ")) name = line.slice(7);
      else if (line.startsWith("data: ")) data += line.slice(6);
    }
    if (!data) return;
    const value = JSON.parse(data);
    if (name === "hello") {
      onHello();
      this.told.hello(value, origin);
    } else if (name === "parts") {
      this.seen = Math.max(this.seen, value.revision);
      this.told.parts(value);
    } else if (name === "alive") {
      this.told.alive(value);
    }
  }
}
