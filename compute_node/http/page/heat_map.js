// The expert cache as a picture: layers from top to bottom, experts from left to right. Nothing is told by colour alone:
// where cells are large enough they bear marks, the legend counts, and there is a table.

import { byId, make, setText } from "./dom.js";
import { count } from "./format.js";

const BIT = { resident: 1, loading: 2, hinted: 4, routed: 8, missed: 16 };

/** Rising urgency: of several experts in a cell the last one is shown. */
const ACTIVITIES = ["absent", "resident", "hinted", "hit", "loading", "missed"];
const MEANINGS = {
  absent: "not on the device",
  resident: "on the device",
  hinted: "the predictor expects it",
  hit: "was needed and there",
  loading: "on its way",
  missed: "was needed and not there",
};
const LEFT_PX = 30;
const ABOVE_PX = 4;
const BELOW_PX = 16;
const LEAST_CELL_PX = 2;
const MARKED_CELL_PX = 7;
const TABLE_EVERY_MS = 2000;

function activityOf(bits) {
  if (bits & BIT.missed) return 5;
  if (bits & BIT.loading) return 4;
  if (bits & BIT.routed) return 3;
  if (bits & BIT.hinted) return 2;
  return bits & BIT.resident ? 1 : 0;
}

const ACTIVITY_OF_BITS = Uint8Array.from({ length: 256 }, (_, bits) => activityOf(bits));

export class HeatMap {
  constructor() {
    this.canvas = byId("map");
    this.map = null;
    this.states = null;
    this.cursor = null;
    this.tableAt = 0;
    this.legend = new Map();
    for (const activity of ACTIVITIES) this.#addToLegend(activity);
    new ResizeObserver(() => this.draw()).observe(this.canvas.parentElement);
    this.canvas.addEventListener("pointermove", (event) => this.#point(event));
    this.canvas.addEventListener("pointerleave", () => this.#moveTo(null));
    this.canvas.addEventListener("blur", () => this.#moveTo(null));
    this.canvas.addEventListener("keydown", (event) => this.#key(event));
    byId("map-table-box").addEventListener("toggle", () => this.#showTable(true));
  }

  show(map) {
    const isSame = this.map !== null && this.map.states === map.states && this.map.experts === map.experts;
    this.map = map;
    setText(byId("map-note"), `${map.layers} layers × ${map.experts} experts · step ${count(map.step)}`);
    if (isSame) return;
    this.states = Uint8Array.from(atob(map.states), (character) => character.charCodeAt(0));
    this.draw();
    this.#count();
    this.#showTable(false);
    this.#tell();
  }

  /** Colours are the page's: called when the scheme changes, too. */
  draw() {
    for (const [activity, { sign }] of this.legend) this.#drawSign(sign, activity);
    if (this.states === null) return;
    const width = this.canvas.parentElement.clientWidth;
    const { layers, experts } = this.map;
    const grouped = Math.max(1, Math.ceil((experts * LEAST_CELL_PX) / (width - LEFT_PX)));
    const columns = Math.ceil(experts / grouped);
    const rowHeight = Math.max(LEAST_CELL_PX, Math.min(14, Math.floor(240 / layers)));
    const cellWidth = (width - LEFT_PX) / columns;
    this.shape = { grouped, columns, rowHeight, cellWidth };
    const context = this.#prepare(width, ABOVE_PX + layers * rowHeight + BELOW_PX);
    const palette = paletteOf(this.canvas);
    for (let layer = 0; layer < layers; layer += 1) {
      for (let column = 0; column < columns; column += 1) {
        const left = LEFT_PX + column * cellWidth;
        const box = [left, ABOVE_PX + layer * rowHeight, cellWidth, rowHeight];
        drawCell(context, palette, this.#cell(layer, column), box);
      }
    }
    this.#drawLabels(context, palette);
    if (this.cursor) this.#drawCursor(context, palette);
  }

  #prepare(width, height) {
    const scale = window.devicePixelRatio || 1;
    this.canvas.style.height = `${height}px`;
    this.canvas.width = Math.round(width * scale);
    this.canvas.height = Math.round(height * scale);
    const context = this.canvas.getContext("2d");
    context.scale(scale, scale);
    return context;
  }

  /** The most urgent thing that one of the cell's experts does, and whether one is resident. */
  #cell(layer, column) {
    const { grouped } = this.shape;
    const start = layer * this.map.experts + column * grouped;
    const end = Math.min(start + grouped, (layer + 1) * this.map.experts);
    let activity = 0;
    let bits = 0;
    for (let place = start; place < end; place += 1) {
      activity = Math.max(activity, ACTIVITY_OF_BITS[this.states[place]]);
      bits |= this.states[place];
    }
    return { activity: ACTIVITIES[activity], isResident: (bits & BIT.resident) !== 0 };
  }

  #drawLabels(context, palette) {
    const { rowHeight, cellWidth, grouped, columns } = this.shape;
    const { layers } = this.map;
    context.fillStyle = palette.muted;
    context.font = "11px system-ui, sans-serif";
    context.textBaseline = "middle";
    context.textAlign = "right";
    const everyRow = stepOf(layers, Math.ceil(14 / rowHeight));
    for (let layer = 0; layer < layers; layer += everyRow) {
      context.fillText(`L${layer}`, LEFT_PX - 6, ABOVE_PX + (layer + 0.5) * rowHeight);
    }
    context.textAlign = "center";
    const everyColumn = stepOf(columns, Math.ceil(34 / cellWidth));
    for (let column = 0; column < columns; column += everyColumn) {
      const left = LEFT_PX + (column + 0.5) * cellWidth;
      context.fillText(`E${column * grouped}`, left, ABOVE_PX + layers * rowHeight + BELOW_PX / 2 + 1);
    }
  }

  #drawCursor(context, palette) {
    const { rowHeight, cellWidth, grouped } = this.shape;
    const [layer, expert] = this.cursor;
    context.strokeStyle = palette.text;
    context.lineWidth = 2;
    const left = LEFT_PX + Math.floor(expert / grouped) * cellWidth;
    context.strokeRect(left, ABOVE_PX + layer * rowHeight, cellWidth, rowHeight);
  }

  #addToLegend(activity) {
    const sign = make("canvas", { "aria-hidden": "true" });
    const number = make("b", {}, "0");
    byId("legend").append(make("li", { title: MEANINGS[activity] }, sign, `${activity} `, number));
    this.legend.set(activity, { sign, number });
  }

  #drawSign(sign, activity) {
    const scale = window.devicePixelRatio || 1;
    sign.width = sign.height = Math.round(14 * scale);
    const context = sign.getContext("2d");
    context.scale(scale, scale);
    const isResident = ["hinted", "hit", "resident"].includes(activity);
    drawCell(context, paletteOf(this.canvas), { activity, isResident }, [0, 0, 14.5, 14.5]);
  }

