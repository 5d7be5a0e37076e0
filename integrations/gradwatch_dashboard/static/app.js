/** The application: state and data in, elements out. */

import { isAbort } from "./api.js";
import { Curve } from "./curve.js";
import { Data, isOf } from "./data.js";
import { h, perFrame } from "./dom.js";
import { failed, loading, noRuns } from "./empty.js";
import { Events } from "./events.js";
import { listenToPointer } from "./gestures.js";
import { Help } from "./help.js";
import { runFilter } from "./host.js";
import { listenToKeys } from "./keyboard.js";
import { Panel } from "./panel.js";
import { around, modulesOf } from "./rows.js";
import { Runs } from "./runs.js";
import { Screen } from "./screen.js";
import { clamped, scaled, State } from "./state.js";
import { Toolbar } from "./toolbar.js";
import { describe, spoken, Tooltip } from "./tooltip.js";

const JUMP = 200;
const [FIRST, DRAWN] = ["gradwatch: first drawn", "gradwatch: drawn"];

/** The "Gradients" tab. */
export class App {
  constructor() {
    this.state = new State();
    const data = new Data((panel) => this.screen.plotPixels(panel));
    this.data = data;
    this.curve = new Curve(() => this.state.set({ selected: null }));
    this.screen = new Screen(this.state, data, this.curve, () => this.toolbar.clear());
    this.runs = new Runs(this.state);
    this.events = new Events(this.state, (event) => this.jump(event));
    this.tooltip = new Tooltip();
    this.help = new Help();
    this.toolbar = new Toolbar(this.state, {
      zoom: (factor) => this.zoom(factor, this.#cursorPlace()),
      pan: (share) => this.pan(share, true),
      reset: () => this.reset(),
      expand: () => this.state.set({ open: this.#modules() }),
      collapse: () => this.state.set({ open: new Set() }),
      help: () => this.help.open(),
    });
    this.pending = 0;
    this.#build();
    this.redraw = perFrame(() => this.#draw());
    this.state.listen((changed) => this.#changed(changed));
    new ResizeObserver(this.redraw).observe(this.screen.place);
    document.addEventListener("keydown", (event) => {
      const typing = event.target instanceof HTMLInputElement;
      if (event.key === "?" && !typing) this.help.open();
    });
  }

  /** What is common to all panels; null while there is nothing to see. */
  get picture() {
    return this.screen.picture;
  }

  /** Reads colours and letters again. */
  restyle() {
    this.screen.restyle();
    this.redraw();
  }

  /** Asks the server what is new. */
  async refresh() {
    await this.#busy(async () => {
      await this.data.loadRuns();
      const { shows } = runFilter();
      const { main, other } = this.state;
      const chosen = this.data.completed(main) ?? this.data.newest(shows);
      if (!chosen) {
        this.runs.show(this.data.runs, shows);
        this.screen.panels = [];
        return this.screen.say(noRuns());
      }
      this.refreshing = true;
      this.state.set({ main: chosen, other: this.data.completed(other) });
      this.refreshing = false;
      this.runs.show(this.data.runs, shows);
      this.#arrange();
      await this.#loadStale();
    });
  }

  /** Follows TensorBoard's own filter of runs. */
  refilter() {
    this.runs.show(this.data.runs, runFilter().shows);
  }

  /** Zooms by a factor about a share of the width. */
  zoom(factor, place = 0.5) {
    if (this.picture) this.look(scaled(this.#view(), factor, place));
  }

  /** Moves by a share of the width. */
  pan(share, remember = false) {
    if (!this.picture || !this.state.view) return;
    const { first, last } = this.#view();
    const exact = share * (last - first + 1) + (remember ? 0 : (this.rest ?? 0));
    const distance = Math.round(exact);
    this.rest = exact - distance;
    this.look({ first: first + distance, last: last + distance }, remember);
  }

  /** Shows some steps. */
  look(view, remember = true) {
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

  /** Leads to the step and the row of an event. */
  jump(event) {
    if (!this.picture) return;
    const { rows } = this.screen;
    const leaf = this.data.names.indexOf(event.parameter);
    if (leaf >= 0 && rows.root) {
      this.state.set({ open: new Set([...rows.open, ...around(rows.root, leaf)]) });
    }
    const { first, last } = this.#view();
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

  /** Tells those who listen what a cell holds; shows it to those who use the keys. */
  say(panel, row, step) {
    const found = describe(panel, row, step, this.#view());
    this.voice.textContent = spoken(found);
    const { cursor } = this.state;
    if (!cursor || !found || document.activeElement !== panel.scroll) return;
    const box = panel.scroll.getBoundingClientRect();
    const y = (cursor.row + 0.5) * panel.rowHeight - panel.scroll.scrollTop;
    const x = box.left + panel.left + panel.xOf(step, this.#view());
    this.tooltip.show(found, null, x, box.top + y);
  }

  #build() {
    this.screen.say(loading());
    this.voice = h("div", { class: "unseen", "aria-live": "polite", id: "voice" });
    this.note = h("p", { class: "server-note", role: "status", hidden: true });
    const side = h("aside", { class: "side" }, this.runs.element, this.events.element, this.note);
    const { place, legend } = this.screen;
    const main = h("main", {}, this.toolbar.element, place, legend.element, this.curve.element);
    this.element = h("div", { class: "app" }, side, main, this.tooltip.element);
    this.element.append(this.help.element, this.help.spoken, this.voice);
    this.element.dataset.state = "loading";
    this.toolbar.element.hidden = true;
  }

  #view() {
    return this.state.view ?? this.screen.all;
  }

  #modules() {
    const { root } = this.screen.rows;
    return new Set(root ? modulesOf(root).map(({ key }) => key) : []);
  }

  #cursorPlace() {
    const { cursor } = this.state;
    const { first, last } = this.#view();
    const inside = cursor && cursor.step >= first && cursor.step <= last;
    return inside ? (cursor.step - first + 0.5) / (last - first + 1) : 0.5;
  }

  #changed(changed) {
    const has = (...names) => names.some((name) => changed.has(name));
    if (has("main", "other") && this.data.runs.length && !this.refreshing) {
      this.refilter();
      this.#arrange();
      this.#busy(() => this.#loadStale());
    }
    if (has("hidden")) this.events.show();
    if (has("view")) this.#busy(() => this.#loadDetail());
    if (has("rows", "filter", "open")) this.state.cursor = null;
    if (changed.size === 1 && has("cursor")) return this.#moveCursor();
    this.onChange?.();
    this.redraw();
  }

  #moveCursor() {
    if (!this.state.cursor) this.tooltip.hide();
    if (!this.picture) return;
    this.picture.cursor = this.state.cursor;
    for (const panel of this.screen.panels) panel.place(this.picture);
  }

  /** Makes a panel for each run on the screen; those that stay keep what they have. */
  #arrange() {
    const { main, other } = this.state;
    const wanted = [main, other].filter((choice) => choice);
    const { panels } = this.screen;
    const next = wanted.map(
      (choice) => panels.find((panel) => isOf(panel, choice)) ?? this.#panel(choice),
    );
    const same = next.length === panels.length && next.every((panel, at) => panel === panels[at]);
    if (same && this.screen.place.contains(next[0].element)) return;
    for (const panel of panels) if (!next.includes(panel)) panel.abandon();
    this.screen.show(next);
    this.toolbar.element.hidden = false;
    this.data.join(next);
  }

  #panel(choice) {
    const panel = new Panel(choice);
    panel.describe(this.data.summary(choice), false);
    listenToPointer(panel, {
      at: (x, y) => (this.picture ? panel.at(x, y, this.picture) : {}),
      hover: (point, x, y) => this.#hover(panel, point, x, y),
      choose: (point) => this.#choose(point),
      select: (from, to) => this.#select(from, to),
      pan: (share) => this.pan(share),
      zoom: (factor, share) => this.look(scaled(this.#view(), factor, share), false),
      reset: () => this.reset(),
      remember: () => this.state.remember(),
    });
    listenToKeys(panel, this);
    panel.scroll.addEventListener("scroll", () => {
      for (const one of this.screen.panels) one.scroll.scrollTop = panel.scroll.scrollTop;
      this.redraw();
    });
    return panel;
  }

  #choose({ row, inPlot }) {
    if (!row) return;
    if (!inPlot && row.leaf < 0) this.toggle(row);
    else this.state.set({ selected: this.state.selected === row.key ? null : row.key });
  }

  #select(from, to) {
    const { first, last } = this.#view();
    const size = last - first + 1;
    const end = Math.max(Math.floor(first + from * size), Math.ceil(first + to * size) - 1);
    this.look({ first: Math.floor(first + from * size), last: end });
  }

  #hover(panel, point, x, y) {
    if (!this.picture) return;
    const step = point ? point.step : null;
    const row = point?.row ? this.picture.rows.indexOf(point.row) : null;
    for (const one of this.screen.panels) one.hover(step, row, this.picture);
    this.curve.hover(step, this.picture.view);
    const found = point && describe(panel, point.row, point.step, this.picture.view);
    if (!found) return this.tooltip.hide();
    this.tooltip.show(found, this.picture.several ? panel.choice.run : null, x, y);
  }

