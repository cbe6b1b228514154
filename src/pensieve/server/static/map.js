/**
 * The live map: one row a conversation, one cell a chunk. Rows are drawn only where they can be seen: cells on one canvas that
 * scrolls with the content and reaches a little beyond the window, titles and their text alternatives as elements of a grid.
 * Knows nothing of the server: pages of rows come in, wishes go out as events.
 */

import { make, setText } from "./dom.js";
import { durationText, plural, titleText } from "./format.js";
import { cellsSummary, cellWords, drawPinLine, drawStrip, prepareCanvas } from "./places.js";
import { PAGE_ROWS } from "./poll.js";

const OVERSCAN_PX = 240; // drawn above and below the window, so that scrolling never shows a gap
const WIDE_PX = 700; // from here on titles stand beside their strips
const WIDEST_FIT_PX = 10; // a cell of a short conversation when rows are fitted
const MARGIN_PX = 12; // left of strips without a title beside them
const END_PX = 8; // air right of a strip

/** Fires "choose" {row}, "act" {key, row} and "need" (rows came into sight that are not loaded). */
export class TierMap extends EventTarget {
  #scroller;
  #content;
  #canvas;
  #tooltip;
  #words;
  #empty;
  #inks;
  #rows = new Map(); // index -> row
  #indexOf = new Map(); // conversation id -> index
  #elements = new Map(); // conversation id -> {element, label, note, pin} of rows in sight
  #total = 0;
  #chunkTokens = 32;
  #density = "roomy";
  #zoom = "fit";
  #geometry = null;
  #drawn = { first: 0, last: 0 };
  #chosenId = null;
  #cursorCell = null; // index of the cell the keyboard points at
  #wantedIndex = null; // a row to be chosen as soon as it is loaded
  #frame = null;

