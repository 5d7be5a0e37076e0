/** The legend: the meaning of the colors, in numbers and words. */

import { logTicks } from "./axis.js";
import { colourMap, SPECIAL } from "./colours.js";
import { fitted, h } from "./dom.js";
import { number } from "./format.js";

const [LEAST_WIDTH, MOST_WIDTH, WORDS] = [130, 280, 330];
const HEIGHT = 34;
const BAR = 12;
const END = 36;

/** The legend under the heat maps. */
export class Legend {
  constructor() {
    this.bar = h("canvas", { role: "img" });
    this.name = h("span", { class: "legend-name" });
    const special = (name, text) =>
      h("span", { class: "swatch-item" }, h("i", { class: `swatch ${name}` }), text);
    this.element = h(
      "div",
      { class: "legend" },
      this.name,
      this.bar,
      special("bad", "NaN or Inf"),
      special("zero", "exactly 0"),
      special("absent", "no gradient"),
    );
    this.element.style.setProperty("--special-bad", SPECIAL.bad);
  }

  /**
   * Draws it.
   *
   * @param {import("./scale.js").Scale} scale
   * @param {number} left Left edge of the plots, in CSS pixels.
   * @param {number} room Width of the legend, in CSS pixels.
   * @param {Object<string, string>} theme
   */
  draw(scale, left, room, theme) {
    const width = Math.max(LEAST_WIDTH, Math.min(MOST_WIDTH, room - left - WORDS));
    this.name.textContent = scale.relative ? "norm ÷ the row's median" : "gradient norm";
    this.name.style.width = `${left - END}px`;
    const context = fitted(this.bar, width + 2 * END, HEIGHT);
    const colours = colourMap(scale.relative);
    for (let x = 0; x < width; x++) {
      const colour = colours[Math.floor((x / width) * 256)];
      context.fillStyle = `rgb(${colour & 255} ${(colour >> 8) & 255} ${(colour >> 16) & 255})`;
      context.fillRect(END + x, 0, 1.5, BAR);
    }
    context.font = theme.small;
    context.textBaseline = "top";
    context.textAlign = "center";
    const ends = this.#ends(scale);
    const xOf = (log) => END + ((log - scale.low) / (scale.high - scale.low)) * width;
    context.fillStyle = theme.muted;
    context.strokeStyle = theme.tick;
    const taken = ends.map((text) => context.measureText(text).width / 2 + 10);
    for (const { at, label } of logTicks(scale.low, scale.high, Math.floor(width / 36))) {
      const x = xOf(at);
      const half = context.measureText(label).width / 2;
      if (x - half < END + taken[0] || x + half > END + width - taken[1]) continue;
      context.fillRect(Math.round(x - 0.5), BAR, 1, 4);
      context.fillText(label, x, BAR + 7);
    }
    context.fillStyle = theme.text;
    context.fillText(ends[0], END, BAR + 7);
    context.fillText(ends[1], END + width, BAR + 7);
    const over = scale.relative ? "relative norm" : "norm";
    this.bar.setAttribute("aria-label", `Colors of the ${over} from ${ends[0]} to ${ends[1]}`);
  }

  #ends({ low, high, below, above }) {
    const [first, last] = [number(10 ** low, 2), number(10 ** high, 2)];
    return [below ? `≤ ${first}` : first, above ? `≥ ${last}` : last];
  }
}
