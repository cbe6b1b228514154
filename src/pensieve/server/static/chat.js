/**
 * The chat: one thread a conversation, the composer, answers as they stream. Knows the map only through `hooks`
 * (is this conversation all on the gpu? what is that one called?).
 */

import { conversationPath } from "./api.js";
import { make, setText } from "./dom.js";
import { receiptView } from "./receipt.js";
import { patiently, streamTurn } from "./turn.js";

const PAUSE_MS = 10000; // typing again after this long warms again
const TITLE_CHARS = 48;
const NEAR_END_PX = 60;
const ROLE_NAMES = { user: "You", assistant: "Model", system: "System", tool: "Tool" };

/**
 * A conversation as this page holds it. Its messages live in `log`, a detached element while another thread is shown.
 * A thread goes on streaming when another one is looked at.
 */
class Thread {
  constructor(id) {
    this.id = id; // null until the first message is sent
    this.title = null;
    this.log = make("div", { className: "turns", role: "log", "aria-label": "Messages" });
    this.draft = "";
    this.loaded = id === null;
    this.stop = null; // AbortController of the turn under way
    this.lastKeyMs = null; // of the typing under way; null after a message went out
  }
}

/** Fires "changed" with detail {id} whenever a turn ended, and "opened" with {id} when a new conversation got its id. */
export class Chat extends EventTarget {
  #api;
  #elements;
  #hooks;
  #threads = new Map();
  #thread = new Thread(null);

