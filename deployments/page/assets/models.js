// Each model's last minutes, and on top of them what isn't well.

import { get } from "./api.js";
import { count, Failure, html, time, useEffect, usePolling, useState } from "./parts.js";
import { Plot } from "./plot.js";

// What is told of the cluster is up to five seconds old: asking more often would show nothing new.
const SECONDS = 5;

/** All models that the key may use. */
export function Models({ active }) {
  const [status, setStatus] = useState(null);
  const [error, setError] = useState(null);
  const [listed, setListed] = useState({});
  usePolling(active, SECONDS, async () => {
    try {
      setStatus(await get("status"));
      setError(null);
    } catch (failure) {
      setError(failure);
    }
  });
  const names = status ? status.models.flatMap((each) => each.models).join("\n") : "";
  useEffect(() => {
    if (!names) return;
    get("models").then(
      ({ data }) => setListed(Object.fromEntries(data.map((each) => [each.id, each]))),
      () => {}, // What it tells is beside the numbers; the next question tells what is wrong.
    );
  }, [names]);
  return html`
    <h1>Models</h1>
    ${error && html`<${Failure} error=${error} />`}
    ${status ? html`<${Health} status=${status} />` : !error && html`<p role="status">Looking …</p>`}
    ${status?.models.map((each) => html`<${Model} key=${each.deployment} model=${each} listed=${listed}
      slotSeconds=${status.slot_seconds} />`)}
    ${status?.errors && html`<${Others} status=${status} />`}
  `;
}

/** What `/ready` complains of, with what to do; else that all is well. */
const Health = ({ status }) => html`
  <div role="status">
    ${status.problems.map(
      ({ deployment, what, action }) => html`
        <div class="notice bad" key=${`${deployment} ${what}`}>
          <p><b>${deployment}</b>: ${what}</p>
          <p class="action">${action}</p>
        </div>
      `,
    )}
    ${!status.problems.length &&
    html`<p class="notice ${status.models.length ? "good" : ""}">
      ${status.models.length ? "Every model answers." : "There is no model that this key may use."}
    </p>`}
  </div>
`;

const Model = ({ model, listed, slotSeconds }) => html`
  <article class="card" aria-label=${model.deployment}>
    <header class="row">
      <h2>${model.deployment}</h2>
      <span class="pill ${model.ready ? "good" : "bad"}">${model.ready ? "ready" : "not ready"}</span>
      <span class="faint">${model.engine}, version ${String(model.version)}</span>
      <span class="faint">${replicas(model.replicas)}</span>
    </header>
    <${Names} model=${model} listed=${listed} />
    <dl class="facts">
      <${Load} model=${model} />
      <${Fact} name="Tokens under way" value=${count(model.outstanding_tokens)}
        more=${`${count(model.queued_tokens)} waiting`} />
      <${Fact} name="Median time" value=${time(model.p50_seconds)} more="of 5 minutes" />
      <${Fact} name="99th percentile" value=${time(model.p99_seconds)} more="of 5 minutes" />
      <${Fact} name="Requests" value=${count(model.requests)}
        more=${`${count(model.inputs)} inputs, ${count(model.tokens)} tokens`} />
      <${Fact} name="Batch lines" value=${count(model.batch_lines)} more="done" />
      <${Fact} name="Cache hits" value=${count(model.cache_hits)} more="inputs" />
      <${Fact} name="Cold starts" value=${count(model.cold_starts)} more=${`${count(model.cancelled)} cancelled`} />
    </dl>
    <${Errors} title="Errors of requests" errors=${model.errors} />
    <${Errors} title="Errors of batch lines" errors=${model.batch_errors} />
    <${Plots} series=${model.series} slotSeconds=${slotSeconds} />
  </article>
`;

const replicas = (states) => {
  const told = Object.entries(states).map(([state, number]) => `${number} ${state}`);
  return told.length ? `replicas: ${told.join(", ")}` : "no replica yet";
};

/** The public names, with what the worker file says of each; one that is the deployment's own says no more. */
function Names({ model, listed }) {
  const told = model.models.map((name) => ({ name, ...listed[name] }));
  return html`
    <ul class="names">
      ${told.map(
        ({ name, description, max_model_len: longest }) => html`
          <li key=${name}>
            <code>${name}</code>
            ${longest ? html`<span class="faint"> up to ${count(longest)} tokens</span>` : ""}
            ${description ? html`<span> – ${description}</span>` : ""}
          </li>
        `,
      )}
    </ul>
  `;
}

const Fact = ({ name, value, more }) => html`
  <div>
    <dt>${name}</dt>
    <dd><b>${value}</b>${more && html`<span class="faint">${more}</span>`}</dd>
  </div>
`;

/** Tokens per second against what the replicas can do, once that is measured. */
function Load({ model }) {
  const most = model.capacity_tokens_per_second;
  const share = most ? Math.min(1, model.tokens_per_second / most) : 0;
  return html`
    <div>
      <dt>Tokens per second</dt>
      <dd>
        <b>${count(model.tokens_per_second)}</b>
        <span class="faint">${most ? `of ${count(most)} that it can do` : "of the last minute"}</span>
        ${most && html`<span class="bar" aria-hidden="true"><span style=${{ width: `${share * 100}%` }}></span></span>`}
      </dd>
    </div>
  `;
}

const Errors = ({ title, errors }) =>
  Object.keys(errors).length > 0 &&
  html`
    <p class="errors">
      <b>${title}:</b>
      ${Object.entries(errors).map(([code, number]) => html`<span key=${code}> ${count(number)} <code>${code}</code></span>`)}
    </p>
  `;

function Plots({ series, slotSeconds }) {
  const perSecond = (numbers) => numbers.map((value) => value / slotSeconds);
  const one = (title, numbers, shown = count, kind = "first") => ({ title, shown, lines: [{ name: "", numbers, kind }] });
  const plots = [
    one("Requests per second", perSecond(series.requests)),
    one("Tokens per second", perSecond(series.tokens)),
    {
      title: "Time",
      shown: time,
      lines: [
        { name: "p50", numbers: series.p50_seconds, kind: "first" },
        { name: "p99", numbers: series.p99_seconds, kind: "second" },
      ],
    },
    {
      title: "Tokens",
      shown: count,
      lines: [
        { name: "under way", numbers: series.outstanding_tokens, kind: "first" },
        { name: "waiting", numbers: series.queued_tokens, kind: "second" },
      ],
    },
    one("Errors", series.errors, count, "wrong"),
    one("Replicas", series.replicas),
  ];
  return html`
    <div class="plots">
      ${plots.map((each) => html`<${Plot} key=${each.title} ...${each} slotSeconds=${slotSeconds} />`)}
    </div>
  `;
}

/** What an operator sees besides: requests of no key or no model. */
const Others = ({ status }) => html`
  <p class="faint">
    ${status.ingress_replicas} ingress ${status.ingress_replicas === 1 ? "replica" : "replicas"}.
    Numbers without a time are of the last ${status.seconds / 60} minutes.
  </p>
  <${Errors} title="Requests without a valid key, or of no model" errors=${status.errors} />
`;
