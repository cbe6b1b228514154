/**
 * Building elements. Text goes in as text, always: nothing in this page parses HTML,
 * so what a model or another user wrote cannot become markup.
 */

/**
 * @param {string} tag
 * @param {Record<string, unknown>} [properties] element properties; names with a dash are set as attributes
 * @param {...(Node|string)} children
 */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role") element.setAttribute(name, String(value));
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

/** @param {string} id */
export function byId(id) {
  const element = document.getElementById(id);
  if (element === null) throw new Error(`no element #${id} in the page`);
  return element;
}

/** Write text only where it changed, so that live regions stay quiet. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

const TOAST_MS = 7000;
let toastTimer = null;

/** Say something in passing: seen for a few seconds, read aloud once. */
export function say(text) {
  const toast = byId("toast");
  setText(toast, text);
  toast.classList.add("shown");
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => toast.classList.remove("shown"), TOAST_MS);
}
