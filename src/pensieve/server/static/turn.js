/** One turn over the wire: a message goes out, an answer streams in. Knows nothing of the page. */

import { ApiError, serverEvents } from "./api.js";

const MAX_TRIES = 6; // at a busy server
const DEFAULT_RETRY_S = 2;
const LONGEST_RETRY_S = 60;

/**
 * @param {import("./api.js").Api} api
 * @param {object} request the body of POST /v1/responses
 * @param {{signal: AbortSignal, onDelta: (text: string) => void, onWait: (words: string|null) => void}} hooks
 *   onWait: the server is busy; null when waiting is over
 * @returns {Promise<{receipt: object|null, outputTokens: number|undefined, cutShort: boolean}>} cutShort: it ended at a limit
 * @throws {ApiError} or an AbortError
 */
export async function streamTurn(api, request, { signal, onDelta, onWait }) {
  const response = await patiently(() => api.fetch("POST", "v1/responses", { body: { ...request, stream: true }, signal }), { signal, onWait });
  try {
    for await (const { event, data } of serverEvents(response)) {
      if (event === "response.output_text.delta") onDelta(data.delta);
      else if (event === "response.completed" || event === "response.incomplete") {
        const { pensieve, usage } = data.response;
        return { receipt: pensieve ?? null, outputTokens: usage?.output_tokens, cutShort: event === "response.incomplete" };
      } else if (event === "response.failed" || event === "error") {
        const detail = data.response?.error ?? data.error ?? data;
        throw new ApiError(response.status, detail.message || "the answer failed", { code: detail.code });
      }
    }
  } catch (error) {
    if (error instanceof ApiError || signal.aborted) throw error;
  }
  signal.throwIfAborted();
  throw new ApiError(0, "the connection broke before the answer was complete");
}

/** Try again while the server says it is busy, counting the seconds aloud. */
export async function patiently(call, { signal, onWait }) {
  for (let tries = 1; ; tries += 1) {
    try {
      return await call();
    } catch (error) {
      if (error.status !== 429 || tries === MAX_TRIES) throw error;
      const waitS = Math.min(LONGEST_RETRY_S, Math.max(1, Math.ceil(error.retryAfterS ?? DEFAULT_RETRY_S * tries)));
      for (let left = waitS; left > 0; left -= 1) {
        onWait(`busy, trying again in ${left} s`);
        await pause(1000, signal);
      }
      onWait(null);
    }
  }
}

function pause(ms, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(done, ms);
    signal.addEventListener("abort", done, { once: true });
    function done() {
      clearTimeout(timer);
      signal.removeEventListener("abort", done);
      if (signal.aborted) reject(signal.reason);
      else resolve();
    }
  });
}
