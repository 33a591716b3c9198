// Puts the page together: header, views, key, colours; the chat and the live system.

import { key } from "./api.js";
import { Chat } from "./chat.js";
import { byId, setText } from "./dom.js";
import { ByteTable, FigureTiles } from "./figures.js";
import { bytesPerSecond } from "./format.js";
import { HeatMap } from "./heat_map.js";
import { History, LiveStream } from "./live.js";
import { PredictorPanel } from "./predictor.js";
import { RequestTable } from "./requests.js";

const THEME = "promoe.theme";
const THEMES = { auto: ["Auto", "as the system has them"], light: ["Light", "light"], dark: ["Dark", "dark"] };

const history = new History();
const tiles = new FigureTiles();
const byteTable = new ByteTable();
const heatMap = new HeatMap();
const requests = new RequestTable();
const predictor = new PredictorPanel();
const chat = new Chat(() => askForKey("This node wants an API key."));
const stream = new LiveStream(showLook, showState);

function showLook(look) {
  history.add(look);
  chat.model = look.node.model;
  showNode(look);
  tiles.show(history);
  byteTable.show(history);
  heatMap.show(look.map);
  requests.show(look.requests, look.node);
  predictor.show(look.predictor);
}

function showNode({ node, store }) {
  setText(byId("model"), node.model);
  const link = node.emulated_link_bytes_per_s ? ` · emulated link ${bytesPerSecond(node.emulated_link_bytes_per_s)}` : "";
  setText(byId("device"), `${node.device}${link} · policy ${node.policy} · cache rate ${node.cache_rate.toPrecision(2)}`);
  const troubles = [node.refusal, store.state === "frozen" ? "The expert store is away; the experts that are mapped are served on." : null];
  const note = troubles.filter(Boolean).join(" ");
  byId("system-note").hidden = note === "";
  setText(byId("system-note"), note);
}

function showState(state, trouble) {
  if (state !== "live") predictor.lost();
  if (state === "hidden") return;
  const [kind, text] = { live: ["good", "live"], away: ["bad", "node away"], key: ["warn", "key needed"] }[state];
  byId("node-state").dataset.state = kind;
  setText(byId("node-state-text"), text);
  if (state !== "live") {
    byId("system-note").hidden = false;
    setText(byId("system-note"), state === "key" ? "The live view needs an API key." : `The node is away, and is looked for again. ${trouble}`);
  }
  if (state === "key" && !byId("key-dialog").open) askForKey("This node wants an API key.");
}

// ---- the key

function askForKey(note) {
  setText(byId("key-note"), `${note} It is kept in this tab until that is closed, and sent to this node only.`);
  byId("key-button").hidden = false;
  byId("key").value = key.get();
  if (!byId("key-dialog").open) byId("key-dialog").showModal();
}

byId("key-button").hidden = key.get() === "";
byId("key-button").addEventListener("click", () => askForKey("Needed where the node was started with keys."));
byId("key-cancel").addEventListener("click", () => byId("key-dialog").close());
byId("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key.set(byId("key").value.trim());
  byId("key-dialog").close();
  stream.retry();
});

// ---- colours

const WANTS_DARK = "(prefers-color-scheme: dark)";

function applyTheme() {
  const asked = localStorage.getItem(THEME) ?? "auto";
  byId("dark").media = { light: "not all", dark: "all" }[asked] ?? WANTS_DARK;
  const [label, phrase] = THEMES[asked] ?? THEMES.auto;
  setText(byId("theme-button"), `◐ ${label}`);
  byId("theme-button").setAttribute("aria-label", `Colours: ${phrase}`);
  heatMap.draw();
}

byId("theme-button").addEventListener("click", () => {
  const names = Object.keys(THEMES);
  const next = names[(names.indexOf(localStorage.getItem(THEME) ?? "auto") + 1) % names.length];
  localStorage.setItem(THEME, next);
  applyTheme();
});
window.matchMedia(WANTS_DARK).addEventListener("change", applyTheme);
applyTheme();

// ---- views, where there is room for one of the two

for (const button of document.querySelectorAll(".views button")) {
  button.addEventListener("click", () => {
    document.body.dataset.view = button.dataset.view;
    for (const other of document.querySelectorAll(".views button")) other.setAttribute("aria-pressed", String(other === button));
    heatMap.draw();
  });
}
