/** The picture: what is derived from the state and the data for all panels together. */

import { flatRows, modulesOf, moduleTree, openRows, READABLE, readableDepth } from "./rows.js";
import { makeScale, sampled } from "./scale.js";
import { shown } from "./format.js";

const MOST_SAMPLED = 400;
/** Row heights in CSS pixels: minimum to show all rows, height of rows that scroll, maximum. */
const [LEAST_HEIGHT, EASY_HEIGHT, MOST_HEIGHT] = [11, 13, 22];

/**
 * Joins the parameters of several runs: those of the first, then what only later ones have.
 *
 * @param {{parameters: string[]}[]} layouts
 * @returns {{names: string[], indices: Int32Array[]}} `indices` gives, by layout and name, the
 *   index in that layout; -1 if it lacks the name.
 */
export function joinedNames(layouts) {
  const names = [...new Set(layouts.flatMap(({ parameters }) => parameters))];
  const indices = layouts.map(({ parameters }) => {
    const at = new Map(parameters.map((name, index) => [name, index]));
    return Int32Array.from(names, (name) => at.get(name) ?? -1);
  });
  return { names, indices };
}

/** The rows. They are only rebuilt when something that they depend on has changed. */
export class RowModel {
  #names = null;
  #filter = null;
  #mode = null;
  #open = null;

  /**
   * Follows the state.
   *
   * @param {string[]} names
   * @param {import("./state.js").State} state
   */
  update(names, state) {
    const mode = state.rows ?? (names.length <= READABLE ? "parameters" : "modules");
    const same = names === this.#names && state.filter === this.#filter && mode === this.#mode;
    if (!same) this.#build(names, state.filter, mode);
    if (same && state.open === this.#open) return;
    this.#open = state.open;
    this.open = state.open ?? (this.root ? readableDepth(this.root) : new Set());
    this.rows = this.root ? openRows(this.root, this.open) : this.all;
  }

  /**
   * Finds a row, even if it is inside a closed module.
   *
   * @param {string|null} key
   * @returns {import("./rows.js").Node|null}
   */
  find(key) {
    return this.byKey.get(key) ?? null;
  }

  #build(names, filter, mode) {
    [this.#names, this.#filter, this.#mode] = [names, filter, mode];
    const pattern = new RegExp(filter);
    const kept = [...names.keys()].filter((index) => pattern.test(names[index]));
    this.mode = mode;
    this.root = mode === "modules" ? moduleTree(names, kept) : null;
    this.all = this.root ? nodesOf(this.root) : flatRows(names, kept);
    this.byKey = new Map(this.all.map((row) => [row.key, row]));
  }
}

/** Keeps the color scale: it changes with the rows and the runs, but not with the zoom. */
export class ScaleKeeper {
  #known = [];

  /**
   * Returns the scale.
   *
   * @param {import("./rows.js").Node[]} rows All rows, including those in closed modules.
   * @param {import("./cells.js").Cells[]} overviews
   * @param {boolean} relative
   * @param {Object<string, string>} theme
   * @returns {import("./scale.js").Scale}
   */
  get(rows, overviews, relative, theme) {
    const wanted = [rows, relative, theme, ...overviews];
    const same =
      wanted.length === this.#known.length && wanted.every((item, i) => item === this.#known[i]);
    if (same) return this.scale;
    this.#known = wanted;
    const stride = Math.max(1, Math.ceil((rows.length * overviews.length) / MOST_SAMPLED));
    const some = rows.filter((_, index) => index % stride === 0);
    const sample = overviews.flatMap((cells) =>
      some.map((row) => ({
        values: cells.of(row).values,
        typical: relative ? cells.typical(row) : 1,
      })),
    );
    this.scale = makeScale(sampled(sample, relative), relative, theme);
    return this.scale;
  }
}

/**
 * Chooses the height of a row.
 *
 * @param {number} rows Number of rows.
 * @param {number} room Height for all rows, in CSS pixels.
 * @param {boolean} fit Whether all rows must fit.
 * @returns {number} In CSS pixels.
 */
export function rowHeight(rows, room, fit) {
  const share = room / Math.max(1, rows);
  if (share < LEAST_HEIGHT) return fit ? share : EASY_HEIGHT;
  return Math.min(MOST_HEIGHT, Math.floor(share));
}

/**
 * Measures the width that the names of rows need.
 *
 * @param {import("./rows.js").Node[]} rows
 * @param {boolean} indented
 * @param {CanvasRenderingContext2D} context
 * @returns {number} In CSS pixels.
 */
export function namesWidth(rows, indented, context) {
  const stride = Math.max(1, Math.ceil(rows.length / MOST_SAMPLED));
  let widest = 0;
  for (let index = 0; index < rows.length; index += stride) {
    const { label, depth } = rows[index];
    const before = indented ? 10 + depth * 14 + 14 : 12;
    widest = Math.max(widest, before + context.measureText(shown(label)).width);
  }
  return Math.ceil(widest) + 14;
}

function nodesOf(root) {
  const found = modulesOf(root);
  const leaves = [];
  const visit = (parent) => {
    for (const child of parent.children) {
      if (child.leaf >= 0) leaves.push(child);
      else visit(child);
    }
  };
  visit(root);
  return [...found, ...leaves];
}
