/** The application: connects state, data and elements. */

import { Actions } from "./actions.js";
import { isAbort } from "./api.js";
import { Curve } from "./curve.js";
import { Data, isOf } from "./data.js";
import { h, perFrame } from "./dom.js";
import { failed, loading, noRuns } from "./empty.js";
import { Events } from "./events.js";
import { listenToPointer } from "./gestures.js";
import { Help } from "./help.js";
import { isInFront, runFilter } from "./host.js";
import { listenToKeys } from "./keyboard.js";
import { Panel } from "./panel.js";
import { Runs, sameChoice } from "./runs.js";
import { Screen } from "./screen.js";
import { clamped, State } from "./state.js";
import { Toolbar } from "./toolbar.js";
import { Tooltip } from "./tooltip.js";

const SETTLED = 300;
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
    this.tooltip = new Tooltip();
    this.voice = h("div", { class: "unseen", "aria-live": "polite", id: "voice" });
    this.actions = new Actions(this);
    this.events = new Events(this.state, (event) => this.actions.jump(event));
    this.help = new Help();
    this.toolbar = new Toolbar(this.state, this.actions, () => this.help.open());
    this.pending = 0;
    this.#build();
    this.redraw = perFrame(() => this.#draw());
    this.state.listen((changed) => this.#changed(changed));
    new ResizeObserver(() => this.#resized()).observe(this.screen.place);
    document.addEventListener("keydown", (event) => {
      const typing = event.target instanceof HTMLInputElement;
      if (event.key === "?" && !typing) this.help.open();
    });
  }

  /** Whether the tab is visible. */
  get isSeen() {
    return !document.hidden && this.element.clientWidth > 0 && isInFront();
  }

  /** Reads colors and fonts again, and redraws. */
  restyle() {
    this.screen.restyle();
    this.redraw();
  }

  /** Fetches the list of runs, and what has changed in those on the screen. */
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

  /**
   * Applies the state of a link. Runs that do not exist are ignored.
   *
   * @param {Object} patch The result of `readLink`.
   */
  restore(patch) {
    for (const name of ["main", "other"]) {
      if (!patch[name] || !this.data.runs.length) continue;
      const choice = this.data.completed(patch[name]);
      if (choice && !sameChoice(choice, this.state[name])) patch[name] = choice;
      else delete patch[name];
    }
    this.state.set(patch);
  }

  /** Applies TensorBoard's own filter to the list of runs. */
  refilter() {
    this.runs.show(this.data.runs, runFilter().shows);
  }

  #build() {
    this.screen.say(loading());
    this.note = h("p", { class: "server-note", role: "status", hidden: true });
    const side = h("aside", { class: "side" }, this.runs.element, this.events.element, this.note);
    const { place, legend } = this.screen;
    const main = h("main", {}, this.toolbar.element, place, legend.element, this.curve.element);
    this.element = h("div", { class: "app" }, side, main, this.tooltip.element);
    this.element.append(this.help.element, this.help.spoken, this.voice);
    this.element.dataset.state = "loading";
    this.toolbar.element.hidden = true;
  }

  #changed(changed) {
    const has = (...names) => names.some((name) => changed.has(name));
    if (has("main", "other", "stacked") && this.data.runs.length && !this.refreshing) {
      this.refilter();
      this.#arrange();
      this.#busy(() => this.#loadStale());
    }
    if (has("hidden")) this.events.show();
    if (has("selected")) this.actions.revealSelected();
    if (has("view")) this.#busy(() => this.#loadDetail());
    if (has("rows", "filter", "open")) this.state.cursor = null;
    if (changed.size === 1 && has("cursor")) return this.#moveCursor();
    this.onChange?.();
    this.redraw();
  }

  #moveCursor() {
    const { picture, panels } = this.screen;
    if (!this.state.cursor) this.tooltip.hide();
    if (!picture) return;
    picture.cursor = this.state.cursor;
    for (const panel of panels) panel.place(picture);
  }

  #resized() {
    clearTimeout(this.settling);
    if (!this.isSeen) return;
    this.redraw();
    this.settling = setTimeout(() => this.#busy(() => this.#loadStale()), SETTLED);
  }

  /** Makes a panel for each run on the screen; runs that stay keep their panel and its data. */
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
    panel.describe(this.data.summary(choice), this.data.hasSeveral(choice));
    listenToPointer(panel, this.actions);
    listenToKeys(panel, this.actions);
    panel.scroll.addEventListener("scroll", () => {
      for (const one of this.screen.panels) one.scroll.scrollTop = panel.scroll.scrollTop;
      this.redraw();
    });
    return panel;
  }

  #draw() {
    if (!this.screen.draw()) return;
    const { picture } = this.screen;
    this.toolbar.show(picture);
    if (this.actions.toReveal >= 0) {
      this.screen.reveal(this.actions.toReveal);
      this.actions.toReveal = -1;
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

  /** Fetches the runs on the screen that have grown. A view that shows the newest step moves on. */
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
    if (grown && this.state.view === view) this.state.set({ view: next });
    const { all } = this.screen;
    if (all && this.state.view) this.state.look(clamped(this.state.view, all), false);
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

  /** Runs a task, shows that the tab is loading, and reports an error. */
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
      // "ready" is set only after the last frame, so that everything is drawn by then.
      requestAnimationFrame(() => {
        if (!this.pending) this.element.dataset.state = "ready";
      });
    }
  }

  #fail(error) {
    const { picture } = this.screen;
    if (!picture) this.screen.say(failed(error.message, () => this.refresh()));
    this.note.hidden = !picture;
    this.note.textContent = error.message;
  }
}
