/**
 * The server's HTTP API: keys, errors in words, server-sent events. Knows no element of the page but asks for a key through a callback.
 * All addresses are relative, so the page also works below a path of a reverse proxy.
 */

const KEY_NAME = "pensieve.key";

/** An answer that is not the one asked for. `status` 0: no answer at all. */
export class ApiError extends Error {
  /** @param {number} status @param {string} message @param {{code?: string, retryAfterS?: number}} [more] */
  constructor(status, message, more = {}) {
    super(message);
    this.status = status;
    this.code = more.code ?? null;
    this.retryAfterS = more.retryAfterS ?? null;
  }
}

export class Api {
  #askForKey;
  #asking = null; // one question at a time, however many calls wait for the answer
  #declined = false;
  #memoryKey = null; // where sessionStorage is blocked

  /** @param {(refused: boolean) => Promise<string|null>} askForKey null: the user will not give one now */
  constructor(askForKey) {
    this.#askForKey = askForKey;
  }

  /**
   * @param {string} method
   * @param {string} path relative, as "v1/models"
   * @param {{body?: unknown, signal?: AbortSignal, quiet?: boolean}} [options] quiet: a background call, which does not ask for a key again
   *   once the user declined
   * @returns {Promise<Response>} with a status below 400
   */
  async fetch(method, path, { body, signal, quiet = false } = {}) {
    for (;;) {
      const key = this.#key();
      const headers = { Accept: "application/json, text/event-stream" };
      if (body !== undefined) headers["Content-Type"] = "application/json";
      if (key) headers.Authorization = `Bearer ${key}`;
      let response;
      try {
        response = await fetch(new URL(path, document.baseURI), {
          method, headers, signal, body: body === undefined ? undefined : JSON.stringify(body), cache: "no-store", credentials: "omit",
        });
      } catch (error) {
        if (signal?.aborted && signal.reason?.name !== "TimeoutError") throw error;
        throw new ApiError(0, "server unreachable");
      }
      if (response.status === 401) {
        if (this.#key() !== key) continue; // a new key came in meanwhile
        if (await this.#newKey(key !== null, quiet)) continue;
      }
      if (!response.ok) throw await errorOf(response);
      return response;
    }
  }

  /** `fetch`, and its JSON body. */
  async call(method, path, options = {}) {
    const response = await this.fetch(method, path, options);
    try {
      return await response.json();
    } catch (error) {
      if (options.signal?.aborted && options.signal.reason?.name !== "TimeoutError") throw error;
      throw new ApiError(response.status, "the server's answer broke off or was not JSON");
    }
  }

  /** Has the user said "not now" to the question for a key? */
  get declined() {
    return this.#declined;
  }

  async #newKey(refused, quiet) {
    if (quiet && this.#declined) return false;
    this.#asking ??= this.#askForKey(refused).finally(() => {
      this.#asking = null;
    });
    const key = await this.#asking;
    this.#declined = key === null;
    if (key === null) return false;
    this.#memoryKey = key;
    try {
      sessionStorage.setItem(KEY_NAME, key);
    } catch {
      // storage is blocked: the key lasts until reload
    }
    return true;
  }

  #key() {
    try {
      return this.#memoryKey ?? sessionStorage.getItem(KEY_NAME);
    } catch {
      return this.#memoryKey;
    }
  }
}

/** @param {string} id a conversation's @param {string} [verb] */
export function conversationPath(id, verb) {
  return `v1/pensieve/conversations/${encodeURIComponent(id)}${verb ? `/${verb}` : ""}`;
}

async function errorOf(response) {
  let detail = {};
  try {
    detail = (await response.json()).error ?? {};
  } catch {
    // a proxy's page, perhaps: the status has to do
  }
  const retryAfterS = Number.parseFloat(response.headers.get("Retry-After") ?? "");
  return new ApiError(response.status, detail.message || `the server answered ${response.status} ${response.statusText}`.trim(), {
    code: detail.code,
    retryAfterS: Number.isFinite(retryAfterS) ? retryAfterS : undefined,
  });
}

/**
 * The server-sent events of a response.
 * @param {Response} response
 * @returns {AsyncGenerator<{event: string, data: any}>}
 */
export async function* serverEvents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      rest = (rest + value).replaceAll("\r\n", "\n"); // a pair cut in two is put together with the next piece
      for (let end = rest.indexOf("\n\n"); end >= 0; end = rest.indexOf("\n\n")) {
        const parsed = parseEvent(rest.slice(0, end));
        rest = rest.slice(end + 2);
        if (parsed) yield parsed;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function parseEvent(block) {
  let event = "message";
  const data = [];
  for (const line of block.split("\n")) {
    if (line.startsWith("event:")) event = line.slice(6).trim();
    else if (line.startsWith("data:")) data.push(line.slice(5).replace(/^ /, ""));
  }
  const text = data.join("\n");
  if (text === "" || text === "[DONE]") return null;
  try {
    return { event, data: JSON.parse(text) };
  } catch {
    throw new ApiError(0, "the server sent an event that is not JSON");
  }
}
