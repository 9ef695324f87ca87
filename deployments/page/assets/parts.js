// What the views share: the library, numbers for people, small parts.

import { h, render } from "./vendor/preact.js";
import { useEffect, useMemo, useRef, useState } from "./vendor/hooks.js";
import htm from "./vendor/htm.js";
import { BASE_URL, hasKey } from "./api.js";

export { render, useEffect, useMemo, useRef, useState };
// Templates become elements; what is put into them becomes text, never markup.
export const html = htm.bind(h);

const whole = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
const short = new Intl.NumberFormat("en", { notation: "compact", maximumFractionDigits: 1 });

/** Return a count as people write it: all digits below 10,000, else rounded. */
export const count = (value) =>
  value < 10 && value % 1 ? value.toFixed(1) : value < 10_000 ? whole.format(value) : short.format(value);

/** Return seconds in the unit that suits them. */
export const time = (seconds) =>
  seconds === null || seconds === undefined
    ? "–"
    : seconds < 0.9995
      ? `${(seconds * 1000).toPrecision(seconds < 0.01 ? 2 : 3).replace(/\.0+$/, "")} ms`
      : `${seconds.toPrecision(3)} s`;

/** Return a size in the unit that suits it. */
export function size(bytes) {
  const units = ["B", "KiB", "MiB", "GiB"];
  const step = Math.min(units.length - 1, Math.floor(Math.log2(Math.max(bytes, 1)) / 10));
  return `${(bytes / 1024 ** step).toFixed(step && bytes / 1024 ** step < 10 ? 1 : 0)} ${units[step]}`;
}

/** Return a time of day, with its date. */
export const date = (seconds) =>
  seconds ? new Date(seconds * 1000).toLocaleString([], { dateStyle: "medium", timeStyle: "short" }) : "–";

/**
 * Ask again and again while the view is shown and the page looked at; at once when it comes back.
 *
 * A page that nobody looks at asks nothing. `seconds` apart from an answer to the next question.
 */
export function usePolling(active, seconds, look) {
  const latest = useRef(look);
  latest.current = look;
  useEffect(() => {
    if (!active) return undefined;
    let timer = 0;
    let ended = false;
    let asking = false;
    const turn = async () => {
      clearTimeout(timer);
      if (ended || asking || document.visibilityState !== "visible") return;
      asking = true;
      await latest.current();
      asking = false;
      if (!ended) timer = setTimeout(turn, seconds * 1000);
    };
    document.addEventListener("visibilitychange", turn);
    turn();
    return () => {
      ended = true;
      clearTimeout(timer);
      document.removeEventListener("visibilitychange", turn);
    };
  }, [active, seconds]);
}

/** Return what runs one thing at a time, whether it does, and what went wrong. */
export function useWork() {
  const [busy, setBusy] = useState(false);
  const [error, setError] = useState(null);
  const run = async (work) => {
    setBusy(true);
    setError(null);
    try {
      await work();
    } catch (failure) {
      setError(failure);
    }
    setBusy(false);
  };
  return { busy, error, run };
}

/** What went wrong, in words. */
export const Failure = ({ error }) => html`<p class="notice bad" role="alert">${error.message}</p>`;

/** A choice of one name. */
export const Choice = ({ label, value, options, onChange }) => html`
  <label class="field">
    <span>${label}</span>
    <select value=${value} onChange=${(event) => onChange(event.target.value)}>
      ${options.map(([name, shown]) => html`<option key=${name} value=${name}>${shown}</option>`)}
    </select>
  </label>
`;

/** A similarity as a number and a bar. */
export const Score = ({ value }) => html`
  <span class="score">
    <span class="bar" aria-hidden="true"><span style=${{ width: `${Math.max(0, value) * 100}%` }}></span></span>
    ${value.toFixed(3)}
  </span>
`;

// --- a request as code -----------------------------------------------------------------------------

const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

/** Return the request as a command of curl. The key is the reader's to fill in. */
export const asCurl = (body) =>
  [
    `curl -s ${quoted(`${BASE_URL}/embeddings`)}`,
    ...(hasKey() ? [`-H "Authorization: Bearer $EMBEDDING_CLUSTER_KEY"`] : []),
    `-H 'Content-Type: application/json'`,
    `-d ${quoted(JSON.stringify(body, null, 2))}`,
  ].join(" \\\n  ");

/** Return the request as Python for OpenAI's SDK. A JSON string is a Python string as well. */
export function asPython({ model, input, ...more }) {
  const key = hasKey() ? `os.environ["EMBEDDING_CLUSTER_KEY"]` : `"unused"`;
  return [
    ...(hasKey() ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${JSON.stringify(BASE_URL)}, api_key=${key})`,
    "response = client.embeddings.create(",
    `    model=${JSON.stringify(model)},`,
    `    input=${JSON.stringify(input, null, 4).replaceAll("\n", "\n    ")},`,
    ...(Object.keys(more).length ? [`    extra_body=${JSON.stringify(more)},`] : []),
    ")",
    "vectors = [item.embedding for item in response.data]",
  ].join("\n");
}

/** The last request in two languages, ready to copy. */
export const Code = ({ body }) => html`
  <details class="code">
    <summary>This request as code</summary>
    <${Block} name="curl" text=${asCurl(body)} />
    <${Block} name="Python, OpenAI SDK" text=${asPython(body)} />
  </details>
`;

function Block({ name, text }) {
  const [told, setTold] = useState("");
  const shown = useRef(null);
  const copy = async () => {
    try {
      await navigator.clipboard.writeText(text);
      setTold("Copied");
    } catch {
      // Browsers lend the clipboard to pages of https and of this machine alone.
      getSelection().selectAllChildren(shown.current);
      setTold("Selected: press Ctrl+C");
    }
  };
  return html`
    <div class="block">
      <div class="row">
        <h3>${name}</h3>
        <span role="status">${told}</span>
        <button type="button" class="quiet" onClick=${copy}>Copy<span class="unseen"> ${name}</span></button>
      </div>
      <pre ref=${shown} tabindex="0" aria-label=${name}>${text}</pre>
    </div>
  `;
}