  /** @param {Record<string, HTMLElement>} elements scroller, content, canvas, tooltip, words, empty */
  constructor({ scroller, content, canvas, tooltip, words, empty }, inks) {
    super();
    [this.#scroller, this.#content, this.#canvas, this.#tooltip, this.#words, this.#empty] = [scroller, content, canvas, tooltip, words, empty];
    this.#inks = inks;
    new ResizeObserver(() => this.#relayout()).observe(scroller);
    scroller.addEventListener("scroll", () => this.#onScroll(), { passive: true });
    scroller.addEventListener("pointermove", (event) => this.#onHover(event));
    scroller.addEventListener("pointerleave", () => this.#hideTooltip());
    scroller.addEventListener("click", (event) => this.#onClick(event));
    scroller.addEventListener("dblclick", (event) => this.#act("Enter", this.#rowOf(event.target)));
    scroller.addEventListener("keydown", (event) => this.#onKey(event));
    scroller.addEventListener("focusout", () => this.#hideTooltip());
    this.#relayout();
  }

  /** @param {Record<string, string>} inks colours of the theme, see readInks */
  set inks(inks) {
    this.#inks = inks;
    this.#draw();
  }

  /** @param {{density?: "roomy"|"compact"|"dense", zoom?: string}} look zoom: "fit" or px a cell */
  setLook({ density = this.#density, zoom = this.#zoom }) {
    [this.#density, this.#zoom] = [density, zoom];
    this.#relayout();
  }

  /** Numbers of the pages in sight. @returns {number[]} */
  wantedPages() {
    const { first, last } = this.#inSight();
    const pages = [];
    for (let page = Math.floor(first / PAGE_ROWS); page <= Math.floor(Math.max(first, last - 1) / PAGE_ROWS); page += 1) pages.push(page);
    return pages;
  }

  get chunkTokens() {
    return this.#chunkTokens;
  }

  /** The conversation chosen in the map, as last heard of. */
  get chosen() {
    return this.row(this.#chosenId);
  }

  get chosenId() {
    return this.#chosenId;
  }

  /** @param {string|null} id @returns {object|undefined} */
  row(id) {
    return this.#rows.get(this.#indexOf.get(id));
  }

  /** Show one conversation as chosen, without moving the window. @param {string|null} id */
  choose(id) {
    if (id !== this.#chosenId) this.#cursorCell = null;
    this.#chosenId = id;
    this.#draw();
    this.dispatchEvent(new CustomEvent("choose", { detail: { row: this.chosen } }));
  }

  /** @param {{offset: number, answer: object}[]} pages answers of /v1/pensieve/map */
  setPages(pages) {
    for (const { offset, answer } of pages) {
      this.#total = answer.total;
      this.#chunkTokens = answer.chunk_tokens;
      for (let i = 0; i < PAGE_ROWS; i += 1) {
        const before = this.#rows.get(offset + i);
        if (before && this.#indexOf.get(before.id) === offset + i) this.#indexOf.delete(before.id);
        this.#rows.delete(offset + i);
      }
      answer.rows.forEach((row, i) => {
        const index = offset + i;
        const stale = this.#indexOf.get(row.id); // it has moved here from a page that was not asked for
        if (stale !== undefined && stale !== index) this.#rows.delete(stale);
        this.#rows.set(index, row);
        this.#indexOf.set(row.id, index);
      });
    }
    for (const [index, row] of this.#rows) {
      if (index < this.#total) continue;
      this.#rows.delete(index);
      if (this.#indexOf.get(row.id) === index) this.#indexOf.delete(row.id);
    }
    this.#empty.hidden = this.#total > 0;
    this.#scroller.setAttribute("aria-rowcount", String(this.#total));
    this.#measure();
    if (this.#wantedIndex !== null && this.#rows.has(this.#wantedIndex)) this.#moveTo(this.#wantedIndex);
    this.#draw();
    this.dispatchEvent(new CustomEvent("choose", { detail: { row: this.chosen } }));
  }

  // -- geometry

  #relayout() {
    const wide = this.#scroller.clientWidth >= WIDE_PX;
    const shapes = {
      roomy: wide ? { row: 26, label: 340, top: 5, strip: 15 } : { row: 43, label: MARGIN_PX, top: 22, strip: 15 },
      compact: { row: 17, label: wide ? 200 : 120, top: 2, strip: 12 },
      dense: { row: 6, label: MARGIN_PX, top: 0.5, strip: 5 },
    };
    this.#geometry = shapes[this.#density];
    this.#scroller.dataset.shape = this.#density === "roomy" && !wide ? "stacked" : this.#density;
    this.#scroller.style.setProperty("--label", `${this.#geometry.label}px`);
    this.#hideTooltip();
    this.#measure();
    this.#draw();
  }

  #measure() {
    const { row, label } = this.#geometry;
    this.#content.style.height = `${this.#total * row}px`;
    let width = 0;
    if (this.#zoom !== "fit") for (const { cells } of this.#rows.values()) width = Math.max(width, label + cells.length * Number(this.#zoom) + END_PX);
    this.#content.style.width = width > this.#scroller.clientWidth ? `${width}px` : "";
  }

  #cellWidth(cells) {
    if (this.#zoom !== "fit") return Number(this.#zoom);
    return Math.min(WIDEST_FIT_PX, (this.#scroller.clientWidth - this.#geometry.label - END_PX) / Math.max(1, cells.length));
  }

  #inSight(extraPx = 0) {
    const { row } = this.#geometry;
    const top = this.#scroller.scrollTop - extraPx;
    const first = Math.max(0, Math.floor(top / row));
    const last = Math.min(this.#total, Math.ceil((top + this.#scroller.clientHeight + 2 * extraPx) / row));
    return { first: Math.min(first, Math.max(0, this.#total - 1)), last };
  }

  // -- drawing

  #draw() {
    this.#frame ??= requestAnimationFrame(() => {
      this.#frame = null;
      this.#drawNow();
    });
  }

  #onScroll() {
    if (document.activeElement?.parentElement !== this.#content) this.#hideTooltip(); // the pointer now points at another row
    const { first, last } = this.#inSight();
    if (first < this.#drawn.first || last > this.#drawn.last || this.#scroller.scrollLeft !== this.#drawn.left) this.#draw();
    for (let index = first; index < last; index += 1) {
      if (this.#rows.has(index)) continue;
      this.dispatchEvent(new CustomEvent("need"));
      break;
    }
  }

  #drawNow() {
    const { first, last } = this.#inSight(OVERSCAN_PX);
    const { row: rowHeight, label, top, strip } = this.#geometry;
    const [width, left] = [this.#scroller.clientWidth, this.#scroller.scrollLeft];
    if (width === 0) return; // not shown
    this.#drawn = { first, last, left };
    const context = prepareCanvas(this.#canvas, width, (last - first) * rowHeight);
    this.#canvas.style.transform = `translate(${left}px, ${first * rowHeight}px)`;
    this.#canvas.dataset.rows = String(last - first);
    context.save();
    context.beginPath();
    context.rect(label, 0, width - label, (last - first) * rowHeight);
    context.clip();
    for (let index = first; index < last; index += 1) {
      const y = (index - first) * rowHeight + top;
      const row = this.#rows.get(index);
      if (row === undefined) {
        context.fillStyle = this.#inks.waiting;
        context.fillRect(label, y + strip / 3, 60, strip / 3);
      } else this.#drawRow(context, row, label - left, y, strip, width);
    }
    context.restore();
    this.#placeElements(first, last);
  }

  #drawRow(context, row, x, y, strip, width) {
    const cellWidth = this.#cellWidth(row.cells);
    const from = Math.max(0, Math.floor(-x / cellWidth));
    const to = Math.min(row.cells.length, Math.ceil((width - x) / cellWidth));
    drawStrip(context, this.#inks, row.cells, x, y, cellWidth, strip, from, to);
    if (row.pinned && strip >= 9) drawPinLine(context, this.#inks, x, y + strip + 1, row.cells.length * cellWidth - 1);
    if (row.id === this.#chosenId && this.#cursorCell !== null && this.#cursorCell < row.cells.length) {
      context.strokeStyle = this.#inks.cursor;
      context.lineWidth = 2;
      context.strokeRect(x + this.#cursorCell * cellWidth - 1.5, y - 1.5, Math.max(3, cellWidth - 1) + 3, strip + 3);
    }
  }

  /** Elements are kept by conversation, so that focus stays with it when rows change places. */
  #placeElements(first, last) {
    const kept = new Set();
    for (let index = first; index < last; index += 1) {
      const row = this.#rows.get(index);
      if (row === undefined) continue;
      kept.add(row.id);
      if (!this.#elements.has(row.id)) this.#elements.set(row.id, this.#makeElement(row.id));
      this.#fillElement(this.#elements.get(row.id), row, index);
    }
    this.#leaveDeleted();
    const focusedId = this.#content.contains(document.activeElement) ? document.activeElement.closest(".map-row")?.dataset.id : undefined;
    const tabStopId = kept.has(this.#chosenId) ? this.#chosenId : this.#rows.get(this.#inSight().first)?.id;
    for (const [id, { element }] of this.#elements) {
      if (kept.has(id) || id === focusedId) {
        element.setAttribute("aria-selected", String(id === this.#chosenId));
        element.tabIndex = id === tabStopId ? 0 : -1;
      } else {
        element.remove();
        this.#elements.delete(id);
      }
    }
  }

  /** Where the focused conversation is no more, focus goes to the row that took its place. */
  #leaveDeleted() {
    const element = document.activeElement;
    if (element?.parentElement !== this.#content || this.#indexOf.has(element.dataset.id)) return;
    const row = this.#rows.get(Math.min(Number(element.getAttribute("aria-rowindex")), this.#total) - 1);
    this.#elements.get(row?.id)?.element.focus({ preventScroll: true });
    if (document.activeElement === element) element.blur();
    this.choose(row?.id ?? null);
  }

  #makeElement(id) {
    const label = make("span", { className: "map-title" });
    const pin = make("span", { className: "pin" }, "pinned");
    const note = make("span", { className: "map-note" });
    const element = make("div", { className: "map-row", role: "row", "data-id": id }, make("div", { className: "map-label", role: "gridcell" }, label, pin, note));
    this.#content.append(element);
    return { element, label, pin, note };
  }

  #fillElement({ element, label, pin, note }, row, index) {
    element.style.top = `${index * this.#geometry.row}px`;
    element.style.height = `${this.#geometry.row}px`;
    element.setAttribute("aria-rowindex", String(index + 1));
    const title = titleText(row);
    setText(label, title);
    pin.hidden = !row.pinned;
    const state = row.active ? "active" : `${durationText(1000 * row.idle_s)} ago`;
    setText(note, `${plural(row.cells.length, "chunk")} · ${state}`);
    const summary = `${title}: ${cellsSummary(row.cells)}${row.pinned ? ", pinned" : ""}${row.active ? ", active" : ""}`;
    if (element.getAttribute("aria-label") !== summary) element.setAttribute("aria-label", summary);
    element.classList.toggle("active", row.active);
  }

  // -- pointing

  #rowOf(target) {
    const element = target instanceof Element ? target.closest(".map-row") : null;
    return element ? this.row(element.dataset.id) : undefined;
  }

  #onClick(event) {
    const row = this.#rowOf(event.target);
    if (row === undefined) return;
    this.#elements.get(row.id)?.element.focus({ preventScroll: true });
    this.choose(row.id);
  }

  #onHover(event) {
    const row = this.#rowOf(event.target);
    if (row === undefined) return this.#hideTooltip();
    const x = event.clientX - this.#scroller.getBoundingClientRect().left + this.#scroller.scrollLeft - this.#geometry.label;
    const cell = Math.floor(x / this.#cellWidth(row.cells));
    const onStrip = x >= 0 && cell < row.cells.length;
    return this.#showTooltip(onStrip ? `${titleText(row)}\n${cellWords(row, cell, this.#chunkTokens)}` : `${titleText(row)}\n${cellsSummary(row.cells)}`, event.clientX, event.clientY);
  }

  #showTooltip(text, x, y) {
    setText(this.#tooltip, text);
    this.#tooltip.hidden = false;
    const { offsetWidth: width, offsetHeight: height } = this.#tooltip;
    const left = Math.max(4, Math.min(x + 12, window.innerWidth - width - 4));
    const top = y + 16 + height > window.innerHeight ? y - height - 10 : y + 16;
    this.#tooltip.style.transform = `translate(${left}px, ${top}px)`;
  }

  #hideTooltip() {
    this.#tooltip.hidden = true;
  }

  // -- keys

  #onKey(event) {
    if (event.ctrlKey && !["Home", "End"].includes(event.key)) return;
    if (event.altKey || event.metaKey) return;
    const row = this.#rowOf(event.target);
    const index = row === undefined ? 0 : this.#indexOf.get(row.id);
    const page = Math.max(1, Math.floor(this.#scroller.clientHeight / this.#geometry.row) - 1);
    const rowMoves = { ArrowDown: index + 1, ArrowUp: index - 1, PageDown: index + page, PageUp: index - page };
    if (event.ctrlKey) Object.assign(rowMoves, { Home: 0, End: this.#total - 1 });
    const at = this.#cursorCell;
    const lastCell = (row?.cells.length ?? 0) - 1;
    const cellMoves = { ArrowRight: at === null ? 0 : at + 1, ArrowLeft: at === null ? lastCell : at - 1, Home: 0, End: lastCell };
    if (event.key in rowMoves) this.#moveTo(rowMoves[event.key]);
    else if (event.key in cellMoves) this.#pointAt(row, cellMoves[event.key]);
    else if (!this.#act(event.key, row)) return;
    event.preventDefault();
  }

  #act(key, row) {
    if (row === undefined) return false;
    this.choose(row.id);
    return !this.dispatchEvent(new CustomEvent("act", { detail: { key, row }, cancelable: true })); // taken = default prevented
  }

  #moveTo(wanted) {
    const index = Math.max(0, Math.min(this.#total - 1, wanted));
    const { row: rowHeight } = this.#geometry;
    const { scrollTop, clientHeight } = this.#scroller;
    if (index * rowHeight < scrollTop) this.#scroller.scrollTop = index * rowHeight;
    else if ((index + 1) * rowHeight > scrollTop + clientHeight) this.#scroller.scrollTop = (index + 1) * rowHeight - clientHeight;
    const row = this.#rows.get(index);
    this.#wantedIndex = row === undefined ? index : null;
    if (row === undefined) {
      this.dispatchEvent(new CustomEvent("need"));
      return;
    }
    this.choose(row.id);
    this.#drawNow(); // its element must be there to be focused
    this.#elements.get(row.id)?.element.focus({ preventScroll: true });
  }

  #pointAt(row, cell) {
    if (row === undefined || row.cells.length === 0) return;
    this.#cursorCell = Math.max(0, Math.min(row.cells.length - 1, cell));
    this.choose(row.id);
    const { label, top } = this.#geometry;
    const width = this.#cellWidth(row.cells);
    const x = this.#cursorCell * width;
    const room = this.#scroller.clientWidth - label;
    if (x < this.#scroller.scrollLeft) this.#scroller.scrollLeft = x;
    else if (x + width > this.#scroller.scrollLeft + room) this.#scroller.scrollLeft = x + width - room + END_PX;
    const words = cellWords(row, this.#cursorCell, this.#chunkTokens);
    const box = this.#elements.get(row.id)?.element.getBoundingClientRect();
    const left = this.#scroller.getBoundingClientRect().left + label + x - this.#scroller.scrollLeft;
    if (box) this.#showTooltip(`${titleText(row)}\n${words}`, left, box.top + top);
    setText(this.#words, words);
  }
}
