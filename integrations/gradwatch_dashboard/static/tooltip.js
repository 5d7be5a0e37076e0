/** The tooltip: the exact numbers under the pointer or the keyboard cursor. */

import { columnOf, stepsOf } from "./cells.js";
import { h } from "./dom.js";
import { count, counted, number, shown, steps } from "./format.js";

/**
 * Describes a cell.
 *
 * @param {import("./panel.js").Panel} panel
 * @param {import("./rows.js").Node|null} row null for a whole column.
 * @param {number} step
 * @param {{first: number, last: number}} view
 * @returns {{title: string, lines: [string, string, boolean?][]}|null} For each line its name, its
 *   text, and whether it is bad. null if the run does not have the step.
 */
export function describe(panel, row, step, view) {
  const cells = panel.cells(view);
  const column = cells ? columnOf(cells.heat, step) : -1;
  if (column < 0) return null;
  const range = stepsOf(cells.heat, column);
  const lines = [];
  if (row) lines.push(...aboutRow(panel, row));
  const wide = range.last > range.first;
  lines.push([wide ? "steps" : "step", steps(range.first, range.last).replace(/^steps? /, "")]);
  if (row) lines.push(...aboutCell(panel, cells, row, column, wide));
  lines.push(...aboutColumn(cells.heat, column, wide));
  lines.push(...furtherColumns(panel, cells.heat, column));
  return { title: row ? shown(row.name) : "all parameters", lines };
}

/**
 * Returns the same as one sentence, for screen readers.
 *
 * @param {ReturnType<typeof describe>} found
 * @returns {string}
 */
export function spoken(found) {
  return found ? `${found.title}: ${found.lines.map(([name, text]) => `${name} ${text}`).join(", ")}` : "";
}

/** The box that follows the pointer. */
export class Tooltip {
  constructor() {
    this.title = h("div", { class: "tip-title" });
    this.list = h("dl", {});
    this.element = h("div", { class: "tip", hidden: true, "aria-hidden": "true" });
    this.element.append(this.title, this.list);
  }

  /**
   * Shows a description beside a point.
   *
   * @param {ReturnType<typeof describe>} found
   * @param {string|null} run Name of the run, to be shown if there are several on the screen.
   * @param {number} x In CSS pixels of the window.
   * @param {number} y In CSS pixels of the window.
   */
  show(found, run, x, y) {
    this.title.textContent = found.title;
    const lines = run ? [["run", run], ...found.lines] : found.lines;
    const rows = lines.flatMap(([name, text, bad]) => [
      h("dt", { text: name }),
      h("dd", { text, class: bad ? "special" : null }),
    ]);
    this.list.replaceChildren(...rows);
    this.element.hidden = false;
    const { offsetWidth: width, offsetHeight: height } = this.element;
    const left = x + 16 + width > window.innerWidth - 8 ? x - 16 - width : x + 16;
    const top = Math.min(y + 16, window.innerHeight - height - 8);
    this.element.style.left = `${Math.max(8, left)}px`;
    this.element.style.top = `${Math.max(8, top)}px`;
  }

  /** Hides it. */
  hide() {
    this.element.hidden = true;
  }
}

function aboutRow(panel, row) {
  if (row.leaf < 0) return [["module of", counted(row.leaves.length, "parameter")]];
  const index = panel.overview.indexOf[row.leaf];
  if (index < 0 || !panel.layout) return [];
  const lines = [];
  const module = panel.layout.modules[index];
  const shape = panel.layout.shapes[index];
  if (module) lines.push(["module", shown(module)]);
  if (shape) lines.push(["shape", shape.length ? shape.map(count).join(" × ") : "scalar"]);
  return lines;
}

function aboutCell(panel, cells, row, column, wide) {
  const { values, bad } = cells.of(row);
  const value = values[column];
  const badSteps = bad ? bad[column] : 0;
  if (value === -2) return [["norm", "nothing recorded"]];
  if (value === -1) return [["norm", "no gradient"]];
  const nonfinite = Number.isNaN(value) || value === Infinity;
  const text = value === 0 ? "exactly 0" : number(value, 5);
  const lines = [[wide ? "largest norm" : "norm", text, nonfinite]];
  const typical = panel.overview.typical(row);
  if (value > 0 && value < Infinity && typical > 0) {
    lines.push(["relative", `${number(value / typical, 3)} × typical`]);
  }
  if (badSteps || nonfinite) {
    lines.push(["bad steps", `${count(badSteps || 1)} with NaN or Inf`, true]);
  }
  return lines;
}

function aboutColumn({ strip }, column, wide) {
  const at = (name) => strip[name]?.[column] ?? NaN;
  const total = at("grad_norm");
  const lines = [["total norm", number(total, 5), !Number.isFinite(total)]];
  const coefficient = at("clip_coef");
  if (coefficient === coefficient) {
    lines.push([wide ? "smallest clip coefficient" : "clip coefficient", number(coefficient, 4)]);
  }
  const threshold = at("clip_threshold");
  if (threshold === threshold) lines.push(["clip threshold", number(threshold, 4)]);
  if (at("skipped_steps") > 0) lines.push(["not applied", counted(at("skipped_steps"), "step")]);
  return lines;
}

/** Describes the further step columns that the writer has added, such as the loss. */
function furtherColumns(panel, { strip }, column) {
  const lines = [];
  for (const name of panel.layout?.columns ?? []) {
    const value = strip[name]?.[column] ?? NaN;
    if (value === value) lines.push([shown(name).replaceAll("_", " "), number(value, 4)]);
  }
  return lines;
}
