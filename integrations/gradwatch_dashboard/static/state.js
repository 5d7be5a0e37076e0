/** State: what the user has chosen to see. */

const MOST_HISTORY = 100;

/**
 * A run and one of its optimizers.
 *
 * @typedef {{run: string, optimizer: string}} Choice
 */

/**
 * A range of steps.
 *
 * @typedef {{first: number, last: number}} View
 */

/** Everything that the picture depends on; listeners are told what changed. */
export class State {
  /** @type {Choice|null} */ main = null;
  /** @type {Choice|null} */ other = null;
  /** @type {View|null} null: all steps. */ view = null;
  /** @type {string} The last valid regular expression. */ filter = "";
  /** @type {"parameters"|"modules"|null} null: chosen by their number. */ rows = null;
  /** @type {Set<string>|null} Keys of open modules; null: a readable depth. */ open = null;
  /** @type {boolean} */ relative = false;
  /** @type {boolean} Whether all rows are squeezed into the window. */ fit = false;
  /** @type {boolean} Whether two runs are shown one above the other. */ stacked = false;
  /** @type {string|null} Key of the row whose curve is drawn. */ selected = null;
  /** @type {number|null} The step marked with a line. */ marker = null;
  /** @type {{row: number, step: number}|null} The keyboard cursor. */ cursor = null;
  /** @type {Set<string>} Kinds of events that are not listed. */ hidden = new Set();

  #listeners = [];
  #past = [];

  /**
   * Changes fields, and calls the listeners if any value is new.
   *
   * @param {Object} patch Fields and their new values.
   */
  set(patch) {
    const changed = Object.keys(patch).filter((name) => this[name] !== patch[name]);
    if (!changed.length) return;
    Object.assign(this, patch);
    for (const listener of this.#listeners) listener(new Set(changed));
  }

  /**
   * Adds a listener for changes.
   *
   * @param {function(Set<string>): void} listener Receives the names of the changed fields.
   */
  listen(listener) {
    this.#listeners.push(listener);
  }

  /**
   * Zooms or pans.
   *
   * @param {View|null} view
   * @param {boolean} [remember] Whether `back` can return to the previous view.
   */
  look(view, remember = true) {
    if (same(view, this.view)) return;
    if (remember) {
      this.#past.push(this.view);
      if (this.#past.length > MOST_HISTORY) this.#past.shift();
    }
    this.set({ view });
  }

  /** Stores the view that `back` returns to, before a gesture of many small movements. */
  remember() {
    if (!same(this.#past.at(-1) ?? null, this.view) || !this.#past.length) {
      this.#past.push(this.view);
    }
  }

  /** Returns to the view before the last zoom, or to all steps if there was none. */
  back() {
    let view = this.#past.length ? this.#past.pop() : null;
    while (same(view, this.view) && this.#past.length) view = this.#past.pop();
    this.set({ view });
  }

  /** Forgets earlier views, which belong to another run. */
  forget() {
    this.#past = [];
  }
}

/**
 * Limits a view to the steps that exist.
 *
 * @param {View} view
 * @param {View} all
 * @returns {View|null} null if it would show all steps.
 */
export function clamped(view, all) {
  const total = all.last - all.first + 1;
  const size = Math.min(total, Math.max(Math.round(view.last - view.first + 1), 2));
  let first = Math.round(view.first);
  first = Math.max(all.first, Math.min(first, all.last - size + 1));
  return size >= total ? null : { first, last: first + size - 1 };
}

/**
 * Makes a view larger or smaller.
 *
 * @param {View} view
 * @param {number} factor Below 1 to zoom in.
 * @param {number} place The fixed point, as a share of the width, 0 to 1.
 * @returns {View}
 */
export function scaled(view, factor, place) {
  const size = view.last - view.first + 1;
  let more = Math.round(size * factor);
  if (more === size) more += factor < 1 ? -1 : 1;
  const first = view.first + Math.round(place * (size - more));
  return { first, last: first + Math.max(1, more) - 1 };
}

function same(one, other) {
  return one === other || (one && other && one.first === other.first && one.last === other.last);
}
