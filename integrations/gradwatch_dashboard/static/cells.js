/** Cells: the numbers of a row, for a parameter or combined over a module. */

/**
 * The numbers of a row.
 *
 * @typedef {Object} RowCells
 * @property {Float32Array} values Norms; -1: no gradient, -2: nothing recorded.
 * @property {ArrayLike<number>|null} bad Number of steps with a NaN or an Inf; null if none.
 */

/** The rows of one answer of the server. Computed rows and medians are cached. */
export class Cells {
  /**
   * @param {import("./api.js").Heat} heat
   * @param {Int32Array} indexOf For each parameter of the picture its row in `heat`; -1 if absent.
   */
  constructor(heat, indexOf) {
    this.heat = heat;
    this.indexOf = indexOf;
    this.known = new WeakMap();
    this.medians = new WeakMap();
  }

  /**
   * Returns the numbers of a row.
   *
   * @param {import("./rows.js").Node} row
   * @returns {RowCells}
   */
  of(row) {
    let cells = this.known.get(row);
    if (!cells) {
      cells = row.leaf >= 0 ? this.#parameter(row.leaf) : this.#module(row.leaves);
      this.known.set(row, cells);
    }
    return cells;
  }

  /**
   * Returns the median of a row's finite norms above 0.
   *
   * @param {import("./rows.js").Node} row
   * @returns {number} NaN if there are none.
   */
  typical(row) {
    const known = this.medians.get(row);
    if (known !== undefined) return known;
    const some = this.of(row).values.filter((value) => value > 0 && value < Infinity).sort();
    const [low, high] = [(some.length - 1) >> 1, some.length >> 1];
    const median = some.length ? (some[low] + some[high]) / 2 : NaN;
    this.medians.set(row, median);
    return median;
  }

  #parameter(leaf) {
    const { columns, norms, bad } = this.heat;
    const index = this.indexOf[leaf];
    if (index < 0) return { values: new Float32Array(columns).fill(-2), bad: null };
    const [from, to] = [index * columns, (index + 1) * columns];
    return { values: norms.subarray(from, to), bad: bad && bad.subarray(from, to) };
  }

  /**
   * Combines parameters by the root of the sum of squares of their finite norms. A value is NaN if
   * no norm is finite but one is NaN or Inf; -1 if none has a gradient; -2 if nothing was recorded.
   * `bad` is the largest count of any parameter.
   */
  #module(leaves) {
    const { columns, norms, bad } = this.heat;
    const squares = new Float64Array(columns);
    const states = new Float32Array(columns).fill(-2);
    const counts = bad && new Uint16Array(columns);
    for (const leaf of leaves) {
      if (this.indexOf[leaf] < 0) continue;
      const offset = this.indexOf[leaf] * columns;
      for (let c = 0; c < columns; c++) {
        const value = norms[offset + c];
        if (value >= 0 && value < Infinity) {
          squares[c] += value * value;
          if (!(states[c] >= 0)) states[c] = 0;
        } else if (value === -1) {
          if (states[c] === -2) states[c] = -1;
        } else if (value !== -2 && states[c] < 0) states[c] = NaN;
        if (counts && bad[offset + c] > counts[c]) counts[c] = bad[offset + c];
      }
    }
    for (let c = 0; c < columns; c++) if (states[c] === 0) states[c] = Math.sqrt(squares[c]);
    return { values: states, bad: counts };
  }
}

/**
 * Tells whether a cell is bad: it has a step with a NaN or an Inf.
 *
 * @param {RowCells} cells
 * @param {number} column
 * @returns {boolean}
 */
export function isBad(cells, column) {
  const value = cells.values[column];
  return (cells.bad !== null && cells.bad[column] > 0) || value !== value || value === Infinity;
}

/**
 * Finds the column of a step.
 *
 * @param {{first: number, last: number, columns: number}} heat
 * @param {number} step
 * @returns {number} -1 if the step is outside the heat map.
 */
export function columnOf(heat, step) {
  if (step < heat.first || step > heat.last) return -1;
  return Math.floor(((step - heat.first) * heat.columns) / (heat.last - heat.first + 1));
}

/**
 * Finds the steps of a column.
 *
 * @param {{first: number, last: number, columns: number}} heat
 * @param {number} column
 * @returns {{first: number, last: number}}
 */
export function stepsOf(heat, column) {
  const span = heat.last - heat.first + 1;
  const start = (c) => heat.first + Math.ceil((c * span) / heat.columns);
  return { first: start(column), last: start(column + 1) - 1 };
}
