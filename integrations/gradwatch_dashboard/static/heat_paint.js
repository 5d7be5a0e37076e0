/** Paints the pixels of a heat map. */

import { pixel, SPECIAL } from "./colours.js";
import { isBad } from "./cells.js";
import { bitsOf, SHIFT } from "./scale.js";

const BAD = pixel(SPECIAL.bad);
const BAD_LINE = pixel(SPECIAL.badDark);
const ZERO = pixel(SPECIAL.zero);
const ZERO_LINE = pixel(SPECIAL.zeroLine);
const ABSENT = bitsOf(-1);

/** Minimum width and height of a bad cell or an exact zero in CSS pixels, to keep it visible. */
const LEAST_PIXELS = 3;

/**
 * Paints rows.
 *
 * @param {Object} picture
 * @param {Uint32Array} picture.pixels `[height, width]`, transparent.
 * @param {number} picture.width
 * @param {number} picture.height
 * @param {number} picture.ratio Device pixels per CSS pixel.
 * @param {{cells: import("./cells.js").RowCells, typical: number, top: number, bottom: number}[]}
 *   picture.rows With their position in device pixels, which may be outside the picture.
 * @param {{first: number, last: number, columns: number}} picture.heat
 * @param {{first: number, last: number}} picture.view Steps from the left to the right edge.
 * @param {import("./scale.js").Scale} picture.scale
 * @param {{absentLine: number}} picture.theme
 */
export function paint(picture) {
  const { rows, width, heat, view } = picture;
  const columns = columnsOfPixels(heat, view, width);
  const edges = edgesOfColumns(heat, view, width);
  const marks = { zero: [], bad: [] };
  for (const row of rows) {
    paintRow(picture, row, columns);
    collect(marks, row, edges, heat.columns);
  }
  const least = Math.ceil(LEAST_PIXELS * picture.ratio);
  for (const mark of marks.zero) fill(picture, mark, least, ZERO, ZERO_LINE);
  for (const mark of marks.bad) fill(picture, mark, least, BAD, BAD_LINE);
}

/** Returns the column under each pixel; -1 if there is none. */
function columnsOfPixels(heat, view, width) {
  const columns = new Int32Array(width);
  const [span, steps] = [heat.last - heat.first + 1, view.last - view.first + 1];
  const same = heat.columns === width && heat.first === view.first && heat.last === view.last;
  for (let x = 0; x < width; x++) {
    const step = Math.floor(view.first + ((x + 0.5) * steps) / width);
    if (step < heat.first || step > heat.last) columns[x] = -1;
    else columns[x] = same ? x : Math.floor(((step - heat.first) * heat.columns) / span);
  }
  return columns;
}

/** Returns the left edge of each column in pixels, and the right edge of the last one. */
function edgesOfColumns(heat, view, width) {
  const [span, steps] = [heat.last - heat.first + 1, view.last - view.first + 1];
  const edges = new Float64Array(heat.columns + 1);
  for (let c = 0; c <= heat.columns; c++) {
    const step = heat.first + Math.ceil((c * span) / heat.columns);
    edges[c] = ((step - view.first) / steps) * width;
  }
  return edges;
}

function paintRow(picture, row, columns) {
  const { pixels, width, height, scale, theme } = picture;
  const top = Math.max(0, Math.round(row.top));
  const bottom = Math.min(height, Math.round(row.bottom));
  const from = bottom > top ? top : Math.max(0, Math.floor((row.top + row.bottom) / 2));
  if (from >= height || row.bottom <= 0) return;
  let values = numbersOf(row, scale.relative);
  if (bottom <= top) {
    // Rows thinner than a pixel share one, which shows the largest norm.
    if (picture.line === from) values = largest(values, picture.shared);
    [picture.line, picture.shared] = [from, values];
  }
  const bits = new Uint32Array(values.buffer, values.byteOffset, values.length);
  const { colours } = scale;
  const start = from * width;
  let absent = false;
  for (let x = 0; x < width; x++) {
    const c = columns[x];
    if (c < 0) continue;
    pixels[start + x] = colours[bits[c] >>> SHIFT];
    absent ||= bits[c] === ABSENT;
  }
  for (let y = from + 1; y < bottom; y++) pixels.copyWithin(y * width, start, start + width);
  if (absent && bottom - from >= 5) hatchAbsent(picture, bits, columns, from, bottom, theme);
}

/** Returns the values to color: norms, or norms divided by the typical norm of the row. */
function numbersOf(row, relative) {
  const { values } = row.cells;
  if (!relative) return values;
  const over = new Float32Array(values.length);
  for (let c = 0; c < over.length; c++) {
    const value = values[c];
    over[c] = value > 0 ? (row.typical > 0 ? value / row.typical : 1) : value;
  }
  return over;
}

function largest(one, other) {
  const most = new Float32Array(one.length);
  for (let c = 0; c < most.length; c++) most[c] = one[c] > other[c] ? one[c] : other[c];
  return most;
}

function hatchAbsent({ pixels, width }, bits, columns, from, bottom, theme) {
  for (let y = from; y < bottom; y++) {
    for (let x = (6 - (y % 6)) % 6; x < width; x += 6) {
      if (columns[x] >= 0 && bits[columns[x]] === ABSENT) pixels[y * width + x] = theme.absentLine;
    }
  }
}

/** Collects runs of bad cells and of exact zeros, which must have a minimum size. */
function collect(marks, row, edges, count) {
  const { cells, top, bottom } = row;
  const { values } = cells;
  let [kind, start] = [null, 0];
  for (let c = 0; c <= count; c++) {
    let now = null;
    if (c < count) now = isBad(cells, c) ? "bad" : values[c] === 0 ? "zero" : null;
    if (now === kind) continue;
    if (kind) marks[kind].push({ left: edges[start], right: edges[c], top, bottom });
    [kind, start] = [now, c];
  }
}

function fill({ pixels, width, height }, mark, least, colour, line) {
  if (mark.right <= 0 || mark.left >= width || mark.bottom <= 0 || mark.top >= height) return;
  const [left, right] = widened(mark.left, mark.right, least, width);
  const [top, bottom] = widened(mark.top, mark.bottom, least, height);
  const hatched = right - left > 3 * least && bottom - top >= least;
  for (let y = top; y < bottom; y++) {
    pixels.fill(colour, y * width + left, y * width + right);
    if (!hatched) continue;
    const start = left + ((8 - ((left + y) % 8)) % 8);
    for (let x = start; x < right; x += 8) pixels[y * width + x] = line;
  }
}

function widened(from, to, least, end) {
  let [low, high] = [Math.round(from), Math.round(to)];
  if (high - low < least) {
    low = Math.max(0, Math.min(Math.round((from + to - least) / 2), end - least));
    high = low + least;
  }
  return [Math.max(0, low), Math.min(end, high)];
}