  /**
   * @param {import("./api.js").Api} api
   * @param {Record<string, HTMLElement>} elements title, log, form, text, send, stop, temperature, maxTokens
   * @param {{titleOf: (id: string) => string|null, needsWarming: (id: string) => boolean, serverNowS: () => number, model: () => string}} hooks
   */
  constructor(api, elements, hooks) {
    super();
    this.#api = api;
    this.#elements = elements;
    this.#hooks = hooks;
    const { form, text, stop } = elements;
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit();
    });
    text.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.#submit();
    });
    text.addEventListener("input", () => this.#onInput());
    stop.addEventListener("click", () => this.stop());
    this.#show();
  }

  /** The open conversation's id; null for a new one. */
  get openId() {
    return this.#thread.id;
  }

  /** Show a conversation, from the server if this page has not seen it yet. @param {string|null} id */
  open(id) {
    if (id !== null && id === this.#thread.id) return;
    this.#thread.draft = this.#elements.text.value;
    if (id === null) this.#thread = new Thread(null);
    else {
      if (!this.#threads.has(id)) this.#threads.set(id, new Thread(id));
      this.#thread = this.#threads.get(id);
    }
    this.#show();
    if (!this.#thread.loaded) this.#load(this.#thread);
  }

  /** A conversation is gone. */
  forget(id) {
    this.#threads.get(id)?.stop?.abort();
    this.#threads.delete(id);
  }

  /** Stop the answer under way, if there is one. @returns {boolean} was there? */
  stop() {
    this.#thread.stop?.abort();
    return this.#thread.stop !== null;
  }

  focus() {
    this.#elements.text.focus();
  }

  /** Titles come from the server after the first turn. */
  refreshTitle() {
    const { id, title } = this.#thread;
    setText(this.#elements.title, id === null ? title ?? "New conversation" : this.#hooks.titleOf(id) ?? title ?? id);
  }

  #show() {
    const { log, text } = this.#elements;
    log.replaceChildren(this.#thread.log);
    text.value = this.#thread.draft;
    this.#grow();
    this.#showBusy();
    this.refreshTitle();
    log.scrollTop = log.scrollHeight;
  }

  #showBusy() {
    const busy = this.#thread.stop !== null;
    const { send, stop } = this.#elements;
    const focused = document.activeElement === send || document.activeElement === stop;
    send.hidden = busy;
    stop.hidden = !busy;
    if (focused) (busy ? stop : send).focus();
  }

  async #load(thread) {
    const note = make("p", { className: "note" }, "loading messages");
    thread.log.replaceChildren(note);
    thread.loaded = true; // or rather: asked for
    try {
      const conversation = await this.#api.call("GET", conversationPath(thread.id));
      thread.title = conversation.title;
      note.replaceWith(...conversation.messages.map((message) => messageView(message.role, contentText(message.content)).element));
    } catch (error) {
      thread.loaded = false;
      const words = error.status === 404 ? "There is no conversation with this id (any more)." : `Messages not loaded: ${error.message}`;
      const again = make("button", { type: "button" }, "Try again");
      again.addEventListener("click", () => this.#load(thread));
      note.replaceWith(make("p", { className: "error", role: "alert" }, words, " ", again));
    }
    if (thread === this.#thread) this.#show();
  }

  // -- the composer

  #onInput() {
    this.#grow();
    const thread = this.#thread;
    const nowMs = performance.now();
    const firstOfAPause = thread.lastKeyMs === null || nowMs - thread.lastKeyMs > PAUSE_MS;
    thread.lastKeyMs = nowMs;
    if (firstOfAPause && thread.id !== null && thread.stop === null && this.#hooks.needsWarming(thread.id)) {
      // A hint: whether it is taken or not, the turn will say where its tokens came from.
      this.#api.call("POST", conversationPath(thread.id, "warm"), { body: {}, quiet: true }).catch(() => {});
    }
  }

  #grow() {
    const { text } = this.#elements;
    text.style.height = "auto";
    text.style.height = `${text.scrollHeight + 2}px`;
  }

  #submit() {
    const { text } = this.#elements;
    const words = text.value;
    if (this.#thread.stop !== null || words.trim() === "") return;
    text.value = "";
    this.#thread.draft = "";
    this.#thread.lastKeyMs = null;
    this.#grow();
    this.#send(this.#thread, words);
  }

  // -- a turn

  async #send(thread, words) {
    if (thread.title === null) thread.title = words.trim().replace(/\s+/g, " ").slice(0, TITLE_CHARS);
    const question = messageView("user", words);
    const answer = messageView("assistant", "");
    thread.log.append(question.element, answer.element);
    thread.log.setAttribute("aria-busy", "true"); // read it out when it is whole
    answer.element.classList.add("streaming");
    this.#scrollToEnd(thread);
    const stopper = new AbortController();
    thread.stop = stopper;
    this.#showBusy();
    const { signal } = stopper;
    const onWait = (waiting) => {
      answer.tell("waiting", waiting);
      this.#scrollToEnd(thread);
    };
    try {
      if (thread.id === null) await this.#create(thread, { signal, onWait });
      const onDelta = (delta) => {
        const atEnd = this.#isAtEnd();
        answer.append(delta);
        if (atEnd) this.#scrollToEnd(thread);
      };
      const ended = await streamTurn(this.#api, this.#request(thread, words), { signal, onDelta, onWait });
      const atEnd = this.#isAtEnd();
      if (ended.cutShort) answer.tell("note", "It ended at the limit for answers.");
      if (ended.receipt) {
        const { titleOf, serverNowS } = this.#hooks;
        answer.element.append(receiptView(ended.receipt, { outputTokens: ended.outputTokens, nowS: serverNowS(), titleOf: quoted(titleOf) }));
      }
      if (atEnd) this.#scrollToEnd(thread);
    } catch (error) {
      answer.tell("waiting", null);
      if (signal.aborted) answer.tell("note", "Stopped.");
      else this.#offerAgain(thread, words, question, answer, error);
      this.#scrollToEnd(thread);
    } finally {
      thread.stop = null;
      thread.log.setAttribute("aria-busy", "false");
      answer.element.classList.remove("streaming");
      if (thread === this.#thread) this.#showBusy();
      this.dispatchEvent(new CustomEvent("changed", { detail: { id: thread.id } }));
    }
  }

  async #create(thread, { signal, onWait }) {
    const { id } = await patiently(() => this.#api.call("POST", "v1/conversations", { body: { metadata: {} }, signal }), { signal, onWait });
    thread.id = id;
    this.#threads.set(id, thread);
    if (thread === this.#thread) this.dispatchEvent(new CustomEvent("opened", { detail: { id } }));
  }

  #request(thread, words) {
    const { temperature, maxTokens } = this.#elements;
    const request = { model: this.#hooks.model(), input: words, conversation: thread.id };
    if (temperature.value !== "") request.temperature = temperature.valueAsNumber;
    if (maxTokens.value !== "") request.max_output_tokens = maxTokens.valueAsNumber;
    return request;
  }

  #offerAgain(thread, words, question, answer, error) {
    const text = error.status === 429 ? `The server is busy: ${error.message}` : error.message;
    const again = make("button", { type: "button" }, "Try again");
    again.addEventListener("click", () => {
      if (thread.stop !== null) return;
      question.element.remove();
      answer.element.remove();
      this.#send(thread, words);
    });
    answer.tell("error", text, again);
  }

  #isAtEnd() {
    const { log } = this.#elements;
    return log.scrollHeight - log.scrollTop - log.clientHeight < NEAR_END_PX;
  }

  #scrollToEnd(thread) {
    if (thread !== this.#thread) return;
    this.#elements.log.scrollTop = this.#elements.log.scrollHeight;
  }
}

function quoted(titleOf) {
  return (id) => {
    const title = titleOf(id);
    return title === null ? null : `“${title}”`;
  };
}

/** Text of a message's content: a string, or the parts of one. */
function contentText(content) {
  if (typeof content === "string") return content;
  return (content ?? []).map((part) => part.text ?? `[${part.type}]`).join("");
}

function messageView(role, words) {
  const text = document.createTextNode(words);
  const body = make("div", { className: "words" }, text);
  const element = make("article", { className: `message ${role in ROLE_NAMES ? role : "other"}`, "aria-label": ROLE_NAMES[role] ?? role },
    make("p", { className: "who" }, ROLE_NAMES[role] ?? role), body);
  const notes = new Map();
  return {
    element,
    append: (more) => text.appendData(more),
    /** One line below the words a kind; null takes it away. */
    tell(kind, line, ...more) {
      notes.get(kind)?.remove();
      notes.delete(kind);
      if (line === null) return;
      const note = make("p", { className: kind, role: kind === "error" ? "alert" : "status" }, line, " ", ...more);
      notes.set(kind, note);
      element.append(note);
    },
  };
}
