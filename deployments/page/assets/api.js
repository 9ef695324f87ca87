// Asks the cluster's own routes, and nobody else. The key stands in this module's memory alone.

// Every route stands beside the page: at `/`, at `/v1/`, or behind a prefix of either.
const ROOT = new URL(".", document.baseURI).href;
// What a client of another program is given as its base address.
export const BASE_URL = ROOT.endsWith("/v1/") ? ROOT.slice(0, -1) : `${ROOT}v1`;
// So many rows go in one request: a step of the engine's or some.
const PART_ROWS = 64;

let key = "";
// The uses for which a model has turned out to have no prompt: it is asked once.
const lacking = new Set();
let locked = () => {};

/** What the cluster, or the way to it, refuses: `message` is for people. */
export class Refusal extends Error {
  constructor(message, status = 0, code = "", param = "") {
    super(message);
    Object.assign(this, { status, code, param });
  }
}

export const hasKey = () => key !== "";

/** Send this key from now on; raises Refusal where it can't be one. */
export function setKey(value) {
  const plain = value.trim();
  if (/[^\x21-\x7e]/.test(plain)) {
    throw new Refusal("This can't be a key: keys have no spaces and no letters beyond ASCII.");
  }
  key = plain;
}

/** Call this whenever a key is missing or isn't valid. */
export function onLocked(callback) {
  locked = callback;
}

/** Return the answer of a route; raises Refusal. */
export async function ask(path, options = {}) {
  const headers = { ...options.headers, ...(key ? { authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(ROOT + path, { cache: "no-store", credentials: "omit", ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("The cluster doesn't answer.");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  const told = body?.error ?? {};
  const refusal = new Refusal(
    told.message ?? `The answer has status ${response.status}.`, response.status, told.code, told.param);
  if (response.status === 401) locked(refusal);
  throw refusal;
}

export const get = async (path) => (await ask(path)).json();

export const post = async (path, body) =>
  (await ask(path, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(body),
  })).json();

/** Return the body of a request for the vectors of texts. */
export function embedding(model, input, use) {
  return { model, input, ...(use ? { input_type: use } : {}) };
}

/** Return the vectors of texts as arrays of float32, in order. */
export async function embed(body, query = "") {
  const answer = await post(`embeddings${query}`, { ...body, encoding_format: "base64" });
  return answer.data.map((each) => {
    const bytes = Uint8Array.from(atob(each.embedding), (letter) => letter.charCodeAt(0));
    return new Float32Array(bytes.buffer);
  });
}

/** The same with the model's prompt for a use; the `use` that comes back is empty where it has none for it. */
export async function embedAs(model, texts, use, more = {}, query = "") {
  const known = lacking.has(`${use} ${model}`) ? "" : use;
  const embedWith = async (name) => ({ vectors: await embed({ ...embedding(model, texts, name), ...more }, query), use: name });
  try {
    return await embedWith(known);
  } catch (error) {
    if (!known || error.param !== "input_type") throw error;
    lacking.add(`${use} ${model}`);
    return embedWith("");
  }
}

/** Return the vectors of many rows, part by part, behind people who wait; what is too long is cut. */
export async function embedRows(model, texts, use, progress) {
  const vectors = [];
  while (vectors.length < texts.length) {
    const part = texts.slice(vectors.length, vectors.length + PART_ROWS);
    vectors.push(...(await embedAs(model, part, use, { truncate_prompt_tokens: -1 }, "?nice=true")).vectors);
    progress(vectors.length);
  }
  return vectors;
}
