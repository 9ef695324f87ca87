// A small plot of the last minutes: one or two lines over time.

import { html, useState } from "./parts.js";

const WIDTH = 300;
const HEIGHT = 64;

/** Return a path through the numbers, with a gap where there is none. */
function path(numbers, top) {
  const step = WIDTH / (numbers.length - 1);
  let pen = "M";
  let found = "";
  numbers.forEach((value, index) => {
    if (value === null) {
      pen = "M";
      return;
    }
    const y = HEIGHT - 1 - (value / top) * (HEIGHT - 4);
    // A lone number is a dot: round ends make one of a line of no length.
    found += `${pen}${(index * step).toFixed(1)} ${y.toFixed(1)}${pen === "M" ? "h0" : ""}`;
    pen = "L";
  });
  return found;
}

/** Return the ground below a path without gaps. */
const below = (numbers, top) => `${path(numbers, top)}V${HEIGHT}H0Z`;

const lastOf = (numbers) => numbers.findLast((value) => value !== null) ?? null;

/**
 * Lines over the slots of a quarter of an hour.
 *
 * `lines` are {name, numbers, kind}, the latest number last; `shown` makes text of a number.
 */
export function Plot({ title, lines, shown, slotSeconds }) {
  const [place, setPlace] = useState(null);
  const length = lines[0].numbers.length;
  const all = lines.flatMap(({ numbers }) => numbers).filter((value) => value !== null);
  const most = Math.max(0, ...all);
  const top = most || 1;
  const at = (numbers) => (place === null ? lastOf(numbers) : numbers[place]);
  const told = (value) => (value === null ? "–" : shown(value));
  const ago = place === null ? "" : `${Math.round(((length - place) * slotSeconds) / 6) / 10} min ago`;
  const move = (event) => {
    const box = event.currentTarget.getBoundingClientRect();
    const share = (event.clientX - box.left) / box.width;
    setPlace(Math.min(length - 1, Math.max(0, Math.round(share * (length - 1)))));
  };
  const label = lines
    .map(({ name, numbers }) => `${name || title}: now ${told(lastOf(numbers))}`)
    .concat(all.length ? [`at most ${shown(most)}`] : [])
    .join(", ");
  return html`
    <figure class="plot">
      <figcaption>
        <span class="title">${title}</span>
        ${lines.map(
          ({ name, numbers, kind }) => html`
            <span class="value ${kind}" key=${name}>${name} <b>${told(at(numbers))}</b></span>
          `,
        )}
      </figcaption>
      <svg role="img" aria-label=${`${title}. ${label}`} viewBox="0 0 ${WIDTH} ${HEIGHT}" preserveAspectRatio="none"
        onPointerMove=${move} onPointerLeave=${() => setPlace(null)}>
        <line class="ground" x1="0" x2=${WIDTH} y1=${HEIGHT - 1} y2=${HEIGHT - 1} />
        ${lines.length === 1 && html`<path class="below ${lines[0].kind}" d=${below(lines[0].numbers, top)} />`}
        ${lines.map(({ name, numbers, kind }) => html`<path key=${name} class=${kind} d=${path(numbers, top)} />`)}
        ${place !== null &&
        html`<line class="cursor" x1=${(place * WIDTH) / (length - 1)} x2=${(place * WIDTH) / (length - 1)}
          y1="0" y2=${HEIGHT} />`}
      </svg>
      <div class="scale" aria-hidden="true">
        <span>${ago || `${Math.round((length * slotSeconds) / 60)} min ago`}</span>
        <span>${all.length ? `at most ${shown(most)}` : "nothing yet"}</span>
        <span>now</span>
      </div>
    </figure>
  `;
}
