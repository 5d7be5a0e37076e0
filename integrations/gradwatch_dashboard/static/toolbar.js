/** The bar above the heat maps: chooses the rows, the colors and the steps. */

import { flag, h } from "./dom.js";
import { steps } from "./format.js";

const SVG = "http://www.w3.org/2000/svg";
const ICONS = {
  minus: "M3 8h10",
  plus: "M3 8h10M8 3v10",
  left: "M10 3 5 8l5 5",
  right: "M6 3l5 5-5 5",
  expand: "M4 6l4 4 4-4",
  collapse: "M4 10l4-4 4 4",
};

/** The bar; its buttons call the application. */
export class Toolbar {
  /**
   * @param {import("./state.js").State} state
   * @param {import("./actions.js").Actions} actions
   * @param {function(): void} openHelp
   */
  constructor(state, actions, openHelp) {
    this.state = state;
    this.input = h("input", {
      type: "search",
      class: "filter",
      placeholder: "Filter parameters (regular expression)",
      "aria-label": "Filter parameters by a regular expression",
      spellcheck: "false",
      autocomplete: "off",
      oninput: () => this.#filter(),
    });
    this.said = h("span", { class: "filter-note", role: "status" });
    this.rows = choice("Rows", [
      ["Parameters", () => state.set({ rows: "parameters" })],
      ["Modules", () => state.set({ rows: "modules" })],
    ]);
    this.tree = h(
      "span",
      { class: "group", role: "group", "aria-label": "Modules" },
      action("expand", "Expand all", () => actions.expandAll(), true),
      action("collapse", "Collapse all", () => actions.collapseAll(), true),
    );
    this.colours = choice("Colors", [
      ["Norm", () => state.set({ relative: false })],
      ["Relative", () => state.set({ relative: true })],
    ]);
    this.colours.lastChild.title = "Each norm divided by the median of its row";
    this.fit = h("button", {
      class: "button",
      text: "Fit rows",
      title: "Squeeze all rows into the window",
      onclick: () => state.set({ fit: !state.fit }),
    });
    this.sides = choice("Two runs", [
      ["Side by side", () => state.set({ stacked: false })],
      ["Stacked", () => state.set({ stacked: true })],
    ]);
    this.seen = h("span", { class: "seen" });
    this.reset = h("button", { class: "button", text: "Reset", onclick: () => actions.reset() });
    this.reset.title = "Show all steps (0)";
    const zoom = h(
      "span",
      { class: "group", role: "group", "aria-label": "Steps in view" },
      action("left", "Earlier steps", () => actions.pan(-0.5)),
      action("minus", "Zoom out", () => actions.zoom(2)),
      action("plus", "Zoom in", () => actions.zoom(0.5)),
      action("right", "Later steps", () => actions.pan(0.5)),
    );
    const help = h("button", { class: "button circle", text: "?", onclick: openHelp });
    help.title = "Mouse and keys (?)";
    help.setAttribute("aria-label", "Mouse and keys");
    this.element = h(
      "div",
      { class: "toolbar", role: "toolbar", "aria-label": "Gradients" },
      h("span", { class: "filter-box" }, this.input, this.said),
      this.rows,
      this.tree,
      this.colours,
      this.fit,
      this.sides,
      h("span", { class: "steps-box" }, this.seen, zoom, this.reset),
      help,
    );
  }

  /**
   * Shows the state.
   *
   * @param {{mode: string, view: {first: number, last: number}, several: boolean}} picture
   */
  show(picture) {
    const { state } = this;
    if (document.activeElement !== this.input && !this.input.classList.contains("wrong")) {
      this.input.value = state.filter;
    }
    press(this.rows, picture.mode === "modules" ? 1 : 0);
    press(this.colours, state.relative ? 1 : 0);
    press(this.sides, state.stacked ? 1 : 0);
    flag(this.fit, "aria-pressed", state.fit);
    this.tree.hidden = picture.mode !== "modules";
    this.sides.hidden = !picture.several;
    this.reset.disabled = state.view === null;
    this.seen.textContent = steps(picture.view.first, picture.view.last);
  }

  /** Clears the filter. */
  clear() {
    this.input.value = "";
    this.#filter();
  }

  #filter() {
    const text = this.input.value;
    let wrong = "";
    try {
      new RegExp(text);
    } catch (error) {
      wrong = String(error.message).replace(/^Invalid regular expression: /, "");
    }
    this.input.classList.toggle("wrong", wrong !== "");
    this.input.setAttribute("aria-invalid", String(wrong !== ""));
    const kept = this.state.filter ? `still “${this.state.filter}”` : "no filter yet";
    this.said.textContent = wrong ? `Not a regular expression; ${kept}` : "";
    this.said.title = wrong;
    if (!wrong) this.state.set({ filter: text });
  }
}

function choice(label, options) {
  const buttons = options.map(([text, onclick]) => h("button", { class: "button", text, onclick }));
  return h("span", { class: "group", role: "group", "aria-label": label }, ...buttons);
}

function press(group, index) {
  [...group.children].forEach((button, at) => flag(button, "aria-pressed", at === index));
}

function action(icon, label, onclick, named = false) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", "0 0 16 16");
  svg.setAttribute("aria-hidden", "true");
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", ICONS[icon]);
  svg.append(path);
  const kind = named ? "button" : "button icon";
  const button = h("button", { class: kind, title: label, onclick }, svg);
  if (named) button.append(label);
  else button.setAttribute("aria-label", label);
  return button;
}
