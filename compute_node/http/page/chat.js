// The chat: a conversation kept in this tab, streamed answers, and what each of them took.

import { ApiFailure, ask, eventsOf } from "./api.js";
import { announce, byId, make } from "./dom.js";
import { plural, seconds } from "./format.js";
import { renderMarkdown } from "./markdown.js";

const STORE = "promoe.chat";
const EXAMPLES = [
  "Explain how the water cycle works in simple words.",
  "Write a short story about a lighthouse keeper and a storm.",
  "Give me three facts about whales.",
];
const NEAR_THE_END_PX = 60;

export class Chat {
  /** `onKeyWanted`: called when the node wants a key. */
  constructor(onKeyWanted) {
    this.onKeyWanted = onKeyWanted;
    this.model = null;
    this.messages = [];
    this.abort = null;
    this.list = byId("messages");
    this.scroll = byId("scroll");
    this.isAtEnd = true;
    this.prompt = byId("prompt");
    this.#listen();
    this.#restore();
  }

  get isAnswering() {
    return this.abort !== null;
  }

  async send(text) {
    this.#add({ role: "user", content: text });
    await this.#answer();
  }

  stop() {
    this.abort?.abort();
  }

  clear() {
    this.stop();
    this.messages = [];
    this.list.replaceChildren();
    this.#keep();
    this.prompt.focus();
    announce("A new chat.");
  }

  #listen() {
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#submit();
    });
    this.prompt.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        this.#submit();
      }
    });
    this.prompt.addEventListener("input", () => this.#fit());
    document.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
      if (byId("options").open) byId("options").open = false;
      else this.stop();
    });
    this.scroll.addEventListener("scroll", () => {
      const below = this.scroll.scrollHeight - this.scroll.scrollTop - this.scroll.clientHeight;
      this.isAtEnd = below < NEAR_THE_END_PX;
    });
    for (const resized of [this.scroll, this.list]) new ResizeObserver(() => this.#scrollAlong()).observe(resized);
    byId("stop").addEventListener("click", () => this.stop());
    byId("new-chat").addEventListener("click", () => this.clear());
    for (const example of EXAMPLES) {
      const button = make("button", { type: "button", onclick: () => this.isAnswering || this.send(example) }, example);
      byId("examples").append(make("li", {}, button));
    }
  }

  #submit() {
    const text = this.prompt.value.trim();
    if (!text || this.isAnswering) return;
    this.prompt.value = "";
    this.#fit();
    this.send(text);
  }

  #fit() {
    this.prompt.style.height = "auto";
    this.prompt.style.height = `${this.prompt.scrollHeight + 2}px`;
  }

  #restore() {
    try {
      for (const message of JSON.parse(sessionStorage.getItem(STORE) ?? "[]")) this.#add(message);
    } catch {
      sessionStorage.removeItem(STORE);
    }
    this.#keep();
  }

  #keep() {
    byId("empty").hidden = this.messages.length > 0;
    try {
      sessionStorage.setItem(STORE, JSON.stringify(this.messages));
    } catch {
      // A conversation that is too long for the tab's storage lives until the tab is loaded anew.
    }
  }

  #add(message) {
    this.messages.push(message);
    const view = new MessageView(message);
    this.list.append(view.element);
    this.#keep();
    this.isAtEnd = true;
    this.#scrollAlong();
    return view;
  }

  #body() {
    const system = byId("system-message").value.trim();
    const said = this.messages.filter((message) => message.content).map(({ role, content }) => ({ role, content }));
    return {
      model: this.model,
      messages: system ? [{ role: "system", content: system }, ...said] : said,
      stream: true,
      stream_options: { include_usage: true },
      temperature: byId("temperature").valueAsNumber,
      max_tokens: byId("max-tokens").valueAsNumber,
    };
  }

  async #answer() {
    const body = this.#body();
    const message = { role: "assistant", content: "" };
    const view = this.#add(message);
    this.abort = new AbortController();
    this.#showState();
    const clock = new AnswerClock();
    try {
      await this.#follow(body, message, view, clock);
    } catch (error) {
      if (error.name === "AbortError") clock.ending = "stopped";
      else this.#fail(error, message);
    }
    this.abort = null;
    message.stats = clock.stats();
    view.finish(message.trouble ? () => this.#retry(message, view) : null);
    this.#keep();
    this.#showState();
    announce(message.trouble ?? `The answer has ended: ${message.stats.join(", ")}.`);
  }

  /** Asks again for the last answer, which failed. */
  async #retry(message, view) {
    if (this.isAnswering || this.messages.at(-1) !== message) return;
    this.messages.pop();
    view.element.remove();
    await this.#answer();
  }

  async #follow(body, message, view, clock) {
    if (this.model === null) await this.#findModel(body);
    const response = await ask("/v1/chat/completions", body, this.abort.signal);
    for await (const data of eventsOf(response)) {
      if (data === "[DONE]") continue;
      const chunk = JSON.parse(data);
      if (chunk.error?.code === "cancelled") break;
      if (chunk.error) throw new ApiFailure(chunk.error.message, 503, chunk.error.code);
      clock.take(chunk);
      const text = chunk.choices[0]?.delta.content;
      if (text) {
        message.content += text;
        view.grow();
      }
    }
    clock.ending ??= "cancelled";
  }

  async #findModel(body) {
    const response = await ask("/v1/models", undefined, this.abort.signal);
    this.model = (await response.json()).data[0].id;
    body.model = this.model;
  }

  #fail(error, message) {
    message.trouble = error instanceof ApiFailure ? error.message : "The answer broke off: the connection was lost.";
    if (error.status === 401) this.onKeyWanted();
    if (!(error instanceof ApiFailure) && error.name !== "TypeError") console.warn(error);
  }

  #showState() {
    byId("send").hidden = this.isAnswering;
    byId("stop").hidden = !this.isAnswering;
    byId("log").setAttribute("aria-busy", String(this.isAnswering));
    if (this.isAnswering) announce("The model answers.");
  }

  #scrollAlong() {
    if (this.isAtEnd) this.scroll.scrollTop = this.scroll.scrollHeight;
  }
}

