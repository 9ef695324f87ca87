// A file's rows as points: near each other where the model takes them to be alike.

import { embedAs, embedding, embedRows } from "./api.js";
import { Choice, Code, Failure, html, Score, useMemo, useRef, useState, useWork } from "./parts.js";
import { fewest, groups, longest, MAX_ROWS, readRows, textIn } from "./rows.js";
import { project, ranking, unit } from "./vectors.js";

const WIDTH = 1000;
const HEIGHT = 640;
const MARGIN = 20;
const COLOURS = 10;
const NEIGHBOURS = 5;
const FOUND = 5;
// How near to a point the pointer must be, in the map's own units.
const REACH = 40;
const MAX_BYTES = 20 * 2 ** 20;
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

/** Takes a file, shows its map, and searches in it. */
export function RowMap({ model }) {
  const [file, setFile] = useState(null);
  const [done, setDone] = useState(0);
  const [map, setMap] = useState(null);
  const wanted = useRef(null);
  const { busy, error, run } = useWork();
  const change = (next) => {
    wanted.current = next;
    setFile(next);
    setMap(null);
  };
  const take = (name, text) => {
    const read = readRows(text);
    const column = longest(read.columns, read.rows);
    change({ name, ...read, column, colour: fewest(read.columns, read.rows, column) });
  };
  const embedAll = () =>
    run(async () => {
      setDone(0);
      wanted.current = file;
      const { rows, column } = file;
      // An empty text has no meaning, and no vector.
      const kept = rows.filter((row) => row[column].trim());
      if (!kept.length) throw new Error("There is no text in this column.");
      const texts = kept.map((row) => row[column]);
      const vectors = (await embedRows(model, texts, "document", setDone)).map(unit);
      // Somebody may have dropped another file meanwhile.
      if (wanted.current === file) setMap({ model, rows: kept, texts, vectors, points: place(project(vectors)) });
    });
  return html`
    <${Source} onText=${(name, text) => run(async () => take(name, text))}
      onFile=${(given) => run(async () => take(given.name, await textOf(given)))} />
    ${error && html`<${Failure} error=${error} />`}
    ${file &&
    html`
      <div class="card">
        <p>
          <b>${file.name}</b>: ${file.rows.length} rows, ${file.columns.length} columns
          ${file.left > 0 && html`<span> (the first ${MAX_ROWS}; ${file.left} more are left out)</span>`}
        </p>
        <div class="row">
          <${Columns} label="Text" file=${file} value=${file.column}
            onChange=${(column) => change({ ...file, column })} />
          <${Columns} label="Colour by" file=${file} value=${file.colour} none
            onChange=${(colour) => setFile({ ...file, colour })} />
          <button type="button" disabled=${busy || !model} onClick=${embedAll}>
            ${busy ? `Embedding: ${done} of ${file.rows.length}` : "Draw the map"}
          </button>
        </div>
        ${busy && html`<progress aria-label="Rows embedded" max=${file.rows.length} value=${done}></progress>`}
      </div>
    `}
    <p class="unseen" role="status">${map ? `The map of ${map.rows.length} rows is drawn.` : ""}</p>
    ${map && html`<${Drawn} key=${map.points} map=${map} file=${file} />`}
  `;
}

async function textOf(file) {
  if (file.size > MAX_BYTES) throw new Error("This file is larger than 20 MiB.");
  return textIn(new Uint8Array(await file.arrayBuffer()));
}

