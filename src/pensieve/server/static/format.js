/** Numbers in words. Knows nothing of the page. */

const BYTE_UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

/** @param {number} bytes */
export function bytesText(bytes) {
  let unit = 0;
  let value = bytes;
  while (value >= 1024 && unit < BYTE_UNITS.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${unit === 0 || value >= 100 ? Math.round(value) : value.toFixed(1)} ${BYTE_UNITS[unit]}`;
}

/** @param {number} ms */
export function durationText(ms) {
  if (ms < 1000) return `${Math.round(ms)} ms`;
  const seconds = ms / 1000;
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 100) return `${Math.round(seconds)} s`;
  if (seconds < 6000) return `${Math.round(seconds / 60)} min`;
  if (seconds < 172800) return `${Math.round(seconds / 3600)} h`;
  return `${Math.round(seconds / 86400)} days`;
}

/** @param {number} count */
export function countText(count) {
  if (count < 10000) return count.toLocaleString("en");
  if (count < 1e6) return `${(count / 1e3).toFixed(count < 1e5 ? 1 : 0)}k`;
  return `${(count / 1e6).toFixed(1)}M`;
}

/** @param {number} share of 1 */
export function shareText(share) {
  return `${(100 * share).toFixed(share > 0 && share < 0.1 ? 1 : 0)} %`;
}

/** "1 chunk", "2 chunks". @param {number} count @param {string} noun */
export function plural(count, noun) {
  return `${countText(count)} ${noun}${count === 1 ? "" : "s"}`;
}

/** @param {{title?: string|null, id: string}} conversation */
export function titleText({ title, id }) {
  return title || `untitled (${id})`;
}

/** A value kept across visits where the browser lets us; else only until reload. */
export function remember(name, value) {
  try {
    localStorage.setItem(`pensieve.${name}`, value);
  } catch {
    // storage is blocked: the choice lasts until reload
  }
}

/** @returns {string|null} what `remember` kept */
export function recall(name) {
  try {
    return localStorage.getItem(`pensieve.${name}`);
  } catch {
    return null;
  }
}
