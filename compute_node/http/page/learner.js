// What the predictor service learns from what it serves: one line, and what happened last.

import { byId, setText } from "./dom.js";
import { bytes, count, plural } from "./format.js";

const DOES = {
  gathering: "gathers requests to learn from",
  training: "trains a candidate",
  shadowing: "compares a candidate, which looks on, with the active version",
  watching: "watches the version that it promoted, beside the one before",
  failed: "is away",
};

/** Of a service that does not learn, or is too old to say, nothing is shown. */
export function showLearner(report) {
  const isThere = report !== null && report !== undefined && report.state !== "off";
  byId("learner").hidden = !isThere;
  if (!isThere) return;
  const [line, news] = byId("learner").children;
  byId("learner").dataset.state = report.state;
  setText(line, lineOf(report));
  setText(news, report.news);
  news.hidden = !report.news;
}

function lineOf(report) {
  const does = report.paused && report.state === "gathering" ? "is paused" : (DOES[report.state] ?? report.state);
  const parts = [`Learner: ${does}${report.paused && report.state !== "gathering" ? " (paused after that)" : ""}`];
  if (report.state !== "failed") {
    parts.push(`${plural(report.documents, "request")} held, ${count(report.tokens)} tokens, ${bytes(report.size_bytes)}`);
  }
  parts.push(...report.progress.map(({ name, value }) => `${name.replaceAll("_", " ")} ${Number(value.toPrecision(3))}`));
  return parts.join(" · ");
}
