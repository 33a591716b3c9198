// The predictor's versions: which one makes the hints, how well each predicts, and buttons that change it.

import { ask, eventsOf, getJson, postJson } from "./api.js";
import { byId, keyed, make, setText } from "./dom.js";
import { bytes, localTime, wholePercent } from "./format.js";
import { showLearner } from "./learner.js";

const LOOK_EVERY_MS = 10000;
const RANK = ["active", "canary", "shadow", "previous", "available", "unusable"];

export class PredictorPanel {
  constructor() {
    this.state = null;
    this.version = null;
    this.awaySince = null;
    this.versions = [];
    this.qualities = new Map();
    this.scoring = null;
    this.isBusy = false;
    byId("rollback").addEventListener("click", () => this.#change("rollback", { expected_active: this.#active() }));
    byId("score").addEventListener("change", () => this.#score());
    setInterval(() => this.state === "connected" && !document.hidden && this.look(), LOOK_EVERY_MS);
  }

  /** What the live stream says of the link to the service. */
  show(link) {
    const hasChanged = link.state !== this.state || link.version !== this.version;
    this.awaySince = link.state === "away" ? (this.awaySince ?? performance.now()) : null;
    this.state = link.state;
    this.version = link.version;
    this.#showState();
    if (hasChanged && link.state !== "none") this.look();
    if (link.state !== "connected") this.#stopScoring();
  }

  /** The node says nothing more of the link, until it does. */
  lost() {
    this.state = null;
    this.#stopScoring();
  }

  /** Asks the service for its versions. */
  async look() {
    try {
      const { versions, history, learner } = await getJson("/api/predictor");
      this.versions = versions.sort((one, other) => RANK.indexOf(one.state) - RANK.indexOf(other.state));
      this.#showHistory(history);
      showLearner(learner);
      this.isReached = true;
      this.#score();
    } catch (error) {
      this.isReached = false;
      this.trouble = error.message;
    }
    this.#showState();
    this.#showVersions();
  }

  #active() {
    return this.versions.find((info) => info.state === "active")?.version ?? null;
  }

  #showState() {
    const [dot, text] = byId("predictor-state").children;
    const note = byId("predictor-note");
    const away = this.awaySince === null ? 0 : Math.floor((performance.now() - this.awaySince) / 1000);
    const [kind, phrase] = {
      connected: ["good", "connected"],
      away: ["bad", "away"],
      none: ["none", "none"],
    }[this.state] ?? ["none", this.state];
    byId("predictor-state").dataset.state = kind;
    dot.setAttribute("aria-hidden", "true");
    setText(text, phrase);
    note.hidden = this.state === "connected" && this.isReached !== false;
    note.dataset.kind = this.state === "away" ? "bad" : "";
    if (this.state === "away") {
      setText(note, `The predictor does not answer${away >= 5 ? ` (for ${away} s)` : ""}. The cache only reacts until it is back; answers are the same.`);
    } else if (this.state === "none") {
      setText(note, "This node runs without a predictor: the cache only reacts.");
    } else if (this.isReached === false) {
      setText(note, this.trouble);
    }
    const isUsable = this.state === "connected" && this.isReached === true;
    byId("versions").dataset.stale = String(!isUsable);
    byId("predictor-tools").hidden = !isUsable;
    if (!isUsable) showLearner(null);
    byId("rollback").disabled = this.isBusy || !this.versions.some(({ state }) => state === "previous" || state === "canary");
    for (const button of byId("versions").querySelectorAll("button")) button.disabled = this.isBusy || !isUsable;
  }

  #showVersions() {
    keyed(byId("versions"), this.versions, (info) => info.version, () => make("li"), (row, info) => this.#fill(row, info));
    this.#showState();
  }

  #fill(row, info) {
    const quality = this.qualities.get(info.version);
    const fill = JSON.stringify([info, quality]);
    if (row.dataset.fill === fill) return;
    // A button that has the focus keeps it, if it is still there.
    const focused = row.contains(document.activeElement) ? document.activeElement.textContent : null;
    row.dataset.fill = fill;
    const isIdle = info.state === "available" || info.state === "unusable";
    const name = make("span", { class: isIdle ? "version-name idle" : "version-name" }, info.version);
    const badge = info.state === "available" ? null : make("span", { class: "badge", "data-state": info.state }, info.state);
    const lines = [make("p", {}, metaOf(info))];
    if (quality) lines.push(make("p", {}, qualityOf(quality)));
    if (info.fault || quality?.fault) lines.push(make("p", { class: "fault" }, info.fault || quality.fault));
    row.replaceChildren(make("div", { class: "version" }, name, badge, ...lines), this.#buttons(info));
    if (focused) [...row.querySelectorAll("button")].find((button) => button.textContent === focused)?.focus();
  }

