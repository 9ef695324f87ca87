// Does the model find what is meant? Texts against each other, a query against documents, a file as a map.

import { embed, embedAs, embedding, get } from "./api.js";
import { RowMap } from "./map.js";
import { Choice, Code, Failure, html, Score, useEffect, useState, useWork } from "./parts.js";
import { cosine, ranking, unit } from "./vectors.js";

const MAX_TEXTS = 50;
const MAX_PAIRS = 5;
const TEXTS = `The cat sleeps on the sofa.
How do I reset my password?
The stock market fell sharply today.
A kitten naps on the couch.
I forgot my login and need a new one.
It rained all day in the mountains.`;
const QUERY = "How long do I have to send something back?";
const DOCUMENTS = `Our office is open from nine to five.
Goods may be returned within thirty days of purchase.
We ship to all countries of the European Union.
Please keep your receipt as proof of payment.`;
const TOOLS = [
  ["texts", "Compare texts"],
  ["search", "Query against documents"],
  ["map", "Map of a file"],
];

/** The view, with one of its three tools. */
export function Try({ active, tool }) {
  const [models, setModels] = useState(null);
  const [model, setModel] = useState("");
  const [error, setError] = useState(null);
  useEffect(() => {
    if (!active) return;
    get("models").then(({ data }) => {
      const able = data.filter((each) => each.embedding_task.supported).map((each) => each.id);
      setModels(able);
      setModel((before) => (able.includes(before) ? before : (able[0] ?? "")));
      setError(null);
    }, setError);
  }, [active]);
  return html`
    <h1>Try it</h1>
    <nav class="tools" aria-label="Ways to try it">
      ${TOOLS.map(
        ([name, title]) => html`
          <a key=${name} href=${`#try-${name}`} aria-current=${name === tool ? "page" : undefined}>${title}</a>
        `,
      )}
    </nav>
    ${error && html`<${Failure} error=${error} />`}
    ${models?.length === 0 && html`<p class="notice">There is no model that this key may use.</p>`}
    <${Choice} label="Model" value=${model} options=${(models ?? []).map((name) => [name, name])} onChange=${setModel} />
    <section hidden=${tool !== "texts"}><${Texts} model=${model} /></section>
    <section hidden=${tool !== "search"}><${Search} model=${model} /></section>
    <section hidden=${tool !== "map"}><${RowMap} model=${model} /></section>
  `;
}

const linesOf = (text) => text.split("\n").map((line) => line.trim()).filter(Boolean);

// --- texts against each other ----------------------------------------------------------------------

function Texts({ model }) {
  const [text, setText] = useState(TEXTS);
  const [result, setResult] = useState(null);
  const { busy, error, run } = useWork();
  const submit = (event) => {
    event.preventDefault();
    run(async () => {
      const texts = linesOf(text);
      if (texts.length < 2) throw new Error("Two texts at least, one on each line.");
      if (texts.length > MAX_TEXTS) throw new Error(`At most ${MAX_TEXTS} texts here; a map takes more.`);
      const body = embedding(model, texts, "");
      const vectors = (await embed(body)).map(unit);
      setResult({ texts, body, scores: vectors.map((a) => vectors.map((b) => cosine(a, b))) });
    });
  };
  return html`
    <form class="card" onSubmit=${submit}>
      <label class="field wide">
        <span>Texts, one on each line</span>
        <textarea rows="7" value=${text} onInput=${(event) => setText(event.target.value)}></textarea>
      </label>
      <button disabled=${busy || !model}>${busy ? "Embedding …" : "Compare"}</button>
      ${error && html`<${Failure} error=${error} />`}
    </form>
    <div aria-live="polite">
      ${result && html`<div class="split even"><${Matrix} ...${result} /><${Pairs} ...${result} /></div>`}
    </div>
    ${result && html`<${Code} body=${result.body} />`}
  `;
}

