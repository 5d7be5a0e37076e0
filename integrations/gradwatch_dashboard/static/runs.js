/** The list of runs: one is shown, and a second one can be compared with it. */

import { flag, h } from "./dom.js";
import { count, counted, shown } from "./format.js";

/** Runs that have gradient data. */
export class Runs {
  /** @param {import("./state.js").State} state */
  constructor(state) {
    this.state = state;
    this.all = false;
    this.summary = h("span", { class: "side-count" });
    this.list = h("ul", { class: "run-list" });
    this.note = h("p", { class: "note", hidden: true });
    const head = h("h3", {}, "Runs", this.summary);
    this.element = h("section", { class: "runs" }, head, this.list, this.note);
  }

  /**
   * Writes the list.
   *
   * @param {Object[]} runs The answer of the server.
   * @param {function(string): boolean} shows Whether a run passes TensorBoard's own filter.
   */
  show(runs, shows) {
    const { main, other } = this.state;
    const inUse = (run) => run === main?.run || run === other?.run;
    const left = runs.filter(({ run }) => this.all || shows(run) || inUse(run));
    const hidden = runs.length - runs.filter(({ run }) => shows(run)).length;
    this.summary.textContent = count(runs.length);
    const items = left.flatMap((run) => run.optimizers.map((part) => this.#item(run, part)));
    const focused = document.activeElement?.dataset?.focus;
    this.list.replaceChildren(...items);
    if (focused) {
      const again = [...this.list.querySelectorAll("button")];
      again.find((button) => button.dataset.focus === focused)?.focus();
    }
    this.note.hidden = !hidden;
    if (!hidden) return;
    const text = this.all ? "Follow TensorBoard's filter" : "Show them";
    const toggle = () => {
      this.all = !this.all;
      this.show(runs, shows);
    };
    const said = `${counted(hidden, "run")} filtered out in TensorBoard. `;
    this.note.replaceChildren(said, h("button", { class: "link", text, onclick: toggle }));
  }

  #item(run, part) {
    const choice = { run: run.run, optimizer: part.optimizer };
    const { main, other } = this.state;
    const chosen = sameChoice(choice, main);
    const compared = sameChoice(choice, other);
    const look = () => {
      if (chosen) return;
      // Choosing the compared run swaps the two. The steps in view stay, if the run has them.
      this.state.set({ main: choice, other: compared ? main : other, marker: null, cursor: null });
    };
    const meta = h("span", { class: "run-meta" });
    if (run.optimizers.length > 1) meta.append(`${shown(part.optimizer)} · `);
    meta.append(`${count(part.parameters)} params · ${count(part.last_step)} steps`);
    if (part.bad_steps) {
      meta.append(" · ", h("span", { class: "bad-count", text: `${count(part.bad_steps)} bad` }));
    }
    const name = h("span", { class: "run-name", text: shown(run.run) });
    const title = shown(run.run);
    const button = h("button", { class: "run", onclick: look, title }, name, meta);
    flag(button, "aria-pressed", chosen);
    button.dataset.focus = JSON.stringify([choice, "run"]);
    const item = h("li", { class: chosen ? "chosen" : compared ? "compared" : null }, button);
    if (!chosen) item.append(this.#compare(choice, compared));
    return item;
  }

  #compare(choice, compared) {
    const toggle = () => this.state.set({ other: compared ? null : choice });
    const text = compared ? "Remove" : "Compare";
    const label = `${text} ${shown(choice.run)}`;
    const button = h("button", { class: "compare", text, onclick: toggle, "aria-label": label });
    flag(button, "aria-pressed", compared);
    button.dataset.focus = JSON.stringify([choice, "compare"]);
    return button;
  }
}

/**
 * Tells whether two choices are the same.
 *
 * @param {import("./state.js").Choice|null} one
 * @param {import("./state.js").Choice|null} other
 * @returns {boolean}
 */
export function sameChoice(one, other) {
  return !!one && !!other && one.run === other.run && one.optimizer === other.optimizer;
}
