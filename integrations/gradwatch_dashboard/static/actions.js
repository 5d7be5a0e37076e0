/** Actions: what a user can do by mouse, keys or buttons. */

import { isOf } from "./data.js";
import { around, modulesOf } from "./rows.js";
import { clamped, scaled } from "./state.js";
import { describe, spoken } from "./tooltip.js";

const JUMP = 200;

/** Changes the state; everything else reacts to it. */
export class Actions {
  /**
   * @param {Object} parts
   * @param {import("./state.js").State} parts.state
   * @param {import("./screen.js").Screen} parts.screen
   * @param {import("./data.js").Data} parts.data
   * @param {import("./curve.js").Curve} parts.curve
   * @param {import("./tooltip.js").Tooltip} parts.tooltip
   * @param {HTMLElement} parts.voice The live region that screen readers read out.
   */
  constructor(parts) {
    Object.assign(this, parts);
    this.rest = 0;
    this.toReveal = -1;
  }

  /** What all panels share; null while there is nothing to see. */
  get picture() {
    return this.screen.all ? this.screen.picture : null;
  }

  /** Steps in view. */
  get view() {
    return this.state.view ?? this.screen.all;
  }

  /**
   * Zooms.
   *
   * @param {number} factor Below 1 to zoom in.
   * @param {number} [place] The fixed point, as a share of the width; by default the cursor.
   * @param {boolean} [remember] Whether `back` undoes it.
   */
  zoom(factor, place = this.#cursorPlace(), remember = true) {
    if (this.picture) this.look(scaled(this.view, factor, place), remember);
  }

  /**
   * Moves along the steps.
   *
   * @param {number} share Distance, as a share of the width.
   * @param {boolean} [remember] Whether `back` undoes it. If not, fractions of a step add up over
   *   several calls.
   */
  pan(share, remember = true) {
    if (!this.picture || !this.state.view) return;
    const { first, last } = this.view;
    const exact = share * (last - first + 1) + (remember ? 0 : this.rest);
    const distance = Math.round(exact);
    this.rest = exact - distance;
    this.look({ first: first + distance, last: last + distance }, remember);
  }

  /** Shows a range of steps; null for all. */
  look(view, remember = true) {
    if (!this.picture) return;
    this.state.look(view && clamped(view, this.screen.all), remember);
  }

  /** Shows all steps. */
  reset() {
    this.state.look(null);
  }

  /** Opens or closes a module. */
  toggle(row) {
    if (row.leaf >= 0) return;
    const open = new Set(this.screen.rows.open);
    if (!open.delete(row.key)) open.add(row.key);
    this.state.set({ open });
  }

  /** Shows the step and the row of an event. */
  jump(event) {
    if (!this.picture) return;
    const { rows } = this.screen;
    const leaf = this.data.names.indexOf(event.parameter);
    if (leaf >= 0 && rows.root) {
      this.state.set({ open: new Set([...rows.open, ...around(rows.root, leaf)]) });
    }
    const { first, last } = this.view;
    const size = Math.min(last - first + 1, JUMP);
    const from = event.step - Math.floor(size / 2);
    this.look({ first: from, last: from + size - 1 });
    rows.update(this.data.names, this.state);
    const row = rows.rows.findIndex((node) => node.key === `p:${event.parameter}`);
    this.state.set({ marker: event.step, cursor: row >= 0 ? { row, step: event.step } : null });
    this.toReveal = row;
    const panel = this.screen.panels.find((one) => isOf(one, event.choice));
    this.say(panel ?? this.screen.panels[0], rows.rows[row] ?? null, event.step);
  }

  /** Describes a cell to screen readers, and in the tooltip if the heat map has the focus. */
  say(panel, row, step) {
    const found = describe(panel, row, step, this.view);
    this.voice.textContent = spoken(found);
    const { cursor } = this.state;
    if (!cursor || !found || document.activeElement !== panel.scroll) return;
    const box = panel.scroll.getBoundingClientRect();
    const y = (cursor.row + 0.5) * panel.rowHeight - panel.scroll.scrollTop;
    const x = box.left + panel.left + panel.xOf(step, this.view);
    this.tooltip.show(found, null, x, box.top + y);
  }

  /** Handles a click: toggles a module on its name; elsewhere shows or hides the row's curve. */
  choose({ row, inPlot }) {
    if (!row) return;
    if (!inPlot && row.leaf < 0) this.toggle(row);
    else this.state.set({ selected: this.state.selected === row.key ? null : row.key });
  }

  /** Zooms to the steps between two positions, given as shares of the width. */
  select(from, to) {
    if (!this.picture) return;
    const { first, last } = this.view;
    const size = last - first + 1;
    const end = Math.max(Math.floor(first + from * size), Math.ceil(first + to * size) - 1);
    this.look({ first: Math.floor(first + from * size), last: end });
  }

  /** Shows what is under the pointer; hides it if `point` is null. */
  hover(panel, point, x, y) {
    if (!this.picture) return;
    const step = point ? point.step : null;
    const row = point?.row ? this.picture.rows.indexOf(point.row) : null;
    for (const one of this.screen.panels) one.hover(step, row, this.picture);
    this.curve.hover(step, this.picture.view);
    const found = point && describe(panel, point.row, point.step, this.picture.view);
    if (!found) return this.tooltip.hide();
    this.tooltip.show(found, this.picture.several ? panel.label : null, x, y);
  }

  /** Scrolls to the row whose curve is drawn, because the curve takes room from the rows. */
  revealSelected() {
    const { rows } = this.screen.rows;
    this.toReveal = rows?.findIndex(({ key }) => key === this.state.selected) ?? -1;
  }

  /** Opens all modules. */
  expandAll() {
    const { root } = this.screen.rows;
    this.state.set({ open: new Set(root ? modulesOf(root).map(({ key }) => key) : []) });
  }

  /** Closes all modules. */
  collapseAll() {
    this.state.set({ open: new Set() });
  }

  #cursorPlace() {
    const { cursor } = this.state;
    const { first, last } = this.view;
    const inside = cursor && cursor.step >= first && cursor.step <= last;
    return inside ? (cursor.step - first + 0.5) / (last - first + 1) : 0.5;
  }
}
