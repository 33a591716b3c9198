// Who is served: no prompts, no answers, and a button that ends one.

import { postJson } from "./api.js";
import { byId, keyed, make, setText } from "./dom.js";
import { seconds, shortId } from "./format.js";

export class RequestTable {
  constructor() {
    this.body = byId("requests").tBodies[0];
    this.asked = new Set();
  }

  show(requests, node) {
    const note = requests.length
      ? `${node.running_requests} running, ${node.queued_requests} waiting`
      : "nobody is served now";
    setText(byId("requests-note"), note);
    byId("requests").hidden = requests.length === 0;
    keyed(this.body, requests, (request) => request.id, (request) => this.#row(request), (row, request) => this.#fill(row, request));
  }

  #row(request) {
    const button = make(
      "button",
      { type: "button", "aria-label": `Cancel request ${shortId(request.id)}`, onclick: () => this.#cancel(request.id, button) },
      "Cancel",
    );
    const cells = ["", "number", "number", "number"].map((kind) => make("td", { class: kind }));
    return make("tr", {}, make("th", { scope: "row" }, make("code", { title: request.id }, shortId(request.id))), ...cells, make("td", { class: "number" }, button));
  }

  #fill(row, request) {
    const texts = [
      request.state,
      String(request.prompt_tokens),
      `${request.output_tokens} / ${request.max_output_tokens}`,
      seconds(request.age_s),
    ];
    texts.forEach((text, place) => setText(row.cells[place + 1], text));
  }

  async #cancel(id, button) {
    const result = byId("requests-result");
    button.disabled = true;
    try {
      await postJson(`/api/requests/${id}/cancel`, {});
      result.dataset.kind = "good";
      setText(result, `Request ${shortId(id)} is cancelled.`);
    } catch (error) {
      result.dataset.kind = "bad";
      setText(result, error.message);
      button.disabled = false;
    }
  }
}
