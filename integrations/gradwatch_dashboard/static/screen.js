/** The screen: lays out the panels and draws them with common scales. */

import { readTheme } from "./colours.js";
import { h } from "./dom.js";
import { noRows } from "./empty.js";
import { Legend } from "./legend.js";
import { namesWidth, rowHeight, RowModel, ScaleKeeper } from "./picture.js";
import { normRange } from "./strip.js";

const NARROW_GUTTER = 52;
const LEAST_GUTTER = 172;
const MOST_GUTTER = 300;
const GUTTER_SHARE = 0.34;
const PADDING = 8;

/** The panels, the legend and what they share. */
export class Screen {
  /**
   * @param {import("./state.js").State} state
   * @param {import("./data.js").Data} data
   * @param {import("./curve.js").Curve} curve
   * @param {function(): void} clearFilter
   */
  constructor(state, data, curve, clearFilter) {
    this.state = state;
    this.data = data;
    this.curve = curve;
    this.rows = new RowModel();
    this.scales = new ScaleKeeper();
    this.legend = new Legend();
    /** @type {import("./panel.js").Panel[]} */ this.panels = [];
    /** @type {Object|null} What all panels share; null if nothing is drawn. */ this.picture = null;
    this.empty = noRows(clearFilter);
    this.place = h("div", { class: "panels" });
    this.legend.element.hidden = true;
    this.measuring = document.createElement("canvas").getContext("2d");
    this.norms = new WeakMap();
  }

  /** Reads colors and fonts again. */
  restyle() {
    this.theme = readTheme();
  }

  /**
   * Shows a message instead of the panels.
   *
   * @param {HTMLElement} element
   */
  say(element) {
    this.picture = null;
    this.legend.element.hidden = true;
    this.curve.element.hidden = true;
    this.place.classList.remove("beside");
    this.place.replaceChildren(element);
  }

  /**
   * Shows the panels.
   *
   * @param {import("./panel.js").Panel[]} panels
   */
  show(panels) {
    this.panels = panels;
    this.legend.element.hidden = false;
    this.place.replaceChildren(...panels.map((panel) => panel.element));
  }

  /** Returns the width of a panel's plot, in device pixels. */
  plotPixels(panel) {
    this.#frame();
    this.rows.update(this.data.names, this.state);
    panel.measure(this.#gutters());
    return Math.round(panel.width * (window.devicePixelRatio || 1));
  }

  /** The range of steps of all panels together; null if none has data. */
  get all() {
    const heats = this.panels.filter((p) => p.overview).map(({ overview }) => overview.heat);
    if (!heats.length) return null;
    return {
      first: Math.min(...heats.map(({ first }) => first)),
      last: Math.max(...heats.map(({ last }) => last)),
    };
  }

  /**
   * Draws everything, and keeps what was drawn in `picture`.
   *
   * @returns {boolean} Whether there was something to draw.
   */
  draw() {
    const { state, rows, theme } = this;
    const panels = this.panels.filter((panel) => panel.overview);
    const { all } = this;
    if (!all || !this.place.clientWidth || !this.place.contains(panels[0].element)) return false;
    rows.update(this.data.names, state);
    this.#frame();
    const selected = rows.find(state.selected);
    this.curve.element.hidden = !selected;
    const overviews = panels.map(({ overview }) => overview);
    const scale = this.scales.get(rows.all, overviews, state.relative, theme);
    const gutters = this.#gutters();
    this.legend.draw(scale, gutters.gutter(panels[0]), this.place.clientWidth, theme);
    const picture = {
      ...gutters,
      ...{ all, scale, theme, rows: rows.rows, view: state.view ?? all },
      ...{ marker: state.marker, cursor: state.cursor, selected: state.selected },
      small: this.place.clientHeight < 520 * (this.stacked ? 2 : 1),
      clipping: panels.some((panel) => panel.clipping),
      norms: normRange(overviews.map(({ heat }) => heat)),
      several: panels.length > 1,
      stacked: this.stacked,
      isOpen: (row) => rows.open.has(row.key),
      mode: rows.mode,
    };
    const share = this.place.clientHeight / (this.stacked ? this.panels.length : 1);
    const around = panels[0].aroundHeight(picture.small, picture.clipping) + PADDING;
    picture.room = Math.max(60, Math.floor(share - around));
    picture.rowHeight = rowHeight(rows.rows.length, picture.room, state.fit);
    this.picture = picture;
    for (const panel of panels) {
      panel.describe(this.data.summary(panel.choice), this.data.hasSeveral(panel.choice));
      panel.draw(picture);
    }
    this.#noRows(panels[0], rows.rows.length);
    this.curve.draw(picture, selected, panels);
    return true;
  }

  /** Scrolls a row into view, in all panels. */
  reveal(row) {
    for (const panel of this.panels) panel.reveal(row);
  }

  get stacked() {
    return this.state.stacked && this.panels.length > 1;
  }

  #frame() {
    this.place.classList.toggle("beside", this.panels.length > 1 && !this.stacked);
  }

  #gutters() {
    const indented = this.rows.mode === "modules";
    const beside = this.panels.length > 1 && !this.stacked;
    const { rows, measuring, theme, panels } = this;
    measuring.font = theme.small;
    const panelWidth = this.place.clientWidth / (beside ? panels.length : 1);
    const most = Math.max(110, Math.min(MOST_GUTTER, panelWidth * GUTTER_SHARE));
    const names = rows.rows ? namesWidth(rows.rows, indented, measuring) : LEAST_GUTTER;
    const wide = Math.round(Math.min(most, Math.max(LEAST_GUTTER, names)));
    this.place.style.setProperty("--more", `${wide - NARROW_GUTTER}px`);
    const labelled = (panel) => !beside || panel === panels[0];
    return { indented, labelled, gutter: (panel) => (labelled(panel) ? wide : NARROW_GUTTER) };
  }

  #noRows(panel, count) {
    if (count) this.empty.remove();
    else if (!this.empty.isConnected) panel.plot.append(this.empty);
  }
}
