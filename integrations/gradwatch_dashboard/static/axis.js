/** Axes with ticks at round numbers. */

import { count, number, power } from "./format.js";

/**
 * Chooses round steps for ticks.
 *
 * @param {number} first First step in view.
 * @param {number} last Last step in view.
 * @param {number} most How many ticks fit.
 * @returns {number[]} Steps, in rising order.
 */
function stepTicks(first, last, most) {
  const span = Math.max(1, last - first);
  let unit = 10 ** Math.floor(Math.log10(span / Math.max(1, most)));
  unit = Math.max(1, unit);
  const factor = [1, 2, 5, 10, 20, 50].find((f) => span / (unit * f) <= most) ?? 100;
  const distance = unit * factor;
  const ticks = [];
  for (let at = Math.ceil(first / distance) * distance; at <= last; at += distance) ticks.push(at);
  return ticks;
}

/**
 * Chooses round numbers for the ticks of a logarithmic axis.
 *
 * @param {number} low Logarithm (base 10) of its lower end.
 * @param {number} high Logarithm of its upper end.
 * @param {number} most How many ticks fit.
 * @returns {{at: number, label: string}[]} `at` is a base 10 logarithm.
 */
export function logTicks(low, high, most) {
  const [from, to] = [Math.ceil(low - 1e-9), Math.floor(high + 1e-9)];
  const decades = to - from + 1;
  if (decades >= 2) {
    const distance = Math.ceil(decades / most);
    const ticks = [];
    for (let at = Math.ceil(from / distance) * distance; at <= to; at += distance) {
      ticks.push({ at, label: power(at) });
    }
    return ticks;
  }
  const ticks = [];
  for (let decade = Math.floor(low); decade <= Math.floor(high); decade++) {
    for (const digit of most > 3 ? [1, 2, 3, 5] : [1, 2, 5]) {
      const value = digit * 10 ** decade;
      const at = Math.log10(value);
      if (at >= low - 1e-9 && at <= high + 1e-9) ticks.push({ at, label: number(value, 2) });
    }
  }
  return ticks.length > most ? ticks.filter((_, index) => index % 2 === 0) : ticks;
}

/**
 * Draws the axis of the steps.
 *
 * @param {CanvasRenderingContext2D} context
 * @param {{left: number, width: number}} plot Position of the plot, in CSS pixels.
 * @param {{first: number, last: number}} view
 * @param {Object<string, string>} theme
 */
export function drawSteps(context, plot, view, theme) {
  const steps = stepTicks(view.first, view.last, Math.max(2, Math.floor(plot.width / 75)));
  context.font = theme.small;
  context.textBaseline = "top";
  context.strokeStyle = theme.tick;
  context.lineWidth = 1;
  const span = view.last - view.first + 1;
  for (const step of steps) {
    const x = plot.left + ((step - view.first + 0.5) / span) * plot.width;
    const at = Math.round(x - 0.5) + 0.5;
    context.beginPath();
    context.moveTo(at, 0);
    context.lineTo(at, 5);
    context.stroke();
    const label = count(step);
    const half = context.measureText(label).width / 2;
    context.fillStyle = theme.muted;
    context.textAlign = "center";
    const right = plot.left + plot.width + 8;
    context.fillText(label, Math.min(Math.max(x, plot.left - 8 + half), right - half), 8);
  }
  context.textAlign = "right";
  context.fillText("step", plot.left - 18, 8);
}

/**
 * Draws the labels and grid lines of a logarithmic axis.
 *
 * @param {CanvasRenderingContext2D} context
 * @param {{left: number, width: number, top: number, height: number}} plot
 * @param {{low: number, high: number}} range Logarithms of its ends.
 * @param {Object<string, string>} theme
 * @returns {function(number): number} Maps a number above 0 to its y coordinate.
 */
export function drawLogAxis(context, plot, range, theme) {
  const yOf = (log) => plot.top + plot.height * (1 - (log - range.low) / (range.high - range.low));
  context.font = theme.small;
  context.textAlign = "right";
  context.textBaseline = "middle";
  context.lineWidth = 1;
  for (const tick of logTicks(range.low, range.high, Math.max(2, Math.floor(plot.height / 20)))) {
    const y = Math.round(yOf(tick.at) - 0.5) + 0.5;
    context.strokeStyle = theme.grid;
    context.beginPath();
    context.moveTo(plot.left, y);
    context.lineTo(plot.left + plot.width, y);
    context.stroke();
    if (y < plot.top + 3 || y > plot.top + plot.height - 4) continue;
    context.fillStyle = theme.muted;
    context.fillText(tick.label, plot.left - 8, y);
  }
  return (value) => yOf(Math.log10(value));
}

/**
 * Finds the ends of a logarithmic axis over some curves.
 *
 * @param {ArrayLike<number>[]} curves Values that are not finite and above 0 are ignored.
 * @returns {{low: number, high: number}} Base 10 logarithms, at least half a decade apart.
 */
export function logRange(curves) {
  let [low, high] = [Infinity, -Infinity];
  for (const curve of curves) {
    for (let i = 0; i < curve.length; i++) {
      const value = curve[i];
      if (!(value > 0) || value === Infinity) continue;
      if (value < low) low = value;
      if (value > high) high = value;
    }
  }
  if (low > high) [low, high] = [0.1, 10];
  [low, high] = [Math.log10(low), Math.log10(high)];
  const more = Math.max(0.06 * (high - low), (0.5 - (high - low)) / 2);
  return { low: low - more, high: high + more };
}
