/** The help on the mouse and the keys. */

import { h } from "./dom.js";

const KEYS = [
  ["Mouse", null],
  ["drag", "zoom in on steps"],
  ["shift + drag", "move along the steps"],
  ["ctrl + wheel, pinch", "zoom at the pointer"],
  ["shift + wheel", "move along the steps"],
  ["double click", "show all steps"],
  ["click on a row", "draw its curve"],
  ["click on a module's name", "open or close it"],
  ["Keys, in the heat map", null],
  ["arrows", "move from cell to cell; with shift, by ten"],
  ["Home, End", "first or last step in view"],
  ["Page up, Page down", "a page of rows"],
  ["+ −", "zoom at the cursor"],
  ["[ ]", "move along the steps"],
  ["0", "show all steps"],
  ["Escape, Backspace", "back to the previous view"],
  ["Enter", "draw the curve of the row"],
  ["Space", "open or close the module"],
  ["?", "this help"],
];

/** The help dialog, and the same text for screen readers. */
export class Help {
  constructor() {
    const rows = KEYS.map(([keys, text]) =>
      text === null
        ? h("tr", {}, h("th", { text: keys, colspan: "2", scope: "colgroup" }))
        : h("tr", {}, h("td", {}, h("kbd", { text: keys })), h("td", { text })),
    );
    const onclick = () => this.element.close();
    const close = h("button", { class: "button", text: "Close", onclick });
    this.element = h(
      "dialog",
      { class: "help", "aria-label": "Mouse and keys" },
      h("h2", { text: "Mouse and keys" }),
      h("table", {}, h("tbody", {}, ...rows)),
      h("p", {
        class: "note",
        text:
          "A cell shows the largest norm of its steps, before the clip. If one of these steps " +
          "had a NaN or an Inf, the cell is pink, even if all the others are finite. The row of " +
          "a module shows the root of the sum of squares over its parameters.",
      }),
      close,
    );
    const seen = KEYS.filter(([, text]) => text).map(([keys, text]) => `${keys}: ${text}`);
    this.spoken = h("p", { id: "keys", class: "unseen", text: seen.slice(7).join("; ") });
  }

  /** Opens it. */
  open() {
    if (!this.element.open) this.element.showModal();
  }
}