/** Where a file is dropped, chosen or pasted. */
function Source({ onText, onFile }) {
  const [over, setOver] = useState(false);
  const [pasted, setPasted] = useState("");
  const drop = (event) => {
    event.preventDefault();
    setOver(false);
    const [file] = event.dataTransfer.files;
    if (file) onFile(file);
    else onText("Dropped text", event.dataTransfer.getData("text/plain"));
  };
  const drag = (event) => {
    event.preventDefault();
    setOver(true);
  };
  return html`
    <div class="card drop ${over ? "over" : ""}" onDragOver=${drag} onDragLeave=${() => setOver(false)} onDrop=${drop}>
      <label class="field wide">
        <span>Drop a file here, or choose one: CSV or JSON lines, up to ${MAX_ROWS} rows</span>
        <input type="file" accept=".csv,.tsv,.json,.jsonl,.ndjson,.txt,text/*"
          onChange=${(event) => event.target.files[0] && onFile(event.target.files[0])} />
      </label>
      <details>
        <summary>Or paste rows</summary>
        <label class="field wide">
          <span>Rows</span>
          <textarea rows="5" value=${pasted} onInput=${(event) => setPasted(event.target.value)}></textarea>
        </label>
        <button type="button" class="quiet" onClick=${() => onText("Pasted rows", pasted)}>Read</button>
      </details>
    </div>
  `;
}

const Columns = ({ label, file, value, none, onChange }) => html`
  <${Choice} label=${label} value=${String(value)} onChange=${(chosen) => onChange(Number(chosen))}
    options=${[...(none ? [["-1", "nothing"]] : []), ...file.columns.map((name, index) => [String(index), name])]} />
`;

/** Return the coordinates as places on the map: one scale for both axes, as distances are to be compared. */
function place(coordinates) {
  const [xs, ys] = [0, 1].map((axis) => coordinates.map((each) => each[axis]));
  const range = (values) => [Math.min(...values), Math.max(...values)];
  const [[left, right], [low, high]] = [range(xs), range(ys)];
  const scale = Math.min((WIDTH - 2 * MARGIN) / (right - left || 1), (HEIGHT - 2 * MARGIN) / (high - low || 1));
  return coordinates.map(([x, y]) => [
    WIDTH / 2 + (x - (left + right) / 2) * scale,
    HEIGHT / 2 - (y - (low + high) / 2) * scale,
  ]);
}

function Drawn({ map, file }) {
  const [chosen, setChosen] = useState(0);
  const [found, setFound] = useState(null);
  const colours = useMemo(() => groups(map.rows, file.colour, COLOURS), [map, file.colour]);
  const near = useMemo(
    () => ranking(map.vectors[chosen], map.vectors).filter(({ index }) => index !== chosen).slice(0, NEIGHBOURS),
    [map, chosen],
  );
  return html`
    <${Finder} map=${map} onFound=${setFound} />
    <div class="split">
      <section class="card">
        <h2>Map</h2>
        <${Picture} map=${map} colours=${colours.of} chosen=${chosen} near=${near} found=${found} onChoose=${setChosen} />
        ${colours.names.length > 0 &&
        html`<ul class="legend" aria-label=${`Colours: ${file.columns[file.colour]}`}>
          ${colours.names.map((name, index) => html`<li key=${index}><i class=${`dot c${index}`}></i>${name}</li>`)}
        </ul>`}
        <p class="faint">The first two principal components of ${map.vectors[0].length} dimensions: what lies near
          in the map may still differ; the similarities don't leave anything out.</p>
      </section>
      <div>
      ${found &&
      html`<section class="card" aria-live="polite">
        <h2>Nearest to “${found.query}”</h2>
        <${Rows} rows=${found.ranked} map=${map} onChoose=${setChosen} />
      </section>`}
      <section class="card">
        <div aria-live="polite">
          <h2>Row ${chosen + 1}</h2>
          <p class="chosen">${map.texts[chosen]}</p>
          <${Cells} row=${map.rows[chosen]} file=${file} />
        </div>
        <h3>Nearest rows</h3>
        <${Rows} rows=${near} map=${map} onChoose=${setChosen} />
      </section>
      </div>
    </div>
    <${Code} body=${found?.body ?? embedding(map.model, [map.texts[chosen]], "")} />
  `;
}

