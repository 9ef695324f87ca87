// The page's frame: four views behind their addresses, and the question for a key.

import { get, hasKey, onLocked, Refusal, setKey } from "./api.js";
import { Failure, html, render, useEffect, useState } from "./parts.js";

// A view's files are fetched when it is first shown: the first view needs no others.
const VIEWS = [
  ["models", "Models", async () => (await import("./models.js")).Models],
  ["try", "Try it", async () => (await import("./try.js")).Try],
  ["batches", "Batches", async () => (await import("./batches.js")).Batches],
  ["keys", "Keys", async () => (await import("./keys.js")).Keys],
];

/** Return the view and the tool in it that an address names: `#try-map`. */
function routed() {
  const [view, tool = "texts"] = location.hash.slice(1).split("-");
  return VIEWS.some(([name]) => name === view) ? { view, tool } : { view: "models", tool: "texts" };
}

function Page() {
  const [{ view, tool }, setRoute] = useState(routed);
  const [refusal, setRefusal] = useState(null);
  // What was entered and found stays while another view is shown.
  const [visited, setVisited] = useState({});
  useEffect(() => {
    addEventListener("hashchange", () => location.hash !== "#content" && setRoute(routed()));
    onLocked(setRefusal);
  }, []);
  useEffect(() => {
    setVisited((before) => ({ ...before, [view]: true }));
    document.title = `${VIEWS.find(([name]) => name === view)[1]} – Embedding cluster`;
  }, [view]);
  const forget = () => {
    setKey("");
    setVisited({ [view]: true });
    setRefusal({ message: "The key is forgotten.", calm: true });
  };
  return html`
    <a class="skip" href="#content">To the content</a>
    <header class="top">
      <span class="name">Embedding cluster</span>
      <nav aria-label="Views">
        ${VIEWS.map(
          ([name, title]) => html`
            <a key=${name} href=${`#${name}`} aria-current=${name === view ? "page" : undefined}>${title}</a>
          `,
        )}
      </nav>
      <span class="aside">
        <a href="docs">API</a>
        ${hasKey() && !refusal && html`<button type="button" class="quiet" onClick=${forget}>Forget the key</button>`}
      </span>
    </header>
    <main id="content" tabindex="-1">
      ${refusal
        ? html`<${SignIn} refusal=${refusal} onOpen=${() => setRefusal(null)} />`
        : VIEWS.map(
            ([name, , load]) =>
              (visited[name] || name === view) &&
              html`<div key=${name} hidden=${name !== view}><${View} load=${load} active=${name === view} tool=${tool} /></div>`,
          )}
    </main>
  `;
}

/** A view, once its files are there. */
function View({ load, ...given }) {
  const [loaded, setLoaded] = useState({});
  useEffect(() => {
    load().then(
      (component) => setLoaded({ component }),
      () => setLoaded({ error: new Refusal("The cluster doesn't answer: reload the page.") }),
    );
  }, []);
  if (loaded.error) return html`<${Failure} error=${loaded.error} />`;
  return loaded.component ? html`<${loaded.component} ...${given} />` : null;
}

/** Asks for a key, and stays until the cluster takes it. */
function SignIn({ refusal, onOpen }) {
  const [told, setTold] = useState(refusal);
  const [busy, setBusy] = useState(false);
  const submit = async (event) => {
    event.preventDefault();
    setBusy(true);
    try {
      setKey(new FormData(event.target).get("key"));
      await get("models");
      onOpen();
    } catch (error) {
      setTold(error);
      setBusy(false);
    }
  };
  return html`
    <form class="card signin" onSubmit=${submit}>
      <h1>A key is needed</h1>
      <p class="notice ${told.calm ? "" : "bad"}" role="alert">${told.status ? `${told.status}: ` : ""}${told.message}</p>
      <label class="field wide">
        <span>Key</span>
        <input name="key" type="password" autocomplete="off" required autofocus />
      </label>
      <button disabled=${busy}>Go on</button>
      <p class="faint">It stays in this page's memory, and is gone when you reload or close it.</p>
    </form>
  `;
}

render(html`<${Page} />`, document.getElementById("page"));