/** One message as it is shown. */
class MessageView {
  constructor(message) {
    this.message = message;
    const who = message.role === "user" ? "You" : "Model";
    this.text = make("div", { class: "text" });
    this.element = make(
      "li",
      { class: "message", "data-role": message.role },
      make("span", { class: "unseen" }, `${who}: `),
      this.text,
    );
    if (message.role === "user") this.text.textContent = message.content;
    else if (message.stats || message.trouble) this.finish();
    else this.text.append(make("span", { class: "waiting" }));
  }

  /** At most once a frame. */
  grow() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      renderMarkdown(this.text, this.message.content);
    });
  }

  /** `onRetry`: what a button beside the trouble does. */
  finish(onRetry = null) {
    if (this.frame) cancelAnimationFrame(this.frame);
    this.text.replaceChildren();
    renderMarkdown(this.text, this.message.content);
    if (this.message.trouble) {
      const retry = onRetry && make("button", { type: "button", onclick: onRetry }, "Try again");
      this.element.append(make("p", { class: "trouble" }, make("span", {}, this.message.trouble), retry));
    }
    const stats = (this.message.stats ?? []).map((stat) => make("span", {}, stat));
    if (stats.length && !(this.message.trouble && !this.message.content)) {
      this.element.append(make("p", { class: "stats" }, ...stats));
    }
  }
}

/** Times and tokens of one answer, as this page sees them. */
class AnswerClock {
  constructor() {
    this.began = performance.now();
    this.first = null;
    this.last = null;
    this.usage = null;
    this.ending = null;
  }

  take(chunk) {
    if (chunk.usage) this.usage = chunk.usage;
    const choice = chunk.choices[0];
    if (!choice) return;
    if (choice.delta.content) {
      this.last = performance.now();
      this.first ??= this.last;
    }
    if (choice.finish_reason) {
      // The token that ends an answer is one of its tokens, too.
      if (this.first !== null) this.last = performance.now();
      this.ending = choice.finish_reason;
    }
  }

  stats() {
    const tokens = this.usage?.completion_tokens ?? null;
    const stats = [];
    if (this.first !== null) stats.push(`TTFT ${seconds((this.first - this.began) / 1000)}`);
    if (tokens > 1 && this.first !== null) {
      const perToken = (this.last - this.first) / 1000 / (tokens - 1);
      stats.push(`TPOT ${seconds(perToken)}`, `${(1 / perToken).toFixed(1)} tokens/s`);
    }
    if (tokens !== null) stats.push(plural(tokens, "token"), `prompt ${this.usage.prompt_tokens}`);
    if (this.ending === "length") stats.push("ended at its limit");
    else if (this.ending !== "stop" && this.ending !== null) stats.push(this.ending);
    return stats;
  }
}
