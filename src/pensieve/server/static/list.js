/** The list of conversations. Knows titles and ids; opening one is the address bar's business (its hash). */

import { make, setText } from "./dom.js";
import { titleText } from "./format.js";

const PAGE = 50;

export class ConversationList {
  #api;
  #list;
  #note;
  #more;
  #items = new Map(); // id -> {data, link}
  #limit = PAGE;
  #openId = null;
  #loading = null;

  /** @param {import("./api.js").Api} api @param {{list: HTMLElement, note: HTMLElement, more: HTMLElement}} elements */
  constructor(api, { list, note, more }) {
    this.#api = api;
    this.#list = list;
    this.#note = note;
    this.#more = more;
    more.addEventListener("click", () => {
      this.#limit += PAGE;
      this.refresh();
    });
    list.addEventListener("keydown", (event) => this.#onKey(event));
  }

  /** What the server last said of a conversation, or undefined. */
  get(id) {
    return this.#items.get(id)?.data;
  }

  /** Load the newest conversations. Calls that overlap share one answer, and one more call after it. */
  async refresh() {
    if (this.#loading) {
      this.#loading.again = true;
      return this.#loading.done;
    }
    const loading = { again: false, done: null };
    this.#loading = loading;
    loading.done = (async () => {
      do {
        loading.again = false;
        await this.#load();
      } while (loading.again);
    })().finally(() => {
      this.#loading = null;
    });
    return loading.done;
  }

  /** Mark the open one. @param {string|null} id */
  select(id) {
    this.#openId = id;
    this.#mark();
  }

  async #load() {
    try {
      const { data, total } = await this.#api.call("GET", `v1/pensieve/conversations?limit=${this.#limit}&offset=0`, { quiet: true });
      this.#render(data);
      this.#more.hidden = data.length >= total;
      setText(this.#more, `Show more (${total - data.length})`);
      setText(this.#note, total === 0 ? "None yet: write the first message." : "");
    } catch (error) {
      setText(this.#note, error.status === 401 ? "An API key is needed to see them." : `Not loaded: ${error.message}`);
    }
  }

  #render(data) {
    const before = this.#items;
    this.#items = new Map();
    let previous = null;
    for (const conversation of data) {
      const item = before.get(conversation.id) ?? this.#makeItem(conversation.id);
      before.delete(conversation.id);
      item.data = conversation;
      setText(item.title, titleText(conversation));
      item.pin.hidden = !conversation.pinned;
      this.#items.set(conversation.id, item);
      const place = previous ? previous.nextSibling : this.#list.firstChild;
      if (item.element !== place) this.#list.insertBefore(item.element, place);
      previous = item.element;
    }
    for (const { element } of before.values()) element.remove();
    this.#mark();
  }

  #makeItem(id) {
    const title = make("span", { className: "title" });
    const pin = make("span", { className: "pin", title: "pinned", hidden: true }, "pinned");
    const link = make("a", { href: `#${encodeURIComponent(id)}`, tabIndex: -1 }, title, pin);
    return { data: null, title, pin, link, element: make("li", {}, link) };
  }

  #mark() {
    let tabStop = null;
    for (const [id, { link }] of this.#items) {
      if (id === this.#openId) link.setAttribute("aria-current", "page");
      else link.removeAttribute("aria-current");
      link.tabIndex = -1;
      if (id === this.#openId || link === document.activeElement) tabStop = link;
    }
    tabStop ??= this.#list.querySelector("a");
    if (tabStop) tabStop.tabIndex = 0; // one stop for Tab, arrows within
  }

  #onKey(event) {
    const links = [...this.#list.querySelectorAll("a")];
    const at = links.indexOf(document.activeElement);
    const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: links.length - 1 }[event.key];
    if (to === undefined || at < 0) return;
    event.preventDefault();
    links[Math.max(0, Math.min(links.length - 1, to))].focus();
    this.#mark();
  }
}