  #draw() {
    if (!this.screen.draw()) return;
    const { picture } = this;
    this.toolbar.show(picture);
    if (this.toReveal >= 0) {
      const row = this.toReveal;
      this.toReveal = -1;
      this.screen.reveal(row);
      this.redraw();
    }
    const selected = this.screen.rows.find(this.state.selected);
    const panels = this.screen.panels.filter((panel) => panel.overview);
    if (selected) {
      this.#busy(async () => {
        if (await this.curve.load(selected, panels, picture.view)) this.redraw();
      });
    }
    performance.clearMarks(DRAWN);
    performance.mark(DRAWN);
    if (!performance.getEntriesByName(FIRST).length) performance.mark(FIRST);
  }

  /** Fetches the runs on the screen that have grown; a view of the newest step follows it. */
  async #loadStale() {
    const { panels } = this.screen;
    const before = this.screen.all;
    const stale = panels.filter((panel) => !this.data.isFresh(panel));
    const { view } = this.state;
    const follows = view && before && view.last >= before.last;
    const ends = panels.map(({ choice }) => this.data.summary(choice)?.last_step ?? 0);
    const grown = follows ? Math.max(0, Math.max(...ends) - before.last) : 0;
    const next = view && { first: view.first + grown, last: view.last + grown };
    const laidOut = () => this.redraw();
    await Promise.all(stale.map((panel) => this.data.load(panel, panels, next, laidOut)));
    if (grown) this.state.set({ view: next });
    if (this.state.view) this.state.look(clamped(this.state.view, this.screen.all), false);
    if (stale.length || this.eventsOf !== panels) {
      this.eventsOf = panels;
      await this.events.load(panels.map(({ choice }) => choice));
    }
    this.redraw();
  }

  async #loadDetail() {
    const { panels, picture } = this.screen;
    if (!picture) return;
    const load = (panel) => this.data.loadDetail(panel, this.state.view);
    const found = await Promise.all(panels.map(load));
    if (found.some((fresh) => fresh)) this.redraw();
  }

  /** Does something that takes a while; says what went wrong. */
  async #busy(task) {
    this.pending += 1;
    this.element.dataset.state = "loading";
    try {
      await task();
      this.note.hidden = true;
    } catch (error) {
      if (!isAbort(error)) this.#fail(error);
    } finally {
      this.pending -= 1;
      // The last frame is drawn before anyone is told that all is there.
      requestAnimationFrame(() => {
        if (!this.pending) this.element.dataset.state = "ready";
      });
    }
  }

  #fail(error) {
    if (!this.picture) this.screen.say(failed(error.message, () => this.refresh()));
    this.note.hidden = !this.picture;
    this.note.textContent = error.message;
  }
}
