/** Data: decides what to request from the server, and when. */

import { getHeat, getJson, isAbort } from "./api.js";
import { Cells } from "./cells.js";
import { joinedNames } from "./picture.js";
import { sameChoice } from "./runs.js";

/** Most cells of one request, so that the answer arrives quickly. */
const MOST_CELLS = 2_400_000;
const MOST_COLUMNS = 4096;
/** Relative change in the number of columns from which on a heat map is fetched again. */
const ROUGHLY = 0.25;

/** Runs, and the cells of those on the screen. */
export class Data {
  /** @param {function(import("./panel.js").Panel): number} widthOf A plot's device pixels. */
  constructor(widthOf) {
    this.widthOf = widthOf;
    this.runs = [];
    this.names = [];
    this.#summaries = new WeakMap();
  }

  #summaries;

  /** Fetches the list of runs. */
  async loadRuns() {
    this.runs = (await getJson("runs")).runs;
  }

  /**
   * Finds the entry of a choice in the list of runs.
   *
   * @param {import("./state.js").Choice|null} choice
   * @returns {Object|null}
   */
  summary(choice) {
    const run = this.runs.find(({ run }) => run === choice?.run);
    return run?.optimizers.find(({ optimizer }) => optimizer === choice.optimizer) ?? null;
  }

  /**
   * Tells whether a run has several optimizers.
   *
   * @param {import("./state.js").Choice} choice
   * @returns {boolean}
   */
  hasSeveral(choice) {
    return (this.runs.find(({ run }) => run === choice.run)?.optimizers.length ?? 0) > 1;
  }

  /**
   * Completes a choice from a link, which may name no optimizer or one that the run lacks.
   *
   * @param {import("./state.js").Choice|null} choice
   * @returns {import("./state.js").Choice|null} null if there is no such run.
   */
  completed(choice) {
    if (!choice || this.summary(choice)) return choice;
    const run = this.runs.find(({ run }) => run === choice.run);
    return run?.optimizers.length ? { run: run.run, optimizer: run.optimizers[0].optimizer } : null;
  }

  /**
   * Chooses the first run to show: the newest of those that pass TensorBoard's filter.
   *
   * @param {function(string): boolean} shows
   * @returns {import("./state.js").Choice|null}
   */
  newest(shows) {
    const some = this.runs.filter(({ optimizers }) => optimizers.length);
    const left = some.filter(({ run }) => shows(run));
    const [run] = (left.length ? left : some).toSorted((a, b) => b.newest - a.newest);
    return run ? { run: run.run, optimizer: run.optimizers[0].optimizer } : null;
  }

  /**
   * Tells whether a panel has all recorded steps, at about the right resolution.
   *
   * @param {import("./panel.js").Panel} panel
   * @returns {boolean}
   */
  isFresh(panel) {
    const known = this.#summaries.get(panel);
    if (!panel.overview || known !== JSON.stringify(this.summary(panel.choice))) return false;
    const { first, last, columns } = panel.overview.heat;
    const wanted = Math.min(this.#columns(panel), last - first + 1);
    return Math.abs(wanted - columns) <= ROUGHLY * columns;
  }

  /**
   * Fetches all steps of a run together with those of a view, so that both appear at once.
   *
   * @param {import("./panel.js").Panel} panel
   * @param {import("./panel.js").Panel[]} panels All panels on the screen.
   * @param {import("./state.js").View|null} view
   * @param {function(): void} laidOut Called when the names are known, but not yet the cells.
   */
  async load(panel, panels, view, laidOut) {
    const known = JSON.stringify(this.summary(panel.choice));
    const signal = panel.requests.overview.next();
    const fresh = await getJson("layout", panel.choice, signal);
    const changed = JSON.stringify(fresh.parameters) !== JSON.stringify(panel.layout?.parameters);
    if (changed) {
      panel.overview = panel.detail = null;
      panel.layout = fresh;
      this.join(panels);
      laidOut();
    }
    const columns = this.#columns(panel);
    const part = view && cut(view, fresh);
    const [heat, detail] = await Promise.all([
      getHeat({ ...panel.choice, columns }, signal),
      part && getHeat({ ...panel.choice, ...part, columns }, signal),
    ]);
    const indices = this.join(panels).get(panel);
    panel.overview = new Cells(heat, indices);
    if (detail) {
      panel.requests.detail.next();
      panel.detail = new Cells(detail, indices);
      panel.wanted = wish(view, columns);
    }
    this.#summaries.set(panel, known);
  }

  /**
   * Fetches the steps of a view.
   *
   * @param {import("./panel.js").Panel} panel
   * @param {import("./state.js").View|null} view null for all steps, which need no detail.
   * @returns {Promise<boolean>} Whether there are new cells to draw.
   */
  async loadDetail(panel, view) {
    if (!panel.overview) return false;
    if (!view) {
      panel.requests.detail.next();
      panel.detail = panel.wanted = null;
      return false;
    }
    const columns = this.#columns(panel);
    const { heat, indexOf } = panel.overview;
    const part = cut(view, heat);
    if (!part || panel.wanted === wish(view, columns)) return false;
    panel.wanted = wish(view, columns);
    const signal = panel.requests.detail.next();
    try {
      const found = await getHeat({ ...panel.choice, ...part, columns }, signal);
      panel.detail = new Cells(found, indexOf);
      return true;
    } catch (error) {
      if (isAbort(error)) return false;
      panel.wanted = null;
      throw error;
    }
  }

  /**
   * Joins the names of the panels, and updates the indices in their cells.
   *
   * @param {import("./panel.js").Panel[]} panels
   * @returns {Map<import("./panel.js").Panel, Int32Array>} By name, the index in a panel's layout.
   */
  join(panels) {
    const laid = panels.filter(({ layout }) => layout);
    const { names, indices } = joinedNames(laid.map(({ layout }) => layout));
    if (JSON.stringify(names) !== JSON.stringify(this.names)) this.names = names;
    laid.forEach((panel, index) => {
      for (const cells of [panel.overview, panel.detail]) if (cells) cells.indexOf = indices[index];
    });
    return new Map(laid.map((panel, index) => [panel, indices[index]]));
  }

  #columns(panel) {
    const pixels = this.widthOf(panel);
    // All columns are about the same whole number of device pixels wide.
    const most = Math.min(MOST_COLUMNS, MOST_CELLS / Math.max(1, panel.layout.parameters.length));
    return Math.max(100, Math.ceil(pixels / Math.ceil(pixels / most)));
  }
}

/**
 * Tells whether a panel belongs to a choice.
 *
 * @param {import("./panel.js").Panel} panel
 * @param {import("./state.js").Choice|null} choice
 * @returns {boolean}
 */
export function isOf(panel, choice) {
  return sameChoice(panel.choice, choice);
}

/** Returns the steps of a view that a run has; null if it has none of them. */
function cut(view, all) {
  const first = Math.max(view.first, all.first_step ?? all.first);
  const last = Math.min(view.last, all.last_step ?? all.last);
  return first <= last ? { first, last } : null;
}

function wish(view, columns) {
  return `${view.first}-${view.last}/${columns}`;
}
