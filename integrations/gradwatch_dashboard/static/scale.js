/** The color scale of a heat map. */

import { colourMap, pixel, SPECIAL } from "./colours.js";

/** Share of cells at each end that may lie outside the scale, so that spikes do not stretch it. */
const TAIL = 0.005;
/** Bounds of the scale of relative norms, as powers of ten. */
const LEAST = 1;
const LARGEST = 3;
const MOST_CELLS = 200_000;

const probe = new Float32Array(1);
const probeBits = new Uint32Array(probe.buffer);

/** Low bits of a float32 that its color ignores: sign, exponent and 7 mantissa bits remain. */
export const SHIFT = 16;

/**
 * A scale.
 *
 * @typedef {Object} Scale
 * @property {boolean} relative Whether norms are divided by the typical norm of their row.
 * @property {number} low Logarithm (base 10) at the first color.
 * @property {number} high Logarithm at the last color.
 * @property {boolean} below Whether any value is below the first color.
 * @property {boolean} above Whether any value is above the last color.
 * @property {Uint32Array} colours The pixel of a float32, indexed by its `bits >>> SHIFT`.
 */

/**
 * Takes a sample of the positive finite values that a scale must cover.
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
 * @param {Float32Array} logs The result of `sampled`.
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
    // At least one decade, or small noise would show as strong contrast.
    const missing = Math.max(0, 1 - (high - low)) / 2;
    [low, high] = [low - missing, high + missing];
  }
  const below = logs.length > 0 && logs[0] < low - 1e-6;
  const above = logs.length > 0 && logs[logs.length - 1] > high + 1e-6;
  return { relative, low, high, below, above, colours: lookUp(low, high, relative, theme) };
}

/**
 * Returns the bits of a number as a float32, as an unsigned integer.
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
