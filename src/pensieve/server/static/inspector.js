/** One conversation of the map, large: every chunk lettered, in lines. Knows nothing of the other rows. */

import { make, setText } from "./dom.js";
import { countText, durationText, titleText } from "./format.js";
import { cellsSummary, cellWords, drawPinLine, drawStrip, prepareCanvas } from "./places.js";

const [CELL_PX, LINE_PX, STRIP_PX] = [13, 20, 15];

export class Inspector {
  #root;
  #title = make("h3", {});
  #facts = make("p", { className: "note" });
  #summary = make("p", { className: "note" });
  #canvas = make("canvas", { "aria-hidden": "true" });
  #box = make("div", { className: "inspector-cells" }, this.#canvas);
  #bar;
  #inks;
  #chunkTokens = 32;
  #row = null;

  /** @param {HTMLElement} root @param {import("./actions.js").ActionBar} bar */
  constructor(root, bar, inks) {
    this.#root = root;
    this.#bar = bar;
    this.#inks = inks;
    root.append(make("div", { className: "inspector-head" }, this.#title, this.#facts), this.#box, this.#summary, bar.element);
    new ResizeObserver(() => this.#draw()).observe(this.#box);
    this.#canvas.addEventListener("pointermove", (event) => {
      const index = Math.floor(event.offsetY / LINE_PX) * this.#perLine() + Math.floor(event.offsetX / CELL_PX);
      this.#canvas.title = this.#row && index < this.#row.cells.length ? cellWords(this.#row, index, this.#chunkTokens) : "";
    });
  }

  set inks(inks) {
    this.#inks = inks;
    this.#draw();
  }

  /** @param {object|null} row of the map, or what the list says of a conversation that is not in the map */
  show(row, chunkTokens) {
    this.#row = row;
    this.#chunkTokens = chunkTokens;
    this.#root.hidden = row === null;
    this.#bar.show(row);
    if (row === null) return;
    setText(this.#title, titleText(row));
    const facts = [];
    if (row.tokens !== undefined) facts.push(`${countText(row.tokens)} tokens`);
    if (row.active) facts.push("active now");
    else if (row.idle_s !== undefined) facts.push(`idle ${durationText(1000 * row.idle_s)}`);
    if (row.pinned) facts.push("pinned");
    if (row.resume_ms > 0) facts.push(`back on the gpu in about ${durationText(row.resume_ms)}`);
    setText(this.#facts, facts.join(" · "));
    setText(this.#summary, row.cells.length ? cellsSummary(row.cells) : "nothing cached");
    this.#draw();
  }

  #perLine() {
    return Math.max(1, Math.floor(this.#box.clientWidth / CELL_PX));
  }

  #draw() {
    const row = this.#row;
    if (row === null || this.#box.clientWidth === 0) return;
    const perLine = this.#perLine();
    const lines = Math.ceil(row.cells.length / perLine);
    this.#box.hidden = lines === 0;
    const context = prepareCanvas(this.#canvas, perLine * CELL_PX, Math.max(1, lines * LINE_PX));
    for (let line = 0; line < lines; line += 1) {
      const cells = row.cells.slice(line * perLine, (line + 1) * perLine);
      drawStrip(context, this.#inks, cells, 0, line * LINE_PX, CELL_PX, STRIP_PX);
      if (row.pinned) drawPinLine(context, this.#inks, 0, line * LINE_PX + STRIP_PX + 1, cells.length * CELL_PX - 1);
    }
  }
}
