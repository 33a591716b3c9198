// Rates and shares: the last seconds beside the time since the node's start.

import { byId, make, setText } from "./dom.js";
import { bytes, bytesPerSecond, NOTHING, percent, seconds, wholePercent } from "./format.js";

const SVG = "http://www.w3.org/2000/svg";
const TREND_POINTS = 60;

const share = (part, whole) => (whole > 0 ? part / whole : null);
const hitRate = ({ hits, misses }) => share(hits, hits + misses);

/** What one look has more than another, field by field; everything, without another. */
function less(now, before) {
  if (!before) return now;
  return Object.fromEntries(Object.keys(now).map((name) => [name, now[name] - before[name]]));
}

/** How good the hints of one version were (of all, without one), in the time between two looks. */
export function hintQuality(now, before, version) {
  const counts = { hinted: 0, correct: 0, ready: 0 };
  const add = (look, sign) => {
    for (const quality of look?.hints.qualities ?? []) {
      if (version !== null && quality.version !== version) continue;
      for (const name of Object.keys(counts)) counts[name] += sign * quality[name];
    }
  };
  add(now, 1);
  add(before, -1);
  const accuracy = share(counts.correct, counts.hinted);
  const fetchRate = share(counts.ready, counts.hinted);
  return { accuracy, fetchRate, goodPred: accuracy === null ? null : accuracy * fetchRate };
}

/** The four figures at one look, for the seconds before it or since the start. */
export function figuresOf(now, before) {
  const decode = less(now.phases.decode, before?.phases.decode);
  const times = less(now.times, before?.times);
  const elapsed = before ? now.at_s - before.at_s : null;
  const stall = less(now.phases.decode, before?.phases.decode).stall_s;
  return {
    hitRate: hitRate(decode),
    quality: hintQuality(now, before, now.predictor.version),
    tpot: share(times.next_s, times.num_next),
    ttft: share(times.ttft_s, times.num_first),
    tokensPerS: elapsed ? decode.tokens / elapsed : null,
    tokens: decode.tokens,
    stalled: elapsed ? stall / elapsed : null,
  };
}

/** The tiles at the top. */
export class FigureTiles {
  constructor() {
    this.tiles = {};
    for (const [name, label] of [
      ["hits", "Hit rate"],
      ["good", "GoodPred"],
      ["tpot", "TPOT"],
      ["tokens", "Decode"],
    ]) {
      const value = make("dd", { class: "value" });
      const more = make("dd", { class: "more" });
      const trend = document.createElementNS(SVG, "svg");
      const line = document.createElementNS(SVG, "path");
      trend.setAttribute("viewBox", "0 0 100 20");
      trend.setAttribute("preserveAspectRatio", "none");
      trend.setAttribute("aria-hidden", "true");
      trend.append(line);
      byId("figures").append(make("div", { class: "figure" }, make("dt", {}, label), value, more, make("dd", {}, trend)));
      this.tiles[name] = { value, more, line };
    }
  }

  show(history) {
    const now = history.last;
    const before = history.before();
    const lately = before ? figuresOf(now, before) : null;
    const ever = figuresOf(now, null);
    this.#tile("hits", lately?.hitRate ?? null, ever.hitRate, percent, `since start ${percent(ever.hitRate)}`);
    const judged = lately?.quality.goodPred != null ? lately.quality : ever.quality;
    const factors = `accuracy ${wholePercent(judged.accuracy)} × fetched ${wholePercent(judged.fetchRate)}`;
    this.#tile("good", lately?.quality.goodPred ?? null, ever.quality.goodPred, percent, judged.accuracy === null ? "no hints yet" : factors);
    const ttft = lately?.ttft ?? ever.ttft;
    this.#tile("tpot", lately?.tpot ?? null, ever.tpot, seconds, `TTFT ${seconds(ttft)}`);
    const rate = lately?.tokensPerS ?? 0;
    const stalled = `stalled ${wholePercent(lately?.stalled ?? null)} of the time`;
    this.#tile("tokens", rate, null, (value) => `${value.toFixed(1)} tok/s`, stalled);
    this.#trends(history);
  }

