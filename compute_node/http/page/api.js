// How the page talks to its node: JSON, server-sent events, the key, and errors as the API writes them.

const KEY = "promoe.key";

export class ApiFailure extends Error {
  /** `status`: HTTP's, or 0 when the node was not reached. */
  constructor(message, status, code = null) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

export const getJson = async (path) => (await ask(path)).json();
export const postJson = async (path, body, signal) => (await ask(path, body, signal)).json();

/** A response that is not an error; throws ApiFailure, or AbortError. */
export async function ask(path, body = undefined, signal = undefined) {
  const headers = {};
  if (key.get()) headers.authorization = `Bearer ${key.get()}`;
  if (body !== undefined) headers["content-type"] = "application/json";
  const request = { method: body === undefined ? "GET" : "POST", headers, signal, cache: "no-store" };
  if (body !== undefined) request.body = JSON.stringify(body);
  let response;
  try {
    response = await fetch(path, request);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiFailure("The compute node cannot be reached.", 0);
  }
  if (!response.ok) throw await failureOf(response);
  return response;
}

async function failureOf(response) {
  const body = await response.json().catch(() => null);
  const message = body?.error?.message ?? `The compute node answered with status ${response.status}.`;
  return new ApiFailure(message, response.status, body?.error?.code ?? null);
}

/** The data of each server-sent event, as text; comments are passed over. */
export async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const event of events) {
        const lines = event.split("\n").filter((line) => line.startsWith("data:"));
        if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
