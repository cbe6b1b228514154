/** A turn's receipt: where its tokens came from, how long it took, and why what was missing was missing. */

import { make } from "./dom.js";
import { countText, durationText, shareText } from "./format.js";

/** The sources of prompt tokens, from the cheapest to the dearest. */
export const SOURCES = [
  { name: "gpu", field: "gpu_tokens", words: "found on the gpu" },
  { name: "cpu", field: "cpu_tokens", words: "swapped in from a lower tier" },
  { name: "recomputed", field: "recomputed_tokens", words: "of the history, computed again" },
  { name: "new", field: "new_tokens", words: "new in this turn" },
];

const USUAL = new Set(["new", "unfinished"]); // part of every turn: told only to those who ask

/** A thin stacked bar. @param {{name: string, value: number, words: string}[]} parts */
export function stackedBar(parts, label) {
  const bar = make("div", { className: "stack", role: "img", "aria-label": label });
  for (const { name, value, words } of parts) {
    if (value <= 0) continue;
    const part = make("span", { className: `part source-${name}`, title: `${countText(value)} ${words}` });
    part.style.flexGrow = String(value);
    bar.append(part);
  }
  return bar;
}

/**
 * @param {object} receipt the "pensieve" object of a response
 * @param {{outputTokens?: number, nowS: number, titleOf: (id: string) => string|null}} more nowS: server's clock, epoch seconds
 */
export function receiptView(receipt, { outputTokens, nowS, titleOf }) {
  const parts = SOURCES.map(({ name, field, words }) => ({ name, words, value: receipt[field] ?? 0 }));
  const total = parts.reduce((sum, part) => sum + part.value, 0);
  const label = `${total} prompt tokens: ${parts.map(({ name, value }) => `${value} ${name}`).join(", ")}`;
  const view = make("div", { className: "receipt" });
  if (total > 0) view.append(stackedBar(parts, label));

  const numbers = make("p", { className: "numbers" });
  for (const { name, value, words } of parts) {
    if (value === 0) continue;
    const title = `${countText(value)} tokens ${words} (${shareText(value / total)})`;
    numbers.append(make("span", { title }, make("i", { className: `swatch source-${name}`, "aria-hidden": "true" }), `${countText(value)} ${name}`));
  }
  if (receipt.first_token_ms != null) numbers.append(make("span", {}, `first token ${durationText(receipt.first_token_ms)}`));
  if (receipt.total_ms != null) numbers.append(make("span", {}, `total ${durationText(receipt.total_ms)}`));
  if (receipt.queue_ms >= 10) numbers.append(make("span", {}, `queued ${durationText(receipt.queue_ms)}`));
  if (outputTokens) numbers.append(make("span", {}, `${countText(outputTokens)} out`));
  view.append(numbers);

  if (receipt.warning) view.append(make("p", { className: "warning" }, receipt.warning));
  const misses = receipt.misses ?? [];
  const told = misses.filter(({ why }) => !USUAL.has(why)).slice(0, 3);
  if (told.length) view.append(reasons(told, nowS, titleOf));
  if (misses.length > told.length) {
    const summary = make("summary", {}, told.length ? `all ${misses.length} reasons` : "what had to be computed, and why");
    view.append(make("details", {}, summary, reasons(misses, nowS, titleOf)));
  }
  return view;
}

function reasons(misses, nowS, titleOf) {
  return make("ul", { className: "reasons" }, ...misses.map((miss) => make("li", {}, missWords(miss, nowS, titleOf))));
}

/** Why a token range was not on the gpu, in plain words. */
export function missWords({ start, stop, why, at, by }, nowS, titleOf) {
  const one = stop - start === 1;
  const range = one ? `token ${start}` : `tokens ${start}–${stop}`;
  const were = one ? "was" : "were";
  switch (why) {
    case "new":
      return `${range} ${one ? "is" : "are"} new: computed for the first time`;
    case "unfinished":
      return `${range} ended the last turn unfinished and had no cache entry yet: computed now`;
    case "on_cpu":
      return `${range} had moved to a lower tier: swapped in`;
    case "dropped":
      return `${range} ${were} dropped${at == null ? "" : ` ${agoWords(nowS - at)}`} to make room${by ? ` for ${titleOf(by) ?? by}` : ""}: computed again`;
    case "failed":
      return `${range} could not be used, because a copy or a computation failed: computed again`;
    case "never_seen":
      return `${range} left no trace in the cache (the engine may have restarted): computed again`;
    case "other_namespace":
      return `${range} ${one ? "is" : "are"} cached under another salt of this key, which is never shared: computed again`;
    case "template_changed":
      return `the chat template now writes ${range} differently: computed again`;
    default:
      return `${range}: ${String(why).replaceAll("_", " ")}`;
  }
}

function agoWords(seconds) {
  return seconds < 1 ? "just now" : `${durationText(1000 * seconds)} ago`;
}
