/** The strip above a heat map: total norm, clip threshold, clip coefficient and marked steps. */

import { drawLogAxis, logRange } from "./axis.js";
import { stepsOf } from "./cells.js";

const LANE = 12;
const GAP = 8;
const COEFFICIENT = 26;

/**
 * Returns the height of a strip.
 *
 * @param {boolean} clips Whether the run clips.
 * @param {boolean} small Whether there is little room.
 * @returns {number} In CSS pixels.
 */
export function stripHeight(clips, small) {
  return LANE + (small ? 48 : 72) + (clips ? GAP + COEFFICIENT : 0) + GAP;
}

/**
 * Tells whether any step has a clip coefficient below 1 or a clip threshold.
 *
 * @param {import("./api.js").Heat} heat
 * @returns {boolean}
 */
export function clips(heat) {
  const { clip_threshold: threshold, clip_coef: coefficient } = heat.strip;
  return threshold.some((value) => value === value) || coefficient.some((value) => value < 1);
}

/**
 * Finds the ends of the axis of the norms, over all steps.
 *
 * @param {import("./api.js").Heat[]} heats
 * @returns {{low: number, high: number}} Base 10 logarithms.
 */
export function normRange(heats) {
  return logRange(heats.flatMap(({ strip }) => [strip.grad_norm, strip.clip_threshold]));
}

/**
 * Draws a strip.
 *
 * @param {CanvasRenderingContext2D} context
 * @param {Object} place
 * @param {number} place.left Left edge of the plot, in CSS pixels.
 * @param {number} place.width Width of the plot.
 * @param {number} place.height Height of the strip.
 * @param {boolean} place.legend Whether there is room for a legend at the left.
 * @param {import("./api.js").Heat} heat
 * @param {{first: number, last: number}} view
 * @param {{low: number, high: number}} range The result of `normRange`.
 * @param {boolean} clipping Whether the coefficient is drawn.
 * @param {Object<string, string>} theme
 */
export function drawStrip(context, place, heat, view, range, clipping, theme) {
  const below = clipping ? GAP + COEFFICIENT : 0;
  const norms = { left: place.left, width: place.width, top: LANE };
  norms.height = place.height - LANE - below - GAP;
  const yOf = drawLogAxis(context, norms, range, theme);
  const xs = edges(heat, view, place);
  context.save();
  context.beginPath();
  context.rect(place.left, 0, place.width, place.height);
  context.clip();
  stairs(context, xs, heat.strip.clip_threshold, yOf, theme.threshold, 1, [4, 3]);
  if (clipping) stairs(context, xs, heat.strip.grad_norm_clipped, yOf, theme.clip, 1, []);
  stairs(context, xs, heat.strip.grad_norm, yOf, theme.norm, 1.5, []);
  const top = place.height - GAP - COEFFICIENT;
  if (clipping) hanging(context, xs, heat.strip.clip_coef, top, theme.clip);
  marks(context, xs, heat.strip.skipped_steps, 6, theme.skipped, norms.top + norms.height, true);
  marks(context, xs, heat.strip.bad_steps, 0, theme.bad, norms.top + norms.height, false);
  context.restore();
  if (clipping) coefficientAxis(context, place, top, theme);
  if (place.legend) {
    legend(context, norms, top, clipping, heat, theme);
    nameMarks(context, heat, theme);
  }
}

/** Draws the legend of the marks above the plot. */
function nameMarks(context, { strip }, theme) {
  let x = 12;
  const kinds = [
    ["bad_steps", "bad step", theme.bad, false],
    ["skipped_steps", "not applied", theme.skipped, true],
  ];
  for (const [name, text, colour, square] of kinds) {
    if (!strip[name].some((some) => some > 0)) continue;
    context.fillStyle = colour;
    mark(context, x + 4, 3, square);
    context.fillStyle = theme.muted;
    context.fillText(text, x + 14, 6);
    x += context.measureText(text).width + 28;
  }
}

function mark(context, middle, top, square) {
  if (square) return context.fillRect(middle - 2, top, 4, 4);
  context.beginPath();
  context.moveTo(middle - 3.5, top);
  context.lineTo(middle + 3.5, top);
  context.lineTo(middle, top + 6);
  context.fill();
}