  #tile(name, recent, ever, format, more) {
    const { value, more: below } = this.tiles[name];
    const text = format(recent ?? ever);
    const [number, unit = ""] = text === NOTHING ? [text] : text.split(" ");
    if (value.dataset.text !== text) {
      value.replaceChildren(number, unit ? make("small", {}, unit) : "");
      value.dataset.text = text;
    }
    const isOld = recent === null && ever !== null;
    value.classList.toggle("old", isOld);
    setText(below, isOld ? "since start" : more);
  }

  #trends(history) {
    const step = Math.max(1, Math.floor(history.looks.length / TREND_POINTS));
    const looks = history.looks.filter((_, place) => place % step === 0);
    const points = looks.map((look) => {
      const before = history.before(look);
      return before ? figuresOf(look, before) : null;
    });
    this.#trend("hits", points.map((point) => point?.hitRate ?? null), 1);
    this.#trend("good", points.map((point) => point?.quality.goodPred ?? null), 1);
    this.#trend("tpot", points.map((point) => point?.tpot ?? null), null);
    this.#trend("tokens", points.map((point) => point?.tokensPerS ?? null), null);
  }

  #trend(name, values, top) {
    const known = values.filter((value) => value !== null);
    const most = top ?? Math.max(...known, 1e-9) * 1.1;
    let path = "";
    let isDown = false;
    values.forEach((value, place) => {
      if (value === null) {
        isDown = false;
        return;
      }
      const x = values.length > 1 ? (100 * place) / (values.length - 1) : 0;
      path += `${isDown ? "L" : "M"}${x.toFixed(1)} ${(19 - 18 * (value / most)).toFixed(1)}`;
      isDown = true;
    });
    this.tiles[name].line.setAttribute("d", path);
  }
}

const REASONS = [
  ["demand", "On demand", "demand"],
  ["prefetch", "Prefetch", "prefetch"],
  ["streamed", "Layer streaming", "streamed"],
];

/** Bytes over the link, by why they were loaded. */
export class ByteTable {
  constructor() {
    this.rows = new Map();
    const body = make("tbody");
    for (const [reason, label] of REASONS) {
      this.#row(body, reason, label, make("span", { class: "key", "data-reason": reason }));
      byId("bytes-bar").append(make("span", { "data-reason": reason }));
    }
    this.#row(body, "uploaded", "Together", null);
    const head = ["Reason", "Last 10 s", "Share", "Since start"].map((text, place) =>
      make("th", { scope: "col", class: place ? "number" : "" }, text),
    );
    byId("bytes").append(make("thead", {}, make("tr", {}, ...head)), body);
  }

  #row(body, reason, label, mark) {
    const cells = [0, 1, 2].map(() => make("td", { class: "number" }));
    body.append(make("tr", {}, make("th", { scope: "row" }, mark, label), ...cells));
    this.rows.set(reason, cells);
  }

  show(history) {
    const now = history.last;
    const before = history.before();
    const lately = before ? less(now.bytes, before.bytes) : null;
    const elapsed = before ? now.at_s - before.at_s : null;
    const shown = lately && lately.uploaded > 0 ? lately : now.bytes;
    for (const [reason, [rate, part, total]] of this.rows) {
      setText(rate, bytesPerSecond(lately ? Math.max(0, lately[reason]) / elapsed : null));
      setText(part, wholePercent(share(Math.max(0, shown[reason]), shown.uploaded)));
      setText(total, bytes(now.bytes[reason]));
    }
    for (const bar of byId("bytes-bar").children) {
      bar.style.flexGrow = String(Math.max(0, shown[bar.dataset.reason]));
    }
    setText(byId("bytes-note"), this.#note(now, lately, elapsed));
  }

  #note(now, lately, elapsed) {
    const parts = [];
    const judged = lately ?? now.bytes;
    const whole = judged.useful + judged.late + judged.wasted;
    if (whole > 0) {
      const [useful, late, wasted] = ["useful", "late", "wasted"].map((fate) => wholePercent(judged[fate] / whole));
      parts.push(`prefetched: ${useful} useful, ${late} late, ${wasted} wasted`);
    }
    const peak = now.bytes.link_bytes_per_s;
    if (peak > 0 && lately) parts.push(`link ${wholePercent(lately.uploaded / elapsed / peak)} of ${bytesPerSecond(peak)}`);
    return parts.join(" · ");
  }
}
