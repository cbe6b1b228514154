/** Chooses and wires: which part hears of what. Each part knows its own business only. */

import { ActionBar, Actions, VERB_OF_KEY } from "./actions.js";
import { Api } from "./api.js";
import { Chat } from "./chat.js";
import { askForKey } from "./dialogs.js";
import { byId, make, setText } from "./dom.js";
import { plural, recall, remember } from "./format.js";
import { Gauges } from "./gauges.js";
import { Inspector } from "./inspector.js";
import { ConversationList } from "./list.js";
import { TierMap } from "./map.js";
import { drawLegend, isAllOnGpu, readInks } from "./places.js";
import { Poller } from "./poll.js";

const LIST_EVERY_MS = 15000;
const VIEWS = ["list", "chat", "map"];
const THEMES = { system: "◐ Auto", light: "○ Light", dark: "● Dark" };

const api = new Api(askForKey);
const list = new ConversationList(api, { list: byId("conversations"), note: byId("list-note"), more: byId("more") });
const gauges = new Gauges(byId("gauges"));
const map = new TierMap(
  {
    scroller: byId("map"), content: byId("map-content"), canvas: byId("map-canvas"),
    tooltip: byId("tooltip"), words: byId("cell-words"), empty: byId("map-empty"),
  },
  readInks(),
);
const actions = new Actions(api);
const mapBar = new ActionBar(actions, ["open", "warm", "idle", "pin", "fork", "delete"], { keys: true });
const chatBar = new ActionBar(actions, ["pin", "fork", "delete"]);
const inspector = new Inspector(byId("inspector"), mapBar, readInks());
let clockAheadS = 0; // the server's clock against this one

/** What is known of a conversation: the map's row is the freshest. */
const known = (id) => (id === null ? null : map.row(id) ?? list.get(id) ?? null);
const titleOf = (id) => known(id)?.title || null;

const chat = new Chat(
  api,
  {
    title: byId("chat-title"), log: byId("log"), form: byId("composer"), text: byId("composer-text"), send: byId("send"), stop: byId("stop"),
    temperature: byId("temperature"), maxTokens: byId("max-tokens"),
  },
  {
    titleOf,
    needsWarming: (id) => !isAllOnGpu(known(id)?.cells ?? "."), // nothing known: a hint does no harm
    serverNowS: () => Date.now() / 1000 + clockAheadS,
    model: () => (byId("model").disabled ? undefined : byId("model").value),
  },
);
const poller = new Poller(api, () => map.wantedPages());

// -- conversations

function openFromHash() {
  let id = null;
  try {
    id = decodeURIComponent(location.hash.slice(1)) || null;
  } catch {
    // not an id this page wrote: a new conversation
  }
  chat.open(id);
  list.select(id);
  map.choose(id);
  showOpen();
}

function showOpen() {
  chatBar.show(known(chat.openId));
  chat.refreshTitle();
  document.title = chat.openId === null ? "Pensieve" : `${byId("chat-title").textContent} · Pensieve`;
}

async function refreshList() {
  await list.refresh();
  showOpen();
}

function startNew() {
  history.pushState(null, "", location.pathname + location.search);
  showNew();
}

function showNew() {
  openFromHash();
  showView("chat");
  chat.focus();
}

byId("chat-actions").append(chatBar.element);
byId("new").addEventListener("click", startNew);
byId("skip").addEventListener("click", (event) => {
  event.preventDefault(); // the hash names the conversation
  showView("chat");
  chat.focus();
});
byId("conversations").addEventListener("click", (event) => {
  if (event.target instanceof Element && event.target.closest("a")) showView("chat");
});
window.addEventListener("hashchange", openFromHash);
chat.addEventListener("opened", ({ detail: { id } }) => {
  history.replaceState(null, "", `#${encodeURIComponent(id)}`);
  list.select(id);
  map.choose(id);
  refreshList();
});
chat.addEventListener("changed", () => {
  refreshList();
  poller.kick();
});

