// What the key has used and may use; for an operator, what all keys have.

import { ask, get } from "./api.js";
import { count, Failure, html, useEffect, useState } from "./parts.js";

const SAMPLE = /^embedding_key_(requests|tokens)_total\{key="((?:[^"\\]|\\.)*)",model="((?:[^"\\]|\\.)*)"\} (\S+)/gm;
const plain = (label) => label.replace(/\\(.)/g, (_, letter) => (letter === "n" ? "\n" : letter));

/** Return what each key has used of each model, out of Prometheus's text. */
function used(text) {
  const rows = new Map();
  for (const [, what, key, model, number] of text.matchAll(SAMPLE)) {
    const name = `${key}"${model}`;
    const row = rows.get(name) ?? { key: plain(key), model: plain(model), requests: 0, tokens: 0 };
    rows.set(name, { ...row, [what]: Number(number) });
  }
  return [...rows.values()].sort((a, b) => b.tokens - a.tokens);
}

async function look() {
  let usage;
  try {
    usage = await get("usage");
  } catch (error) {
    if (error.status === 404) return { open: true };
    throw error;
  }
  // Operators alone are told of all keys; what those have used stands in the metrics.
  return { usage, all: usage.keys ? used(await (await ask("metrics")).text()) : null };
}

/** The view. */
export function Keys({ active }) {
  const [told, setTold] = useState(null);
  const [error, setError] = useState(null);
  const refresh = () =>
    look().then(
      (found) => {
        setTold(found);
        setError(null);
      },
      setError,
    );
  useEffect(() => {
    if (active) refresh();
  }, [active]);
  return html`
    <div class="row">
      <h1>Keys</h1>
      <button type="button" class="quiet" onClick=${refresh}>Look again</button>
    </div>
    ${error && html`<${Failure} error=${error} />`}
    ${!told && !error && html`<p role="status">Looking …</p>`}
    ${told?.open &&
    html`<p class="notice">This cluster has no keys: whoever reaches it may ask.
      Keys are made by <code>embedding-cluster keys create</code>.</p>`}
    ${told?.usage && html`<${Usage} usage=${told.usage} />`}
    ${told?.all && html`<${All} keys=${told.usage.keys} rows=${told.all} />`}
  `;
}

const perMinute = (most) => (most === null ? "no limit" : count(most));
const until = (expires) => (expires ? new Date(expires).toLocaleString() : "never");

const Usage = ({ usage: { key, limits, models } }) => html`
  <section class="card">
    <h2>${key}</h2>
    <dl class="facts">
      <div><dt>May use</dt><dd><b>${limits.models.join(", ")}</b></dd></div>
      <div><dt>Requests a minute</dt><dd><b>${perMinute(limits.requests_per_minute)}</b></dd></div>
      <div><dt>Tokens a minute</dt><dd><b>${perMinute(limits.tokens_per_minute)}</b></dd></div>
      <div><dt>Expires</dt><dd><b>${until(limits.expires)}</b></dd></div>
    </dl>
    <${Table} caption="What this key has used since the cluster's start" rows=${models}
      columns=${["model", "requests", "inputs", "tokens"]} />
  </section>
`;

const All = ({ keys, rows }) => html`
  <section class="card">
    <h2>All keys</h2>
    <${Table} caption="What all keys have used, as the metrics tell operators" rows=${rows}
      columns=${["key", "model", "requests", "tokens"]} />
    <${Table} caption="What all keys may use" columns=${["key", "models", "requests a minute", "tokens a minute", "expires"]}
      rows=${keys.map(({ key, limits }) => ({
        key,
        models: limits.models.join(", "),
        "requests a minute": perMinute(limits.requests_per_minute),
        "tokens a minute": perMinute(limits.tokens_per_minute),
        expires: until(limits.expires),
      }))} />
  </section>
`;

const Table = ({ caption, columns, rows }) => html`
  <div class="scroll" tabindex="0" role="region" aria-label=${caption}>
    <table>
      <caption>${caption}</caption>
      <thead>
        <tr>${columns.map((name) => html`<th key=${name} scope="col" class=${kind(name)}>${name}</th>`)}</tr>
      </thead>
      <tbody>
        ${rows.map(
          (row, index) => html`
            <tr key=${index}>
              ${columns.map((name) => html`<td key=${name} class=${kind(name)}>
                ${typeof row[name] === "number" ? count(row[name]) : row[name]}</td>`)}
            </tr>
          `,
        )}
        ${!rows.length && html`<tr><td colspan=${columns.length}>Nothing yet.</td></tr>`}
      </tbody>
    </table>
  </div>
`;

const kind = (name) => (["key", "model", "models", "expires"].includes(name) ? "" : "number");