  #count() {
    const with_ = (bit) => this.states.reduce((sum, bits) => sum + ((bits & bit) !== 0), 0);
    const missed = with_(BIT.missed);
    const resident = with_(BIT.resident);
    const counts = {
      absent: this.states.length - resident,
      resident,
      hinted: with_(BIT.hinted),
      hit: with_(BIT.routed) - missed,
      loading: with_(BIT.loading),
      missed,
    };
    for (const [activity, { number }] of this.legend) setText(number, count(counts[activity]));
    const { layers, experts } = this.map;
    const told = ACTIVITIES.map((activity) => `${counts[activity]} ${activity}`).join(", ");
    this.canvas.setAttribute("aria-label", `Heat map of ${layers} layers × ${experts} experts: ${told}.`);
  }

  #point(event) {
    if (this.states === null) return;
    const { rowHeight, cellWidth, grouped } = this.shape;
    const layer = Math.floor((event.offsetY - ABOVE_PX) / rowHeight);
    const expert = Math.floor((event.offsetX - LEFT_PX) / cellWidth) * grouped;
    const isInside = layer >= 0 && layer < this.map.layers && expert >= 0 && expert < this.map.experts;
    this.#moveTo(isInside ? [layer, expert] : null);
  }

  #key(event) {
    const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    const move = moves[event.key];
    if (!move || this.states === null) return;
    event.preventDefault();
    const [layer, expert] = this.cursor ?? [0, -move[1]];
    const within = (value, most) => Math.max(0, Math.min(most - 1, value));
    const toLayer = this.cursor ? within(layer + move[0], this.map.layers) : 0;
    this.#moveTo([toLayer, within(expert + move[1] * this.shape.grouped, this.map.experts)]);
  }

  #moveTo(cursor) {
    if (String(cursor) === String(this.cursor)) return;
    this.cursor = cursor;
    this.draw();
    this.#tell();
  }

  #tell() {
    const line = byId("cell");
    if (!this.cursor) {
      setText(line, "Point at a cell, or move with the arrow keys.");
      return;
    }
    const [layer, expert] = this.cursor;
    const { grouped } = this.shape;
    const last = Math.min(expert + grouped, this.map.experts) - 1;
    const place = grouped > 1 ? `L${layer} E${expert}–E${last}` : `L${layer}E${expert}`;
    const { activity, isResident } = this.#cell(layer, Math.floor(expert / grouped));
    const also = isResident && activity !== "resident" ? ", resident" : "";
    setText(line, `${place}: ${activity}${also} (${MEANINGS[activity]})`);
  }

  #showTable(isAsked) {
    if (!byId("map-table-box").open || this.states === null) return;
    if (!isAsked && performance.now() - this.tableAt < TABLE_EVERY_MS) return;
    this.tableAt = performance.now();
    const names = ["resident", "loading", "hinted", "hit", "missed"];
    const head = make("tr", {}, ...["Layer", ...names].map((name) => make("th", { scope: "col" }, name)));
    const rows = Array.from({ length: this.map.layers }, (_, layer) => {
      const states = this.states.subarray(layer * this.map.experts, (layer + 1) * this.map.experts);
      const counts = { resident: 0, loading: 0, hinted: 0, hit: 0, missed: 0 };
      for (const bits of states) {
        counts.resident += (bits & BIT.resident) !== 0;
        counts.loading += (bits & BIT.loading) !== 0;
        counts.hinted += (bits & BIT.hinted) !== 0;
        counts.missed += (bits & BIT.missed) !== 0;
        counts.hit += (bits & BIT.routed) !== 0 && (bits & BIT.missed) === 0;
      }
      return make("tr", {}, make("th", { scope: "row" }, `L${layer}`), ...names.map((name) => make("td", {}, `${counts[name]}`)));
    });
    byId("map-table").replaceChildren(make("thead", {}, head), make("tbody", {}, ...rows));
  }
}

