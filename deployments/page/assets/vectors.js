// What is computed of vectors here: similarities, and two dimensions of many.

// Power iteration has settled by then where the first two components stand out at all.
const STEPS = 60;

const dot = (a, b) => {
  let sum = 0;
  for (let i = 0; i < a.length; i += 1) sum += a[i] * b[i];
  return sum;
};

/** Return a vector of unit length; zeros stay as they are. */
export function unit(vector) {
  const length = Math.sqrt(dot(vector, vector)) || 1;
  return vector.map((value) => value / length);
}

/** Return the cosine of two vectors of unit length. */
export const cosine = dot;

/** Return the indices of the vectors by their cosine with one, the largest first, and those cosines. */
export function ranking(query, vectors) {
  return vectors
    .map((vector, index) => ({ index, score: cosine(query, vector) }))
    .sort((a, b) => b.score - a.score);
}

/** Return the first two principal components' coordinates of each vector: [x, y] each. */
export function project(vectors) {
  const size = vectors[0].length;
  const mean = new Float64Array(size);
  for (const vector of vectors) for (let i = 0; i < size; i += 1) mean[i] += vector[i] / vectors.length;
  const centred = vectors.map((vector) => Float64Array.from(vector, (value, i) => value - mean[i]));
  const first = component(centred, []);
  const second = component(centred, [first]);
  return centred.map((vector) => [dot(vector, first), dot(vector, second)]);
}

/** Return the direction in which the vectors vary most, at right angles to those found before. */
function component(centred, found) {
  // Any start will do that no symmetry of the data hides from; the same one gives the same map each time.
  let direction = Float64Array.from(centred[0], (_, i) => Math.sin(i + 1));
  for (let step = 0; step < STEPS; step += 1) {
    const next = new Float64Array(direction.length);
    for (const vector of centred) {
      const along = dot(vector, direction);
      for (let i = 0; i < next.length; i += 1) next[i] += along * vector[i];
    }
    for (const other of found) {
      const along = dot(next, other);
      for (let i = 0; i < next.length; i += 1) next[i] -= along * other[i];
    }
    direction = unit(next);
  }
  return direction;
}
