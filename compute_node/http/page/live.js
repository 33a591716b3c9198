// The live stream: one look at the node after the other, and what happened in the last seconds of them.

import { ask, eventsOf } from "./api.js";

const WINDOW_S = 10;
const TREND_S = 60;
const SILENCE_MS = 6000;
const LEAST_WAIT_MS = 500;
const MOST_WAIT_MS = 5000;

/** The looks of the last seconds; forgets them when another process answers. */
export class History {
  constructor() {
    this.looks = [];
  }

  add(look) {
    const last = this.looks.at(-1);
    if (last && (last.node.instance_id !== look.node.instance_id || last.at_s > look.at_s)) this.looks = [];
    this.looks.push(look);
    while (look.at_s - this.looks[0].at_s > TREND_S) this.looks.shift();
  }

  get last() {
    return this.looks.at(-1);
  }

  /** The look that the last seconds began with: as old as the window, or a little older; null while there is none. */
  before(look = this.last) {
    const end = this.looks.lastIndexOf(look);
    let start = end;
    while (start > 0 && look.at_s - this.looks[start].at_s < WINDOW_S) start -= 1;
    return start === end ? null : this.looks[start];
  }
}

/** Follows the node for as long as the page is seen; it may go and come back. */
export class LiveStream {
  /** `onLook(look)`, and `onState(state, error)`: "live", "away", "key", or "hidden" while nobody looks. */
  constructor(onLook, onState) {
    this.onLook = onLook;
    this.onState = onState;
    this.wake = () => {};
    this.abort = null;
    document.addEventListener("visibilitychange", () => (document.hidden ? this.abort?.abort() : this.wake()));
    this.#run();
  }

  /** Tries again at once: there is another key. */
  retry() {
    this.abort?.abort();
    this.wake();
  }

  async #run() {
    for (let wait = LEAST_WAIT_MS; ; wait = Math.min(2 * wait, MOST_WAIT_MS)) {
      if (document.hidden) await this.#sleep(2 ** 31 - 1);
      try {
        await this.#follow(() => (wait = LEAST_WAIT_MS));
        this.onState("away", "It ended the stream.");
      } catch (error) {
        if (error.status === 401) {
          this.onState("key", error.message);
          wait = 2 ** 30;
        } else if (document.hidden) {
          this.onState("hidden");
        } else {
          this.onState("away", error.name === "AbortError" ? "It says nothing any more." : error.message);
        }
      }
      await this.#sleep(wait);
      if (wait > MOST_WAIT_MS) wait = LEAST_WAIT_MS;
    }
  }

  async #follow(onLive) {
    this.abort = new AbortController();
    let alarm = null;
    const watch = () => {
      clearTimeout(alarm);
      alarm = setTimeout(() => this.abort.abort(), SILENCE_MS);
    };
    try {
      watch();
      const response = await ask("/api/live", undefined, this.abort.signal);
      for await (const data of eventsOf(response)) {
        watch();
        onLive();
        this.onState("live");
        this.onLook(JSON.parse(data));
      }
    } finally {
      clearTimeout(alarm);
    }
  }

  #sleep(ms) {
    return new Promise((resolve) => {
      const timer = setTimeout(resolve, ms);
      this.wake = () => {
        clearTimeout(timer);
        resolve();
      };
    });
  }
}
