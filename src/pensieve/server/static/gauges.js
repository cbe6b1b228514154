/** Gauges of the tiers, hit rates and traffic, from one map answer after another. Knows nothing of conversations. */

import { make, setText } from "./dom.js";
import { bytesText, countText, plural, shareText } from "./format.js";
import { prepareCanvas } from "./places.js";
import { SOURCES } from "./receipt.js";

const SAMPLES = 60; // of the traffic lines: about a minute

export class Gauges {
  #root;
  #tiers = new Map();
  #tierBox = make("div", { className: "tier-gauges" });
  #hit;
  #traffic = [];
  #line = make("canvas", { className: "traffic-line", role: "img", "aria-label": "Swap traffic of the last minute" });
  #numbers = {};
  #last = null; // {nowS, stats} of the answer before

  /** @param {HTMLElement} root */
  constructor(root) {
    this.#root = root;
    this.#hit = { bar: make("div", { className: "stack", role: "img" }), words: make("p", { className: "numbers" }), parts: new Map() };
    for (const { name, words } of SOURCES) {
      const part = make("span", { className: `part source-${name}` });
      const text = make("span", {});
      this.#hit.bar.append(part);
      this.#hit.words.append(make("span", { title: `share of prompt tokens ${words}` }, make("i", { className: `swatch source-${name}`, "aria-hidden": "true" }), text));
      this.#hit.parts.set(name, { part, text });
    }
    root.append(
      this.#tierBox,
      make("div", { className: "gauge hits" }, make("h3", { title: "where prompt tokens came from, since the engine started" }, "Prompt tokens"), this.#hit.bar, this.#hit.words),
      make("div", { className: "gauge" }, make("h3", {}, "Swap traffic"), this.#line,
        make("p", { className: "numbers" }, this.#number("in", "source-in"), this.#number("out", "source-out"))),
      make("div", { className: "gauge" },
        make("h3", {}, "Queue"), make("p", { className: "numbers" }, this.#number("running"), this.#number("waiting")),
        make("h3", {}, "Evictions"), make("p", { className: "numbers" }, this.#number("reclaimed"), this.#number("dropped"))),
    );
  }

  #number(name, swatch) {
    const value = make("b", {}, "–");
    this.#numbers[name] = value;
    const before = swatch ? [make("i", { className: `swatch ${swatch}`, "aria-hidden": "true" })] : [];
    return make("span", { "data-gauge": name }, ...before, value, ` ${name}`);
  }

  /** @param {{now: number, tiers: object[], stats: object}} answer of /v1/pensieve/map */
  show(answer) {
    const { now: nowS, tiers, stats } = answer;
    for (const tier of tiers) this.#showTier(tier);
    this.#showHits(stats.hit_rates ?? {});
    this.#showTraffic(nowS, stats);
    setText(this.#numbers.running, countText(stats.running ?? 0));
    setText(this.#numbers.waiting, countText(stats.waiting ?? 0));
    setText(this.#numbers.reclaimed, countText(stats.chunks_reclaimed ?? 0));
    setText(this.#numbers.dropped, countText(stats.chunks_dropped ?? 0));
    this.#root.dataset.shown = "yes";
  }

  #showTier({ name, num_slots: slots, used, reclaimable, free }) {
    let gauge = this.#tiers.get(name);
    if (gauge === undefined) {
      const bar = make("div", { className: `meter tier-${name}`, role: "meter", "aria-label": `${name} tier`, "aria-valuemin": "0" });
      const [held, clean] = [make("span", { className: "held" }), make("span", { className: "clean" })];
      bar.append(held, clean);
      gauge = { bar, held, clean, fill: make("span", { className: "fill", title: "chunks used / room for" }), cleanWords: make("span"), freeWords: make("span") };
      this.#tiers.set(name, gauge);
      this.#tierBox.append(make("div", { className: "gauge tier" }, make("h3", {}, name, gauge.fill), bar, make("p", { className: "numbers" }, gauge.cleanWords, gauge.freeWords)));
    }
    const percent = (count) => `${slots ? (100 * count) / slots : 0}%`;
    gauge.held.style.width = percent(used - reclaimable);
    gauge.clean.style.width = percent(reclaimable);
    const words = `${countText(used)} of ${plural(slots, "chunk")} used, ${countText(reclaimable)} reclaimable, ${countText(free)} free`;
    gauge.bar.setAttribute("aria-valuenow", String(used));
    gauge.bar.setAttribute("aria-valuemax", String(slots));
    gauge.bar.setAttribute("aria-valuetext", words);
    setText(gauge.fill, `${countText(used)} / ${countText(slots)}`);
    setText(gauge.cleanWords, `${countText(reclaimable)} reclaimable`);
    setText(gauge.freeWords, `${countText(free)} free`);
    gauge.bar.title = words;
  }

  #showHits(rates) {
    const words = [];
    for (const [name, { part, text }] of this.#hit.parts) {
      const share = rates[name] ?? 0;
      part.style.flexGrow = String(share);
      part.hidden = share <= 0;
      setText(text, `${shareText(share)} ${name}`);
      words.push(`${shareText(share)} ${name}`);
    }
    this.#hit.bar.setAttribute("aria-label", `Prompt tokens by source: ${words.join(", ")}`);
  }

  #showTraffic(nowS, stats) {
    const last = this.#last;
    if (last !== null && nowS <= last.nowS) return; // two pages of one poll
    if (last !== null) {
      const rate = (field) => Math.max(0, (stats[field] ?? 0) - (last.stats[field] ?? 0)) / (nowS - last.nowS); // a restarted engine counts from 0
      this.#traffic.push({ in: rate("bytes_in"), out: rate("bytes_out") });
      if (this.#traffic.length > SAMPLES) this.#traffic.shift();
      const newest = this.#traffic.at(-1);
      setText(this.#numbers.in, `${bytesText(newest.in)}/s`);
      setText(this.#numbers.out, `${bytesText(newest.out)}/s`);
      this.#drawTraffic();
    }
    this.#last = { nowS, stats };
  }

  #drawTraffic() {
    const [width, height] = [this.#line.clientWidth, 22];
    if (width === 0) return;
    const context = prepareCanvas(this.#line, width, height);
    this.#line.style.width = ""; // the stylesheet's, so that it shrinks again
    const highest = Math.max(1, ...this.#traffic.flatMap((sample) => [sample.in, sample.out]));
    for (const [name, dash] of [["in", []], ["out", [3, 2]]]) {
      context.strokeStyle = getComputedStyle(this.#root.querySelector(`.swatch.source-${name}`)).backgroundColor;
      context.setLineDash(dash);
      context.lineWidth = 1.5;
      context.beginPath();
      this.#traffic.forEach((sample, i) => {
        const x = width - (this.#traffic.length - 1 - i) * (width / (SAMPLES - 1));
        context.lineTo(x, height - 1.5 - (height - 3) * (sample[name] / highest));
      });
      context.stroke();
    }
  }
}
