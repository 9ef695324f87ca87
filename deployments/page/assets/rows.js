// A file of rows as people have it: CSV with whatever separator, JSON lines, or a text on each line.

import "./vendor/papaparse.js";

const { Papa } = globalThis;
/** The most rows of a map. */
export const MAX_ROWS = 1000;
const COLUMN = "text";
// As a file of UTF-16 begins, Excel's "Unicode text" for one.
const MARKS = { "255,254": "utf-16le", "254,255": "utf-16be" };

/** Return the text that a file's bytes are: UTF-8, or UTF-16 where its mark says so. */
export const textIn = (bytes) => new TextDecoder(MARKS[bytes.slice(0, 2).join()]).decode(bytes);

/** Return {columns, rows, left}: each row an array of texts; `left` counts those beyond the most. */
export function readRows(text) {
  const plain = text.replace(/^\ufeff/, "");
  const found = /^\s*[{["]/.test(plain) ? (jsonRows(plain) ?? csvRows(plain)) : csvRows(plain);
  const rows = found.rows.filter((row) => row.some((cell) => cell.trim()));
  if (!rows.length) throw new Error("There is no row in this.");
  return { columns: found.columns, rows: rows.slice(0, MAX_ROWS), left: Math.max(0, rows.length - MAX_ROWS) };
}

/** Return the rows of JSON lines, or of one JSON array; null where it isn't that. */
function jsonRows(text) {
  let values;
  try {
    values = text.split("\n").filter((line) => line.trim()).map((line) => JSON.parse(line));
  } catch {
    try {
      values = JSON.parse(text);
    } catch {
      return null;
    }
  }
  if (values.length === 1 && Array.isArray(values[0])) [values] = values;
  if (!Array.isArray(values)) return null;
  const records = values.map((value) =>
    value !== null && typeof value === "object" && !Array.isArray(value) ? value : { [COLUMN]: value });
  const columns = [...new Set(records.flatMap(Object.keys))];
  // A column may be named as something that all objects have.
  const own = (record, name) => (Object.hasOwn(record, name) ? record[name] : null);
  return { columns, rows: records.map((record) => columns.map((name) => cell(own(record, name)))) };
}

const cell = (value) =>
  value === null || value === undefined ? "" : typeof value === "string" ? value : JSON.stringify(value);

function csvRows(text) {
  const { data } = Papa.parse(text, { skipEmptyLines: "greedy" });
  const [first = [], ...rest] = data;
  // One column without a name that looks like one: a text on each line.
  if (data.every((row) => row.length === 1) && first[0]?.trim().includes(" ")) {
    return { columns: [COLUMN], rows: data };
  }
  const columns = first.map((name, index) => name.trim() || `column ${index + 1}`);
  return { columns, rows: rest.map((row) => columns.map((_, index) => row[index] ?? "")) };
}

/** Return the index of the column that holds the longest texts. */
export function longest(columns, rows) {
  const sizes = columns.map((_, index) => rows.reduce((sum, row) => sum + row[index].length, 0));
  return sizes.indexOf(Math.max(...sizes));
}

/** Return the column to colour by at first: the one with the fewest values, of those with more than one. */
export function fewest(columns, rows, besides) {
  const kinds = columns.map((_, index) => new Set(rows.map((row) => row[index])).size);
  const able = kinds.map((_, index) => index).filter((index) => index !== besides && kinds[index] > 1);
  return able.sort((a, b) => kinds[a] - kinds[b])[0] ?? -1;
}

/** Return each row's group by a column's values, and the groups' names: the most frequent, or ranges of numbers. */
export function groups(rows, column, most) {
  if (column < 0) return { of: rows.map(() => 0), names: [] };
  const values = rows.map((row) => row[column].trim());
  const counts = new Map();
  for (const value of values) counts.set(value, (counts.get(value) ?? 0) + 1);
  const numbers = values.filter(Boolean).map(Number);
  if (counts.size > most && numbers.every(Number.isFinite)) return ranges(values, numbers, most);
  const names = [...counts].sort((a, b) => b[1] - a[1]).map(([name]) => name);
  const shown = names.length > most ? [...names.slice(0, most - 1), null] : names;
  const place = new Map(names.map((name, index) => [name, Math.min(index, shown.length - 1)]));
  const titles = shown.map((name) => (name === null ? "others" : name || "(empty)"));
  return { of: values.map((value) => place.get(value)), names: titles };
}

function ranges(values, numbers, most) {
  const sorted = numbers.toSorted((a, b) => a - b);
  const size = Math.min(5, most - 1);
  const bounds = Array.from({ length: size }, (_, i) => sorted[Math.floor((i * sorted.length) / size)]);
  const names = bounds.map((bound, i) => (i + 1 < size ? `${bound} to ${bounds[i + 1]}` : `${bound} and more`));
  const of = values.map((value) => (value ? bounds.findLastIndex((bound) => Number(value) >= bound) : size));
  return { of, names: values.includes("") ? [...names, "(empty)"] : names };
}
