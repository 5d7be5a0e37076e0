/** The curve of one row: its norm by step. */

import { drawLogAxis, drawSteps, logRange } from "./axis.js";
import { getJson, isAbort, Latest } from "./api.js";
import { isBad, stepsOf } from "./cells.js";
import { fitted, h } from "./dom.js";
import { counted, shown } from "./format.js";

const HEIGHT = 168;
const TOP = 14;
const BELOW = 28;
const RIGHT = 14;

/**
 * Norms of a row in one run.
 *
 * @typedef {Object} Series
 * @property {number[]} first First step of each window.
 * @property {number[]} last Last step of each window.
 * @property {number[]} norm
 * @property {number[]} bad Number of steps with a NaN or an Inf.
 * @property {number[]} total Total norm of the model.
 */

/** The panel below the heat maps. */
export class Curve {
  /** @param {function(): void} close */
  constructor(close) {
    this.title = h("span", { class: "curve-title" });
    this.meta = h("span", { class: "panel-meta" });
    this.canvas = h("canvas", { role: "img" });
    this.line = h("div", { class: "line hover", hidden: true });
    const button = h("button", { class: "button icon", text: "×", onclick: close });
    button.setAttribute("aria-label", "Close the curve");
    const head = h("header", { class: "curve-head" }, this.title, this.meta, button);
    const plot = h("div", { class: "curve-plot" }, this.canvas, this.line);
    this.element = h("section", { class: "curve", hidden: true }, head, plot);
    this.request = new Latest();
    /** @type {Series[]} */ this.series = [];
    this.wanted = "";
  }

  /**
   * Gets the numbers of a row: window by window for a parameter, by column for a module.
   *
   * @param {import("./rows.js").Node} row
   * @param {import("./panel.js").Panel[]} panels
   * @param {{first: number, last: number}} view
   * @returns {Promise<boolean>} Whether there is something new to draw.
   */
  async load(row, panels, view) {
    const wanted = JSON.stringify([
      row.key,
      row.leaves.length,
      view,
      panels.map(({ choice, overview }) => [choice, overview.heat.last]),
    ]);
    if (wanted === this.wanted) return false;
    this.wanted = wanted;
    const signal = this.request.next();
    try {
      const series = await Promise.all(
        panels.map((panel) =>
          row.leaf >= 0 ? ofParameter(panel, row, view, signal) : ofModule(panel, row, view),
        ),
      );
      if (signal.aborted) return false;
      this.series = series;
    } catch (error) {
      if (isAbort(error)) return false;
      this.wanted = "";
      this.series = [];
      this.meta.textContent = error.message;
    }
    return true;
  }

  /**
   * Draws the curve.
   *
   * @param {Object} picture
   * @param {import("./rows.js").Node|null} row null hides the curve.
   * @param {import("./panel.js").Panel[]} panels
   */
  draw(picture, row, panels) {
    this.element.hidden = !row;
    if (!row) return;
    const { theme, view } = picture;
    this.title.textContent = shown(row.name);
    this.title.title = shown(row.name);
    this.meta.textContent = about(row, panels[0], this.series);
    this.left = panels[0].left;
    const wide = this.element.clientWidth - this.left - RIGHT;
    this.width = panels.length > 1 && !picture.stacked ? wide : panels[0].width;
    const context = fitted(this.canvas, this.left + this.width + RIGHT, HEIGHT);
    const plot = { left: this.left, width: this.width, top: TOP, height: HEIGHT - TOP - BELOW };
    const yOf = drawLogAxis(context, plot, logRange(this.series.map(({ norm }) => norm)), theme);
    context.save();
    context.translate(0, HEIGHT - BELOW);
    drawSteps(context, plot, view, theme);
    context.restore();
    context.save();
    context.beginPath();
    context.rect(plot.left, 0, plot.width, HEIGHT);
    context.clip();
    const colours = [theme.norm, theme.other];
    this.series.forEach((series, index) => {
      drawSeries(context, series, plot, view, yOf, colours[index]);
      drawMarks(context, series, plot, view, theme, 6 * index);
    });
    context.restore();
    this.#legend(context, panels, colours, theme);
    const bad = this.series.flatMap((series) => series.bad.filter((some) => some > 0)).length;
    const label = `Norm of ${shown(row.name)} by step; ${counted(bad, "bad window")}`;
    this.canvas.setAttribute("aria-label", label);
  }

  /** Shows where the pointer is. */
  hover(step, view) {
    this.line.hidden = step === null || step < view.first || step > view.last;
    if (this.line.hidden || this.element.hidden) return;
    const share = (step - view.first + 0.5) / (view.last - view.first + 1);
    this.line.style.left = `${this.left + share * this.width}px`;
  }

