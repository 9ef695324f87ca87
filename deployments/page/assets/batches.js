// Files and batches of this key: what runs, what came out of it, and what to run next.

import { ask, get, post } from "./api.js";
import { count, date, Failure, html, size, usePolling, useState, useWork } from "./parts.js";

const SECONDS = 2;
// Where nothing runs, something new can only come from elsewhere.
const IDLE_SECONDS = 15;
const RUNNING = new Set(["validating", "in_progress", "finalizing", "cancelling"]);
const TONES = { completed: "good", failed: "bad", expired: "bad" };
const MOST = 100;

/** The view. */
export function Batches({ active }) {
  const [told, setTold] = useState(null);
  const [error, setError] = useState(null);
  const work = useWork();
  const look = async () => {
    try {
      const [batches, files] = await Promise.all([get(`batches?limit=${MOST}`), get(`files?limit=${MOST}`)]);
      setTold({ batches: batches.data, files: files.data });
      setError(null);
    } catch (failure) {
      setError(failure.status === 404 ? new Error("This cluster keeps no files and batches.") : failure);
    }
  };
  const runs = told?.batches.some(({ status }) => RUNNING.has(status));
  usePolling(active, runs ? SECONDS : IDLE_SECONDS, look);
  const change = (step) =>
    work.run(async () => {
      try {
        await step();
      } finally {
        await look();
      }
    });
  return html`
    <h1>Batches</h1>
    ${error && html`<${Failure} error=${error} />`}
    ${!told && !error && html`<p role="status">Looking …</p>`}
    ${told && html`<${Upload} busy=${work.busy} change=${change} />`}
    ${work.error && html`<${Failure} error=${work.error} />`}
    ${told && html`<${List} batches=${told.batches} change=${change} />`}
    ${told && html`<${Files} files=${told.files} change=${change} />`}
  `;
}

function Upload({ busy, change }) {
  const [file, setFile] = useState(null);
  const submit = (event) => {
    event.preventDefault();
    const form = new FormData();
    form.append("purpose", "batch");
    form.append("file", file);
    const input = event.target;
    change(async () => {
      const stored = await (await ask("files", { method: "POST", body: form })).json();
      await post("batches", { input_file_id: stored.id, endpoint: "/v1/embeddings", completion_window: "24h" });
      input.reset();
      setFile(null);
    });
  };
  return html`
    <form class="card" onSubmit=${submit}>
      <div class="row">
        <label class="field wide">
          <span>A file of requests, one on each line, as OpenAI's Batch API has them</span>
          <input type="file" accept=".jsonl" onChange=${(event) => setFile(event.target.files[0] ?? null)} />
        </label>
        <button disabled=${busy || !file}>${busy ? "Sending …" : "Upload and run"}</button>
      </div>
    </form>
  `;
}

const List = ({ batches, change }) => html`
  <section class="card">
    <h2>Batches</h2>
    <div class="scroll" tabindex="0" role="region" aria-label="Batches">
      <table>
        <caption>The newest first</caption>
        <thead>
          <tr>
            <th scope="col">Batch</th>
            <th scope="col">Status</th>
            <th scope="col">Progress</th>
            <th scope="col">Created</th>
            <th scope="col">What to do</th>
          </tr>
        </thead>
        <tbody>
          ${batches.map((batch) => html`<${Batch} key=${batch.id} batch=${batch} change=${change} />`)}
          ${!batches.length && html`<tr><td colspan="5">There is none yet.</td></tr>`}
        </tbody>
      </table>
    </div>
  </section>
`;

function Batch({ batch, change }) {
  const { total, completed, failed } = batch.request_counts;
  const fetchFile = (id, name) => change(() => download(id, name));
  return html`
    <tr>
      <td>
        <code>${batch.id}</code>
        <div class="faint">${batch.model ?? ""}</div>
        ${Object.entries(batch.metadata ?? {}).map(([name, value]) => html`<div class="faint" key=${name}>${name}: ${value}</div>`)}
      </td>
      <td>
        <span class="pill ${TONES[batch.status] ?? ""}" role="status">${batch.status.replace("_", " ")}</span>
        ${batch.errors?.data.map(
          ({ line, message }, index) => html`<div class="wrong" key=${index}>${line ? `line ${line}: ` : ""}${message}</div>`,
        )}
      </td>
      <td>
        ${total > 0 && html`<progress aria-label="Lines done" max=${total} value=${completed + failed}></progress>`}
        <div>${count(completed)} of ${count(total)}${failed > 0 && html`, <span class="wrong">${count(failed)} failed</span>`}</div>
      </td>
      <td class="date">${date(batch.created_at)}</td>
      <td class="actions">
        ${batch.output_file_id &&
        html`<button type="button" class="quiet" onClick=${() => fetchFile(batch.output_file_id, `${batch.id}.jsonl`)}>
          Output<span class="unseen"> of ${batch.id}</span></button>`}
        ${batch.error_file_id &&
        html`<button type="button" class="quiet" onClick=${() => fetchFile(batch.error_file_id, `${batch.id}.errors.jsonl`)}>
          Errors<span class="unseen"> of ${batch.id}</span></button>`}
        ${RUNNING.has(batch.status) && batch.status !== "cancelling" &&
        html`<button type="button" class="quiet" onClick=${() => change(() => post(`batches/${batch.id}/cancel`, {}))}>
          Cancel<span class="unseen"> ${batch.id}</span></button>`}
      </td>
    </tr>
  `;
}

const Files = ({ files, change }) => html`
  <section class="card">
    <h2>Files</h2>
    <div class="scroll" tabindex="0" role="region" aria-label="Files">
      <table>
        <caption>The newest first</caption>
        <thead>
          <tr>
            <th scope="col">Name</th>
            <th scope="col" class="number">Size</th>
            <th scope="col">For</th>
            <th scope="col">Created</th>
            <th scope="col">What to do</th>
          </tr>
        </thead>
        <tbody>
          ${files.map(
            (file) => html`
              <tr key=${file.id}>
                <td>${file.filename}<div class="faint"><code>${file.id}</code></div></td>
                <td class="number">${size(file.bytes)}</td>
                <td>${file.purpose.replace("_", " ")}</td>
                <td class="date">${date(file.created_at)}</td>
                <td class="actions">
                  <button type="button" class="quiet" onClick=${() => change(() => download(file.id, file.filename))}>
                    Download<span class="unseen"> ${file.filename}</span></button>
                  <button type="button" class="quiet" onClick=${() => change(() => ask(`files/${file.id}`, { method: "DELETE" }))}>
                    Delete<span class="unseen"> ${file.filename}</span></button>
                </td>
              </tr>
            `,
          )}
          ${!files.length && html`<tr><td colspan="5">There is none yet.</td></tr>`}
        </tbody>
      </table>
    </div>
  </section>
`;

/** Save a file. A link alone would carry no key. */
async function download(id, name) {
  const url = URL.createObjectURL(await (await ask(`files/${id}/content`)).blob());
  const link = document.createElement("a");
  link.href = url;
  link.download = name;
  link.click();
  URL.revokeObjectURL(url);
}
