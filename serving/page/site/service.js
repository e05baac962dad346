// Questions to the service: the key, waiting for a busy one, and errors as what, where and what next.

const RETRIES = 3;
const LONGEST_WAIT_MS = 5000;
// What a reader of this page can do about an error; what is wrong with a question, its message says itself.
const NEXT = {
  unauthorized: "Give a key that this service accepts (button Key, above).",
  forbidden: "Ask whoever runs this service for a key with that scope.",
  rate_limited: "Wait a moment, then ask again.",
  overloaded: "Wait a moment, then ask again.",
  draining: "It will be back after its restart: ask again in a moment.",
  service: "Ask again in a moment; if it stays so, tell whoever runs this service.",
  deadline: "Ask for less at once.",
  internal: "Tell whoever runs this service, with the id of the request.",
};

export class ServiceError extends Error {
  constructor(status, { code = "", message = "", where = "", requestId = "" }) {
    super(message);
    Object.assign(this, { status, code, where, requestId, next: NEXT[code] ?? "" });
  }
}

// Which model is asked, where a service has several; the page's own address names it.
export const MODEL = new URLSearchParams(location.search).get("model") ?? "";

let key = "";
let onAnswer = () => {};

// `listener` hears which model version gave each answer.
export function onProvenance(listener) {
  onAnswer = listener;
}

// The key lives in this variable and nowhere else.
export function useKey(value) {
  key = value;
}

export function currentKey() {
  return key;
}

// The JSON of an answer; ServiceError for a refusal. `body` is sent as it is with `type`, `json` as JSON.
export async function ask(path, { json, body, type = "application/json", query, signal } = {}) {
  const address = new URL(path, document.baseURI);
  const asked = MODEL && path.startsWith("v1/") ? { ...query, model: MODEL } : query;
  for (const [name, value] of Object.entries(asked ?? {})) address.searchParams.set(name, value);
  const sent = json === undefined ? body : JSON.stringify(json);
  const headers = { Accept: "application/json" };
  if (sent !== undefined) headers["Content-Type"] = type;
  if (key) headers.Authorization = `Bearer ${key}`;
  const method = sent === undefined ? "GET" : "POST";
  for (let attempt = 0; ; attempt += 1) {
    const response = await reach(address, { method, headers, body: sent, signal, cache: "no-store" });
    if (response.ok) {
      const answer = await response.json();
      if (answer.provenance) onAnswer(answer.provenance.model);
      return answer;
    }
    const wait = Number(response.headers.get("Retry-After-Ms"));
    const busy = response.status === 429 || response.status === 503;
    if (!busy || attempt >= RETRIES || !(wait > 0 && wait <= LONGEST_WAIT_MS)) throw await refusal(response);
    await pause(wait, signal);
  }
}

async function reach(address, options) {
  try {
    return await fetch(address, { ...options, credentials: "omit", redirect: "error" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServiceError(0, {
      code: "service",
      message: "The service cannot be reached.",
      where: address.origin,
    });
  }
}

async function refusal(response) {
  let told = {};
  try {
    told = (await response.json()).error ?? {};
  } catch {
    // What stands between this page and the service answers in a form of its own.
  }
  return new ServiceError(response.status, {
    code: told.code,
    message: told.message ?? `The answer is ${response.status} ${response.statusText}, without a reason.`,
    where: told.details?.where,
    requestId: told.request_id ?? response.headers.get("X-Request-ID") ?? "",
  });
}

function pause(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, milliseconds);
    signal?.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(new DOMException("given up", "AbortError"));
    });
  });
}

// One question at a time: a new one ends the one before, whose answer nobody waits for any more.
export class Latest {
  #controller = null;

  async run(work) {
    this.#controller?.abort();
    const mine = new AbortController();
    this.#controller = mine;
    try {
      const found = await work(mine.signal);
      return mine.signal.aborted ? undefined : found;
    } catch (error) {
      if (mine.signal.aborted) return undefined;
      throw error;
    }
  }

  end() {
    this.#controller?.abort();
  }
}