  #buttons({ version, state }) {
    const button = (text, label, act) => make("button", { type: "button", "aria-label": `${label} ${version}`, onclick: act }, text);
    const activate = button("Activate", "Activate", () => this.#activate(version));
    const shadow = button("Shadow", "Let look on without effect:", () => this.#change("shadow", { version }));
    const end = button("End shadow", "End the shadow", () => this.#change("clear_shadow", {}));
    const buttons = { active: [], unusable: [], shadow: [activate, end], canary: [activate] }[state] ?? [activate, shadow];
    return make("div", { class: "version-buttons" }, ...buttons);
  }

  #activate(version) {
    const share = byId("share").value;
    this.#change("activate", { version, expected_active: this.#active(), canary_share: share ? Number(share) : null });
  }

  async #change(what, body) {
    const result = byId("predictor-result");
    const why = byId("why").value.trim();
    this.isBusy = true;
    this.#showState();
    setText(result, "");
    try {
      const { change } = await postJson(`/api/predictor/${what}`, why ? { ...body, why } : body);
      result.dataset.kind = "good";
      setText(result, sentenceOf(what, change, body));
    } catch (error) {
      result.dataset.kind = "bad";
      setText(result, error.message);
    }
    this.isBusy = false;
    await this.look();
  }

  #showHistory(changes) {
    byId("history-box").hidden = changes.length === 0;
    const items = changes.toReversed().map((change) => {
      const versions = change.version ? `${change.version}, beside ${change.after}` : change.before ? `${change.before} → ${change.after}` : change.after;
      const when = make("span", {}, `${localTime(change.at_unix_s)} · ${change.who}: ${change.why}`);
      return make("li", {}, `${change.action.replaceAll("_", " ")} · ${versions}`, when);
    });
    byId("history").replaceChildren(...items);
  }

  /** Scores are followed while they are asked for, or while something is on trial: then the service scores anyway. */
  #score() {
    const isOnTrial = this.versions.some(({ state }) => state === "shadow" || state === "canary");
    if (byId("score").checked || isOnTrial) {
      this.scoring ??= this.#followScores();
    } else {
      this.#stopScoring();
    }
  }

  async #followScores() {
    this.abort = new AbortController();
    try {
      const response = await ask("/api/predictor/quality", undefined, this.abort.signal);
      for await (const data of eventsOf(response)) {
        const report = JSON.parse(data);
        if (report.error) break;
        this.qualities = new Map(report.qualities.map((quality) => [quality.version, quality]));
        this.#showVersions();
      }
    } catch {
      // The service is away, which the live stream says; or nobody wants to know any more.
    }
    this.scoring = null;
  }

  #stopScoring() {
    this.abort?.abort();
    if (this.qualities.size) {
      this.qualities = new Map();
      this.#showVersions();
    }
  }
}

function metaOf(info) {
  const recall = info.metrics.filter(({ name }) => name.startsWith("recall_at_k_")).map(({ value }) => value);
  const parts = [info.origin === "plugin" ? "plug-in" : `${info.kind}, ${info.origin}`];
  if (info.size_bytes) parts.push(bytes(info.size_bytes));
  if (recall.length) parts.push(`recall@k ${Math.max(...recall).toFixed(3)} when trained`);
  if (info.parent) parts.push(`trained from ${info.parent}`);
  return parts.join(" · ");
}

function qualityOf(quality) {
  if (!quality.steps) return "not scored yet";
  const share = (part, whole) => (whole ? part / whole : null);
  const [accuracy, fetched] = [share(quality.correct, quality.hinted), share(quality.ready, quality.hinted)];
  const atLeast = quality.state === "shadow" ? "≥ " : "";
  const parts = [
    `recall ${wholePercent(share(quality.found, quality.routed))}`,
    `accuracy ${wholePercent(accuracy)}`,
    `GoodPred ${atLeast}${wholePercent(accuracy === null ? null : accuracy * fetched)}`,
  ];
  return `now: ${parts.join(" · ")}`;
}

function sentenceOf(what, change, body) {
  if (change === null) return "It was so already.";
  if (what === "activate" && body.canary_share) {
    return `${change.version} makes the hints of ${100 * body.canary_share} % of the requests; ${change.after} of the others.`;
  }
  if (what === "activate") return `${change.after} is active now; before it was ${change.before}.`;
  if (what === "shadow") return `${change.version} looks on now.`;
  if (what === "clear_shadow") return `${change.version} looks on no more.`;
  if (change.version) return `${change.version} makes no hints any more; ${change.after} makes those of all requests.`;
  return `${change.after} is active again, in place of ${change.before}.`;
}