actions.addEventListener("done", ({ detail: { verb, id, answer } }) => {
  if (verb === "open") {
    showView("chat");
    chat.focus();
  } else if (verb === "fork") location.hash = encodeURIComponent(answer.id);
  else if (verb === "delete") {
    chat.forget(id);
    if (chat.openId === id) {
      history.replaceState(null, "", location.pathname + location.search); // nothing to come back to
      showNew();
    } else if (map.chosenId === id) map.choose(null);
  }
  if (verb === "pin" || verb === "unpin") {
    for (const row of [map.row(id), list.get(id)]) if (row) row.pinned = verb === "pin"; // the same key means the opposite from now on
    map.choose(map.chosenId);
    showOpen();
  }
  if (verb === "open") return;
  refreshList();
  poller.startOver();
});

// -- the map

map.addEventListener("choose", ({ detail: { row } }) => {
  inspector.show(row ?? listRow(map.chosenId), map.chunkTokens);
});
map.addEventListener("act", (event) => {
  const { key, row } = event.detail;
  const verb = VERB_OF_KEY.get(key.length === 1 ? key.toLowerCase() : key);
  if (verb === undefined) return;
  event.preventDefault();
  mapBar.show(row);
  mapBar.run(verb);
});
map.addEventListener("need", () => poller.kick());

function listRow(id) {
  const conversation = id === null ? undefined : list.get(id);
  return conversation ? { cells: "", ...conversation } : null;
}

poller.addEventListener("map", ({ detail: pages }) => {
  const { answer } = pages[0];
  clockAheadS = answer.now - Date.now() / 1000;
  gauges.show(answer);
  map.setPages(pages);
  setText(byId("map-total"), plural(answer.total, "conversation"));
  chatBar.show(known(chat.openId));
});
poller.addEventListener("state", ({ detail: { state, words } }) => {
  const status = byId("status");
  const was = status.dataset.state;
  status.dataset.state = state;
  setText(byId("status-text"), words);
  byId("enter-key").hidden = state !== "locked";
  if (state === "connected" && was !== "connected") {
    loadModels();
    refreshList();
  }
});
byId("enter-key").addEventListener("click", async () => {
  await api.call("GET", "v1/models").catch(() => {}); // asks for a key if one is needed
  poller.kick();
});

async function loadModels() {
  const select = byId("model");
  try {
    const { data } = await api.call("GET", "v1/models", { quiet: true });
    const chosen = select.disabled ? null : select.value;
    select.replaceChildren(...data.map(({ id }) => make("option", { value: id }, id)));
    if (chosen !== null && data.some(({ id }) => id === chosen)) select.value = chosen;
    select.disabled = data.length === 0;
  } catch {
    // the status line tells; the next connection tries again
  }
}

// -- looks

function showView(view) {
  document.body.dataset.view = view;
  for (const button of document.querySelectorAll("[data-view-button]")) {
    button.setAttribute("aria-pressed", String(button.dataset.viewButton === view));
  }
}

let theme = recall("theme") in THEMES ? recall("theme") : "system";

function showTheme() {
  if (theme === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  setText(byId("theme"), THEMES[theme]);
  byId("theme").setAttribute("aria-label", `Colours: ${theme}`);
  reink();
}

function reink() {
  const inks = readInks();
  map.inks = inks;
  inspector.inks = inks;
  drawLegend(byId("legend"), inks);
}

for (const button of document.querySelectorAll("[data-view-button]")) {
  button.addEventListener("click", () => {
    showView(button.dataset.viewButton);
    remember("view", button.dataset.viewButton);
  });
}
byId("theme").addEventListener("click", () => {
  const names = Object.keys(THEMES);
  theme = names[(names.indexOf(theme) + 1) % names.length];
  remember("theme", theme);
  showTheme();
});
for (const name of ["density", "zoom", "temperature", "max-tokens"]) {
  const field = byId(name);
  const usual = field.value;
  field.value = recall(name) ?? usual;
  if (field.value === "") field.value = usual; // kept by another version of this page
  field.addEventListener("change", () => {
    remember(name, field.value);
    map.setLook({ density: byId("density").value, zoom: byId("zoom").value });
  });
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", reink);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !document.querySelector("dialog[open]") && chat.stop()) event.preventDefault();
});

showView(VIEWS.includes(recall("view")) ? recall("view") : "chat");
showTheme();
map.setLook({ density: byId("density").value, zoom: byId("zoom").value });
openFromHash();
refreshList();
poller.kick();
setInterval(() => document.hidden || refreshList(), LIST_EVERY_MS);
