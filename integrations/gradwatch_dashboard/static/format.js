/** Formats numbers and names for display. */

// Line breaks, control characters and marks that change the text direction: with them, a name
// could look like another one.
const UNSEEN = /[\u0000-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]/g;
const SUPERSCRIPTS = { "-": "⁻", 0: "⁰", 1: "¹", 2: "²", 3: "³", 4: "⁴", 5: "⁵", 6: "⁶" };
Object.assign(SUPERSCRIPTS, { 7: "⁷", 8: "⁸", 9: "⁹" });
const counts = new Intl.NumberFormat("en-US");

/**
 * Makes an untrusted name from a log safe to display.
 *
 * @param {string} name
 * @returns {string}
 */
export function shown(name) {
  return String(name).replace(UNSEEN, "\ufffd");
}

/**
 * Formats a whole number with thousands separators.
 *
 * @param {number} value
 * @returns {string}
 */
export function count(value) {
  return counts.format(value).replace("-", "−");
}

/**
 * Formats a number with its noun, as in "2 steps".
 *
 * @param {number} value
 * @param {string} noun In the singular.
 * @returns {string}
 */
export function counted(value, noun) {
  return `${count(value)} ${noun}${value === 1 ? "" : "s"}`;
}

/**
 * Formats a norm or a coefficient.
 *
 * @param {number} value
 * @param {number} [digits] Significant digits.
 * @returns {string}
 */
export function number(value, digits = 4) {
  if (Number.isNaN(value)) return "NaN";
  if (!Number.isFinite(value)) return value > 0 ? "Inf" : "−Inf";
  if (value === 0) return "0";
  const size = Math.abs(value);
  const text =
    size >= 1e-3 && size < 1e5
      ? String(Number(value.toPrecision(digits)))
      : value.toExponential(digits - 1).replace(/\.?0+e/, "e").replace("e+", "e");
  return text.replace("-", "−").replace("e-", "e−");
}

/**
 * Formats a power of ten: 10⁻³, but 0.1, 1, 10 and 100 in full.
 *
 * @param {number} exponent
 * @returns {string}
 */
export function power(exponent) {
  if (exponent >= -1 && exponent <= 2) return String(Number(`1e${exponent}`));
  return `10${[...String(exponent)].map((digit) => SUPERSCRIPTS[digit]).join("")}`;
}

/**
 * Formats a range of steps, as in "steps 1–20".
 *
 * @param {number} first
 * @param {number} last
 * @returns {string}
 */
export function steps(first, last) {
  return first === last ? `step ${count(first)}` : `steps ${count(first)}–${count(last)}`;
}

/**
 * Cuts the beginning of a long text, because names differ at their end.
 *
 * @param {string} text
 * @param {number} room Available width, in CSS pixels.
 * @param {CanvasRenderingContext2D} context Set to the font.
 * @returns {string}
 */
export function shortened(text, room, context) {
  if (context.measureText(text).width <= room) return text;
  let [low, high] = [0, text.length];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (context.measureText(`…${text.slice(middle)}`).width <= room) high = middle;
    else low = middle + 1;
  }
  return `…${text.slice(low).replace(/^\./, "")}`;
}
