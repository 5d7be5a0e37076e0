/** The scale of a heat map: which colour a norm has. */

import { colourMap, pixel, SPECIAL } from "./colours.js";

/** Share of the cells at each end that may lie outside: a spike must not take all colours. */
const TAIL = 0.005;
/** Bounds of the scale of relative norms, as powers of ten. */
const LEAST = 1;
const LARGEST = 3;
const MOST_CELLS = 200_000;

const probe = new Float32Array(1);
const probeBits = new Uint32Array(probe.buffer);

/** Bits of a float32 that tell its colour: its sign, its exponent and 7 bits of its mantissa. */
export const SHIFT = 16;

/**
 * A scale.
 *
 * @typedef {Object} Scale
 * @property {boolean} relative Whether the numbers are over the typical one.
 * @property {number} low Logarithm (base 10) of the first colour.
 * @property {number} high Logarithm of the last colour.
 * @property {boolean} below Whether some number is under the first colour's.
 * @property {boolean} above Whether some number is over the last colour's.
 * @property {Uint32Array} colours By `bits >>> SHIFT` of a float32, its pixel.
 */

/**
 * Takes a sample of the cells that a scale must show.
 *
 * @param {{values: Float32Array, typical: number}[]} rows
 * @param {boolean} relative
 * @returns {Float32Array} Logarithms, sorted.
 */
export function sampled(rows, relative) {
  const cells = rows.reduce((sum, row) => sum + row.values.length, 0);
  const stride = Math.max(1, Math.ceil(cells / MOST_CELLS));
  const logs = [];
  let at = 0;
  for (const { values, typical } of rows) {
    const shift = relative ? Math.log10(typical) : 0;
    for (; at < values.length; at += stride) {
      const log = values[at] > 0 ? Math.log10(values[at]) - shift : NaN;
      if (Number.isFinite(log)) logs.push(log);
    }
    at -= values.length;
  }
  return Float32Array.from(logs).sort();
}

/**
 * Chooses a scale from the bulk of the cells.
 *
 * @param {Float32Array} logs Of :func:`sampled`.
 * @param {boolean} relative
 * @param {Object<string, string>} theme
 * @returns {Scale}
 */
export function makeScale(logs, relative, theme) {
  const quantile = (share) => logs[Math.round(share * (logs.length - 1))];
  let [low, high] = [-1, 0];
  if (relative) {
    const sizes = Float32Array.from(logs, Math.abs).sort();
    const size = sizes.length ? sizes[Math.round((1 - TAIL) * (sizes.length - 1))] : 0;
    high = Math.min(Math.max(size, LEAST), LARGEST);
    low = -high;
  } else if (logs.length) {
    [low, high] = [quantile(TAIL), quantile(1 - TAIL)];
    // Less than a decade would show noise as if it were a contrast.
    const missing = Math.max(0, 1 - (high - low)) / 2;
    [low, high] = [low - missing, high + missing];
  }
  const below = logs.length > 0 && logs[0] < low - 1e-6;
  const above = logs.length > 0 && logs[logs.length - 1] > high + 1e-6;
  return { relative, low, high, below, above, colours: lookUp(low, high, relative, theme) };
}

/**
 * Returns the bits of a number as a float32.
 *
 * @param {number} value
 * @returns {number}
 */
export function bitsOf(value) {
  probe[0] = value;
  return probeBits[0];
}

function lookUp(low, high, relative, theme) {
  const map = colourMap(relative);
  const colours = new Uint32Array(1 << (32 - SHIFT));
  const bad = pixel(SPECIAL.bad);
  for (let key = 0; key < colours.length; key++) {
    probeBits[0] = ((key << SHIFT) | (1 << (SHIFT - 1))) >>> 0;
    const value = probe[0];
    if (Number.isNaN(value)) colours[key] = bad;
    else if (value > 0) {
      const place = (Math.log10(value) - low) / (high - low);
      colours[key] = map[Math.min(255, Math.max(0, Math.floor(place * 256)))];
    }
  }
  for (const value of [Infinity, -Infinity, NaN]) colours[bitsOf(value) >>> SHIFT] = bad;
  colours[bitsOf(-1) >>> SHIFT] = pixel(theme.absent);
  return colours;
}