function Pairs({ texts, scores }) {
  const pairs = texts
    .flatMap((_, a) => texts.slice(a + 1).map((__, after) => ({ a, b: a + 1 + after })))
    .map(({ a, b }) => ({ a, b, score: scores[a][b] }))
    .sort((one, other) => other.score - one.score)
    .slice(0, MAX_PAIRS);
  return html`
    <section class="card">
      <h2>Nearest pairs</h2>
      <ol class="ranking">
        ${pairs.map(
          ({ a, b, score }) => html`
            <li key=${`${a} ${b}`}>
              <${Score} value=${score} />
              <span class="pair"><span>${texts[a]}</span><span>${texts[b]}</span></span>
            </li>
          `,
        )}
      </ol>
    </section>
  `;
}

const Matrix = ({ texts, scores }) => html`
  <section class="card">
    <h2>Similarities</h2>
    <div class="scroll" tabindex="0" role="region" aria-label="Similarities of all texts">
      <table class="matrix">
        <caption>Cosine of each text with each other one</caption>
        <thead>
          <tr>
            <td></td>
            ${texts.map((text, index) => html`<th key=${index} scope="col" title=${text}>${index + 1}</th>`)}
          </tr>
        </thead>
        <tbody>
          ${texts.map(
            (text, row) => html`
              <tr key=${row}>
                <th scope="row"><span class="faint">${row + 1}</span> ${text}</th>
                ${scores[row].map(
                  (score, column) => html`
                    <td key=${column} style=${{ "--share": `${Math.max(0, score) * 45}%` }}>${score.toFixed(2)}</td>
                  `,
                )}
              </tr>
            `,
          )}
        </tbody>
      </table>
    </div>
  </section>
`;

// --- a query against documents ---------------------------------------------------------------------

function Search({ model }) {
  const [query, setQuery] = useState(QUERY);
  const [documents, setDocuments] = useState(DOCUMENTS);
  const [uses, setUses] = useState({ query: "query", documents: "document" });
  const [result, setResult] = useState(null);
  const { busy, error, run } = useWork();
  const submit = (event) => {
    event.preventDefault();
    run(async () => {
      const texts = linesOf(documents);
      if (!query.trim() || !texts.length) throw new Error("A query, and one document at least.");
      const asked = await embedAs(model, [query.trim()], uses.query);
      const found = await embedAs(model, texts, uses.documents);
      setResult({
        ranked: ranking(unit(asked.vectors[0]), found.vectors.map(unit)).map((each) => ({
          ...each,
          text: texts[each.index],
        })),
        without: [uses.query !== asked.use && uses.query, uses.documents !== found.use && uses.documents],
        body: embedding(model, [query.trim()], asked.use),
      });
    });
  };
  const prompt = (side, label) => html`
    <label class="field">
      <span>${label}</span>
      <input value=${uses[side]} placeholder="none" spellcheck=${false} autocomplete="off"
        onInput=${(event) => setUses({ ...uses, [side]: event.target.value.trim() })} />
    </label>
  `;
  return html`
    <form class="card" onSubmit=${submit}>
      <label class="field wide">
        <span>Query</span>
        <input value=${query} onInput=${(event) => setQuery(event.target.value)} />
      </label>
      <label class="field wide">
        <span>Documents, one on each line</span>
        <textarea rows="6" value=${documents} onInput=${(event) => setDocuments(event.target.value)}></textarea>
      </label>
      <div class="row">
        ${prompt("query", "Prompt for the query")} ${prompt("documents", "Prompt for documents")}
      </div>
      <button disabled=${busy || !model}>${busy ? "Embedding …" : "Rank"}</button>
      ${error && html`<${Failure} error=${error} />`}
    </form>
    <div aria-live="polite">${result && html`<${Ranked} ...${result} />`}</div>
    ${result && html`<${Code} body=${result.body} />`}
  `;
}

const Ranked = ({ ranked, without }) => html`
  <section class="card">
    <h2>Documents by similarity</h2>
    ${without.filter(Boolean).map(
      (name) => html`<p class="faint" key=${name}>The model has no prompt “${name}”: none was used.</p>`,
    )}
    <ol class="ranking">
      ${ranked.map(({ index, score, text }) => html`<li key=${index}><${Score} value=${score} /><span>${text}</span></li>`)}
    </ol>
  </section>
`;
