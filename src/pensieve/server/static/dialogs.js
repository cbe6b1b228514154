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

function ask(dialog, answer) {
  return new Promise((resolve) => {
    dialog.returnValue = "cancel";
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "ok" ? answer() : null), { once: true });
    dialog.showModal();
  });
}