/** The search box. */
function Finder({ map, onFound }) {
  const [query, setQuery] = useState("");
  const { busy, error, run } = useWork();
  const submit = (event) => {
    event.preventDefault();
    const asked = query.trim();
    if (!asked) return;
    run(async () => {
      const { vectors, use } = await embedAs(map.model, [asked], "query");
      const ranked = ranking(unit(vectors[0]), map.vectors).slice(0, FOUND);
      onFound({ query: asked, ranked, body: embedding(map.model, [asked], use) });
    });
  };
  return html`
    <form class="card" role="search" onSubmit=${submit}>
      <div class="row">
        <label class="field wide">
          <span>Search in these rows</span>
          <input type="search" value=${query} onInput=${(event) => setQuery(event.target.value)} />
        </label>
        <button disabled=${busy}>Search</button>
      </div>
      ${error && html`<${Failure} error=${error} />`}
    </form>
  `;
}

/** Rows with their similarity; each can be shown on the map. */
const Rows = ({ rows, map, onChoose }) => html`
  <ol class="ranking">
    ${rows.map(
      ({ index, score }) => html`
        <li key=${index}>
          <${Score} value=${score} />
          <button type="button" class="text" onClick=${() => onChoose(index)}>${map.texts[index]}</button>
        </li>
      `,
    )}
  </ol>
`;

const Cells = ({ row, file }) => html`
  <dl class="cells">
    ${file.columns.map(
      (name, index) =>
        index !== file.column && html`<div key=${index}><dt>${name}</dt><dd>${row[index] || "–"}</dd></div>`,
    )}
  </dl>
`;

/** The points. Arrow keys go from point to point, as the pointer does. */
function Picture({ map, colours, chosen, near, found, onChoose }) {
  const svg = useRef(null);
  const points = useMemo(
    () => map.points.map(([x, y], index) => html`<circle key=${index} class=${`dot c${colours[index]}`} cx=${x} cy=${y} r="5" />`),
    [map, colours],
  );
  const move = (event) => {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.current.getScreenCTM().inverse());
    const index = nearest(map.points, [at.x, at.y], () => true);
    if (Math.hypot(map.points[index][0] - at.x, map.points[index][1] - at.y) < REACH) onChoose(index);
  };
  const press = (event) => {
    const arrow = ARROWS[event.key];
    if (!arrow) return;
    event.preventDefault();
    const [x, y] = map.points[chosen];
    // Within 45 degrees of the arrow.
    const ahead = ([px, py]) => {
      const along = (px - x) * arrow[0] + (py - y) * arrow[1];
      return along > 0 && along >= Math.hypot(px - x, py - y) * Math.SQRT1_2;
    };
    const index = nearest(map.points, [x, y], ahead);
    if (index >= 0) onChoose(index);
  };
  const ring = (index, kind) => {
    const [x, y] = map.points[index];
    return html`<circle key=${`${kind} ${index}`} class=${kind} cx=${x} cy=${y} r="9" />`;
  };
  const [x, y] = map.points[chosen];
  return html`
    <div class="map" tabindex="0" role="group" aria-label="Map of the rows: arrow keys go from point to point" onKeyDown=${press}>
      <svg ref=${svg} role="img" aria-label=${`${map.points.length} points`} viewBox="0 0 ${WIDTH} ${HEIGHT}"
        onPointerMove=${move} onPointerDown=${move}>
        ${near.map(
          ({ index }) => html`<line key=${index} x1=${x} y1=${y} x2=${map.points[index][0]} y2=${map.points[index][1]} />`,
        )}
        <g>${points}</g>
        ${found?.ranked.map(({ index }) => ring(index, "found"))}
        ${near.map(({ index }) => ring(index, "near"))} ${ring(chosen, "chosen")}
      </svg>
    </div>
  `;
}

/** Return the index of the nearest of the points that are wanted; -1 of none. */
function nearest(points, [x, y], wanted) {
  let best = -1;
  let least = Infinity;
  points.forEach((point, index) => {
    const distance = Math.hypot(point[0] - x, point[1] - y);
    if (distance < least && wanted(point)) [best, least] = [index, distance];
  });
  return best;
}