function drawCell(context, palette, { activity, isResident }, [left, top, width, height]) {
  const gap = width >= 4 && height >= 4 ? 1 : 0;
  const [right, below] = [width - gap, height - gap];
  const isMarked = right >= MARKED_CELL_PX - 1 && below >= MARKED_CELL_PX - 1;
  const ground = isResident ? palette.resident : palette.absent;
  const isFilled = activity === "hit" || activity === "missed" || !isMarked;
  context.fillStyle = isFilled ? palette[activity] : ground;
  context.fillRect(left, top, right, below);
  if (!isMarked) return;
  context.lineWidth = 1.5;
  if (activity === "hinted") {
    context.strokeStyle = palette.hinted;
    context.lineWidth = 2;
    context.strokeRect(left + 1, top + 1, right - 2, below - 2);
  } else if (activity === "loading") {
    context.fillStyle = palette.loading;
    context.fillRect(left, top + below / 2, right, below / 2);
  } else if (activity === "missed") {
    const [middle, centre, reach] = [left + right / 2, top + below / 2, Math.min(right, below) / 2 - 1.5];
    context.strokeStyle = palette.surface;
    context.beginPath();
    context.moveTo(middle - reach, centre - reach);
    context.lineTo(middle + reach, centre + reach);
    context.moveTo(middle + reach, centre - reach);
    context.lineTo(middle - reach, centre + reach);
    context.stroke();
  } else if (activity === "hit") {
    context.fillStyle = palette.surface;
    context.beginPath();
    context.arc(left + right / 2, top + below / 2, Math.min(right, below) / 5, 0, 2 * Math.PI);
    context.fill();
  }
}

function paletteOf(element) {
  const style = getComputedStyle(element);
  const names = [...ACTIVITIES, "muted", "text", "surface"];
  return Object.fromEntries(names.map((name) => [name, style.getPropertyValue(`--${name}`).trim()]));
}

/** The first of 1, 2, 4, 8, … that is not less. */
function stepOf(whole, least) {
  let step = 1;
  while (step < least && step < whole) step *= 2;
  return step;
}
