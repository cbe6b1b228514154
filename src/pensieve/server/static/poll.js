/**
 * Asks for the map again and again: every second, slower when nobody looks, ever more patiently when nobody answers.
 * Tells what it heard through events; knows nothing of how it is shown.
 */

export const PAGE_ROWS = 200;

const VISIBLE_MS = 1000;
const HIDDEN_MS = 10000;
const LONGEST_BACKOFF_MS = 30000;
const READY_EVERY = 5; // polls
const PATIENCE_MS = 15000;

/**
 * Fires "map" with detail [{offset, answer}], and "state" with detail {state, words}, where state is
 * "connected", "unreachable", "restarting", "locked" or "failing".
 */
export class Poller extends EventTarget {
  #api;
  #wantedPages;
  #timer = null;
  #busy = false;
  #again = false;
  #failures = 0;
  #polls = 0;
  #era = 0;

  /** @param {import("./api.js").Api} api @param {() => number[]} wantedPages page numbers in sight */
  constructor(api, wantedPages) {
    super();
    this.#api = api;
    this.#wantedPages = wantedPages;
    document.addEventListener("visibilitychange", () => document.hidden || this.kick());
    window.addEventListener("online", () => this.kick());
  }

  /** Poll now. */
  kick() {
    if (this.#busy) {
      this.#again = true;
      return;
    }
    clearTimeout(this.#timer);
    this.#poll();
  }

  /** Poll now, and forget an answer that is on its way: it is older than what the user just did. */
  startOver() {
    this.#era += 1;
    this.kick();
  }

  async #poll() {
    this.#busy = true;
    const era = this.#era;
    let delayMs = document.hidden ? HIDDEN_MS : VISIBLE_MS;
    try {
      const pages = await Promise.all(this.#wantedPages().map((page) => this.#page(page)));
      if (era === this.#era) this.dispatchEvent(new CustomEvent("map", { detail: pages }));
      this.#failures = 0;
      if (this.#polls % READY_EVERY === 0) await this.#tellReadiness(null);
      this.#polls += 1;
    } catch (error) {
      if (error.status === undefined) console.error(error); // our own bug: say so, and go on polling
      this.#failures += 1;
      this.#polls = 0; // so that the first success tells that all is well
      delayMs = Math.max(delayMs, error.retryAfterS ? 1000 * error.retryAfterS : Math.min(1000 * 2 ** (this.#failures - 1), LONGEST_BACKOFF_MS));
      await this.#tellReadiness(error, delayMs);
    }
    this.#busy = false;
    if (this.#again) {
      this.#again = false;
      delayMs = this.#failures ? delayMs : 0;
    }
    this.#timer = setTimeout(() => this.#poll(), delayMs);
  }

  async #page(page) {
    const offset = page * PAGE_ROWS;
    const signal = AbortSignal.timeout(PATIENCE_MS);
    const answer = await this.#api.call("GET", `v1/pensieve/map?offset=${offset}&limit=${PAGE_ROWS}`, { signal, quiet: true });
    return { offset, answer };
  }

  async #tellReadiness(error, delayMs = 0) {
    if (error?.status === 401) return this.#tell("locked", "API key needed");
    const again = `trying again in ${Math.round(delayMs / 1000)} s`;
    try {
      await this.#api.call("GET", "ready", { signal: AbortSignal.timeout(PATIENCE_MS), quiet: true });
    } catch (notReady) {
      if (notReady.status === 0) return this.#tell("unreachable", "server unreachable, trying again");
      if (notReady.status === 503) return this.#tell("restarting", "engine restarting");
    }
    if (error === null) return this.#tell("connected", "connected");
    if (error.status === 0) return this.#tell("unreachable", "server unreachable, trying again");
    if (error.status === 429) return this.#tell("failing", `busy, ${again}`);
    return this.#tell("failing", `no map: ${error.message}, ${again}`);
  }

  #tell(state, words) {
    this.dispatchEvent(new CustomEvent("state", { detail: { state, words } }));
  }
}