function edges(heat, view, { left, width }) {
  const xs = new Float64Array(heat.columns + 1);
  const unit = width / (view.last - view.first + 1);
  for (let c = 0; c <= heat.columns; c++) {
    const step = c < heat.columns ? stepsOf(heat, c).first : heat.last + 1;
    xs[c] = left + (step - view.first) * unit;
  }
  return xs;
}

/** Draws a line through the column middles, with gaps where a value is not finite or not > 0. */
function stairs(context, xs, values, yOf, colour, width, dash) {
  context.strokeStyle = colour;
  context.lineWidth = width;
  context.lineJoin = "round";
  context.setLineDash(dash);
  context.beginPath();
  let open = false;
  for (let c = 0; c < values.length; c++) {
    const value = values[c];
    if (!(value > 0) || value === Infinity) {
      open = false;
      continue;
    }
    const y = yOf(value);
    if (!open) context.moveTo(xs[c], y);
    context.lineTo((xs[c] + xs[c + 1]) / 2, y);
    if (c === values.length - 1 || !(values[c + 1] > 0)) context.lineTo(xs[c + 1], y);
    open = true;
  }
  context.stroke();
  context.setLineDash([]);
}

/** Draws `1 - coefficient` as bars that hang down from the line at 1: what the clip took away. */
function hanging(context, xs, values, top, colour) {
  context.fillStyle = colour;
  context.fillRect(xs[0], top, xs[xs.length - 1] - xs[0], 1);
  for (let c = 0; c < values.length; c++) {
    if (!(values[c] < 1)) continue;
    // Rounded to whole pixels, to avoid seams between neighbors.
    const left = Math.round(xs[c]);
    const width = Math.max(1, Math.round(xs[c + 1]) - left);
    context.fillRect(left, top, width, (1 - Math.max(values[c], 0)) * COEFFICIENT);
  }
}

/** Marks steps: triangles and a faint line for bad ones, squares for those not applied. */
function marks(context, xs, counts, top, colour, bottom, square) {
  context.fillStyle = colour;
  let end = -Infinity;
  for (let c = 0; c < counts.length; c++) {
    if (!(counts[c] > 0)) continue;
    const middle = (xs[c] + xs[c + 1]) / 2;
    const width = Math.max(3, xs[c + 1] - xs[c]);
    context.globalAlpha = square ? 0 : 0.35;
    context.fillRect(middle - width / 2, LANE, width, bottom - LANE);
    context.globalAlpha = 1;
    if (middle - end < 3 && xs[c + 1] - xs[c] < 3) continue;
    end = middle;
    mark(context, middle, top, square);
  }
}

function coefficientAxis(context, place, top, theme) {
  context.font = theme.small;
  context.fillStyle = theme.muted;
  context.textAlign = "right";
  context.textBaseline = "middle";
  context.fillText("1", place.left - 8, top + 1);
  context.fillText("0", place.left - 8, top + COEFFICIENT - 2);
  context.fillStyle = theme.grid;
  context.fillRect(place.left, top + COEFFICIENT - 1, place.width, 1);
}

function legend(context, norms, coefficientTop, clipping, heat, theme) {
  const lines = [["total norm", theme.norm, []]];
  if (clipping) lines.push(["after the clip", theme.clip, []]);
  if (heat.strip.clip_threshold.some((value) => value === value)) {
    lines.push(["clip threshold", theme.threshold, [4, 3]]);
  }
  context.textAlign = "left";
  context.textBaseline = "middle";
  context.font = theme.small;
  lines.forEach(([text, colour, dash], index) => {
    const y = Math.round(norms.top + 12 + index * 16) + 0.5;
    context.strokeStyle = colour;
    context.lineWidth = dash.length ? 1 : 2;
    context.setLineDash(dash);
    context.beginPath();
    context.moveTo(12, y);
    context.lineTo(28, y);
    context.stroke();
    context.setLineDash([]);
    context.fillStyle = theme.muted;
    context.fillText(text, 36, y);
  });
  if (!clipping) return;
  context.fillStyle = theme.clip;
  context.fillRect(12, coefficientTop + 8, 16, 7);
  context.fillStyle = theme.muted;
  context.fillText("clip coefficient", 36, coefficientTop + 12);
}
