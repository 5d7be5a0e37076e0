/** The picture: what follows from the state and the data for all panels together. */

import { flatRows, modulesOf, moduleTree, openRows, READABLE, readableDepth } from "./rows.js";
import { makeScale, sampled } from "./scale.js";
import { shown } from "./format.js";

const MOST_SAMPLED = 400;
/** Heights of a row: the least if that makes all fit, that of rows to scroll through, the most. */
const [LEAST_HEIGHT, EASY_HEIGHT, MOST_HEIGHT] = [11, 13, 22];

/**
 * Joins the parameters of several runs: those of the first, then what only later ones have.
 *
 * @param {{parameters: string[]}[]} layouts
 * @returns {{names: string[], indices: Int32Array[]}} By layout and name, its index; -1: none.
 */
export function joinedNames(layouts) {
  const names = [...new Set(layouts.flatMap(({ parameters }) => parameters))];
  const indices = layouts.map(({ parameters }) => {
    const at = new Map(parameters.map((name, index) => [name, index]));
    return Int32Array.from(names, (name) => at.get(name) ?? -1);
  });
  return { names, indices };
}

/** Which rows there are; built anew only when something that they depend on changes. */
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
   * Finds a row, whether it is seen or not.
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

/** Keeps the scale of the colours: it follows rows and runs, and stays through a zoom. */
export class ScaleKeeper {
  #known = [];

  /**
   * Returns the scale.
   *
   * @param {import("./rows.js").Node[]} rows All rows, closed ones too.
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
 * Chooses how high a row is.
 *
 * @param {number} rows
 * @param {number} room In CSS pixels.
 * @param {boolean} fit Whether all rows must fit.
 * @returns {number} In CSS pixels.
 */
export function rowHeight(rows, room, fit) {
  const share = room / Math.max(1, rows);
  if (share < LEAST_HEIGHT) return fit ? share : EASY_HEIGHT;
  return Math.min(MOST_HEIGHT, Math.floor(share));
}

/**
 * Measures how much room the names of rows need.
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
