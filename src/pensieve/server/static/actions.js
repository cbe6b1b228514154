/** What can be done to a conversation, as buttons and as keys. Knows how to ask the server; not how its answers change the page. */

import { conversationPath } from "./api.js";
import { askToDelete } from "./dialogs.js";
import { make, say, setText } from "./dom.js";
import { bytesText, plural, titleText } from "./format.js";

/** verb -> label, key in the map, what it does */
const VERBS = {
  open: ["Open", "Enter", "show its messages"],
  warm: ["Warm", "w", "bring its chunks to the gpu now, ahead of the next message"],
  idle: ["Idle", "i", "done for now: its chunks may go first"],
  pin: ["Pin", "p", "never drop its chunks"],
  fork: ["Fork", "f", "a new conversation that starts with the same turns"],
  delete: ["Delete", "Delete", "erase its messages and every cached byte"],
};

export const VERB_OF_KEY = new Map(Object.entries(VERBS).map(([verb, [, key]]) => [key, verb]));

/** Does the verbs. Fires "done" with detail {verb, id, answer}; verb "unpin" where "pin" meant that. */
export class Actions extends EventTarget {
  #api;

  /** @param {import("./api.js").Api} api */
  constructor(api) {
    super();
    this.#api = api;
  }

  /**
   * @param {string} verb
   * @param {{id: string, title: string|null, pinned: boolean, cells?: string}} conversation
   * @throws {import("./api.js").ApiError}
   */
  async run(verb, conversation) {
    const { id } = conversation;
    const title = titleText(conversation);
    let [done, answer] = [verb, null];
    if (verb === "open") location.hash = encodeURIComponent(id);
    else if (verb === "delete") {
      const cached = conversation.cells?.replaceAll(".", "").length ?? 0;
      const words = `Its messages and ${cached ? `${plural(cached, "cached chunk")} in all tiers` : "anything cached of it"} will be erased. This cannot be undone.`;
      if (!(await askToDelete(title, words))) return;
      answer = await this.#api.call("DELETE", conversationPath(id));
      say(`“${title}” is deleted: ${bytesText(answer.kv_bytes)} of cache and ${bytesText(answer.store_bytes)} of the store erased.`);
    } else {
      if (verb === "pin" && conversation.pinned) done = "unpin";
      answer = await this.#api.call("POST", conversationPath(id, done), { body: {} });
      say(DONE[done](title, answer));
    }
    this.dispatchEvent(new CustomEvent("done", { detail: { verb: done, id, answer } }));
  }
}

const DONE = {
  warm: (title, { chunks }) => `“${title}”: ${chunks ? `${plural(chunks, "chunk")} on the way to the gpu` : "nothing to bring in"}.`,
  idle: (title) => `“${title}” is idle: its chunks may go first.`,
  pin: (title) => `“${title}” is pinned: it will not be dropped.`,
  unpin: (title) => `“${title}” is no longer pinned.`,
  fork: (title) => `“${title}” was forked.`,
};

/** A row of buttons for one conversation at a time, with a place for what went wrong. */
export class ActionBar {
  #actions;
  #buttons = new Map();
  #error = make("p", { className: "error", role: "alert", hidden: true });
  #conversation = null;
  element = make("div", { className: "actions", role: "group" });

  /** @param {Actions} actions @param {string[]} verbs @param {{keys?: boolean}} [options] keys: tell the map's keys in the titles */
  constructor(actions, verbs, { keys = false } = {}) {
    this.#actions = actions;
    for (const verb of verbs) {
      const [label, key, words] = VERBS[verb];
      const button = make("button", { type: "button", title: keys ? `${words} (in the map: ${key})` : words, "data-verb": verb }, label);
      button.addEventListener("click", () => this.run(verb));
      this.#buttons.set(verb, button);
      this.element.append(button);
    }
    this.element.append(this.#error);
  }

  /** @param {object|null} conversation null: nothing to act on */
  show(conversation) {
    if (conversation?.id !== this.#conversation?.id) this.#error.hidden = true;
    this.#conversation = conversation;
    this.element.hidden = conversation === null;
    if (conversation === null) return;
    this.element.setAttribute("aria-label", `Actions for ${titleText(conversation)}`);
    const pin = this.#buttons.get("pin");
    if (pin) setText(pin, conversation.pinned ? "Unpin" : "Pin");
  }

  /** Do one verb to the conversation shown; errors are told here. */
  async run(verb) {
    const conversation = this.#conversation;
    if (conversation === null) return;
    this.#error.hidden = true;
    try {
      await this.#actions.run(verb, conversation);
    } catch (error) {
      if (this.#conversation?.id !== conversation.id) return;
      setText(this.#error, error.status === 429 ? `busy, try again in ${Math.ceil(error.retryAfterS ?? 2)} s` : error.message);
      this.#error.hidden = false;
    }
  }
}
