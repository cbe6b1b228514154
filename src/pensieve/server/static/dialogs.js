/** The two questions this page asks. Knows nothing of what is done with the answers. */

import { byId } from "./dom.js";

/** Ask for an API key. @param {boolean} refused the last one was not accepted @returns {Promise<string|null>} */
export function askForKey(refused) {
  const dialog = byId("key-dialog");
  const field = byId("key");
  byId("key-reason").textContent = refused ? "The server did not accept this key. Try another one." : "This server asks for an API key.";
  field.value = "";
  byId("key-cancel").onclick = () => dialog.close("cancel");
  return ask(dialog, () => field.value.trim() || null);
}

/** @param {string} title @param {string} words what will be gone @returns {Promise<boolean>} */
export async function askToDelete(title, words) {
  byId("delete-title").textContent = `Delete “${title}”?`;
  byId("delete-words").textContent = words;
  return (await ask(byId("delete-dialog"), () => true)) ?? false;
}

/** dialog -> settles the question it shows */
const asked = new WeakMap();

/** A dialog tells of its closing a moment later, when it may show the next question already: that answer is not for this one, nor this one's for that. */
function ask(dialog, answer) {
  asked.get(dialog)?.(null);
  return new Promise((resolve) => {
    const settle = (value) => {
      dialog.removeEventListener("close", closed);
      asked.delete(dialog);
      resolve(value);
    };
    const closed = () => {
      if (!dialog.open) settle(dialog.returnValue === "ok" ? answer() : null);
    };
    asked.set(dialog, settle);
    dialog.returnValue = "cancel";
    dialog.addEventListener("close", closed);
    dialog.showModal();
  });
}