  #legend(context, panels, colours, theme) {
    if (this.left < 150) return;
    context.font = theme.small;
    context.textAlign = "left";
    context.textBaseline = "middle";
    const names = panels.length > 1 ? panels.map(({ label }) => label) : ["norm"];
    names.forEach((name, index) => {
      context.fillStyle = colours[index];
      context.fillRect(12, TOP + 7 + 17 * index, 16, 2);
      context.fillStyle = theme.muted;
      const short = name.length > 18 ? `…${name.slice(-17)}` : name;
      context.fillText(short, 36, TOP + 8 + 17 * index);
    });
  }
}

async function ofParameter(panel, row, view, signal) {
  const index = panel.overview.indexOf[row.leaf];
  const none = { first: [], last: [], norm: [], bad: [], total: [] };
  if (index < 0) return none;
  const { first, last } = view;
  const wanted = { ...panel.choice, parameter: index, first, last };
  const found = await getJson("curve", wanted, signal);
  const numbers = (list) => list.map(Number);
  const norm = numbers(found.norm);
  return { ...found, norm, bad: found.bad, total: numbers(found.grad_norm) };
}

/** Computes the row of a module from the cells. */
function ofModule(panel, row, view) {
  const cells = panel.cells(view);
  const { values } = cells.of(row);
  const ranges = Array.from(values, (_, column) => stepsOf(cells.heat, column));
  return {
    first: ranges.map(({ first }) => first),
    last: ranges.map(({ last }) => last),
    norm: [...values],
    bad: ranges.map((_, column) => Number(isBad(cells.of(row), column))),
    total: [...cells.heat.strip.grad_norm],
  };
}

function drawSeries(context, { first, last, norm }, plot, view, yOf, colour) {
  const unit = plot.width / (view.last - view.first + 1);
  context.strokeStyle = colour;
  context.lineWidth = 1.5;
  context.lineJoin = "round";
  context.beginPath();
  let [open, column, highest] = [false, null, 0];
  const put = (x, value) => {
    if (open) context.lineTo(x, yOf(value));
    else context.moveTo(x, yOf(value));
    open = true;
  };
  for (let i = 0; i < norm.length; i++) {
    const x = plot.left + ((first[i] + last[i]) / 2 - view.first + 0.5) * unit;
    const good = norm[i] > 0 && norm[i] < Infinity;
    const at = Math.floor(x * 2);
    // If several windows fall on the same half pixel, only the largest is drawn.
    if (column !== null && (at !== column || !good)) {
      put(column / 2, highest);
      column = null;
    }
    if (!good) open = false;
    else if (column === null) [column, highest] = [at, norm[i]];
    else highest = Math.max(highest, norm[i]);
  }
  if (column !== null) put(column / 2, highest);
  context.stroke();
}

function drawMarks(context, { first, last, norm, bad }, plot, view, theme, lower) {
  const unit = plot.width / (view.last - view.first + 1);
  let end = -Infinity;
  for (let i = 0; i < norm.length; i++) {
    const nonfinite = bad[i] > 0 || norm[i] !== norm[i] || norm[i] === Infinity;
    if (!nonfinite && norm[i] !== 0) continue;
    const x = plot.left + ((first[i] + last[i]) / 2 - view.first + 0.5) * unit;
    const width = Math.max(3, (last[i] - first[i] + 1) * unit);
    if (!nonfinite) {
      context.fillStyle = theme.text;
      context.fillRect(x - width / 2, plot.top + plot.height - 3, width, 3);
      continue;
    }
    context.fillStyle = theme.bad;
    context.globalAlpha = 0.3;
    context.fillRect(x - width / 2, plot.top, width, plot.height);
    context.globalAlpha = 1;
    if (x - end < 3) continue;
    end = x;
    context.beginPath();
    context.moveTo(x - 4, 3 + lower);
    context.lineTo(x + 4, 3 + lower);
    context.lineTo(x, 10 + lower);
    context.fill();
  }
}

function about(row, panel, series) {
  const index = row.leaf >= 0 ? panel.overview.indexOf[row.leaf] : -1;
  const parts = [];
  if (row.leaf < 0) parts.push(`module of ${counted(row.leaves.length, "parameter")}`);
  else if (index >= 0 && panel.layout) {
    if (panel.layout.modules[index]) parts.push(shown(panel.layout.modules[index]));
    if (panel.layout.shapes[index]?.length) parts.push(panel.layout.shapes[index].join(" × "));
  }
  const windows = series.reduce((sum, { norm }) => sum + norm.length, 0);
  if (windows) parts.push(counted(windows, row.leaf < 0 ? "column" : "window"));
  return parts.join("  ·  ");
}
