/** A panel: one run with its strip, heat map and step axis. */

import { drawSteps } from "./axis.js";
import { Latest } from "./api.js";
import { pixel } from "./colours.js";
import { fitted, flag, h } from "./dom.js";
import { count, counted, shortened, shown } from "./format.js";
import { paint } from "./heat_paint.js";
import { clips, drawStrip, stripHeight } from "./strip.js";

const AXIS = 28;
const HEAD = 40;
const RIGHT = 14;

/** One run on the screen: its data and its elements. */
export class Panel {
  /** @param {import("./state.js").Choice} choice */
  constructor(choice) {
    this.choice = choice;
    this.layout = null;
    /** @type {Cells|null} All steps. */ this.overview = null;
    /** @type {Cells|null} The steps in view. */ this.detail = null;
    this.requests = { overview: new Latest(), detail: new Latest() };
    this.title = h("h2", { class: "panel-title" });
    this.meta = h("span", { class: "panel-meta" });
    this.strip = h("canvas", { class: "strip", "aria-hidden": "true" });
    this.labels = h("div", { class: "labels", "aria-hidden": "true" });
    this.heat = h("canvas", { class: "heat", "aria-hidden": "true" });
    this.cell = h("div", { class: "cell", hidden: true });
    this.window = h("div", { class: "window" }, this.labels, this.heat, this.cell);
    this.spacer = h("div", { class: "spacer" }, this.window);
    this.scroll = h("div", { class: "scroll", tabindex: "0", role: "application" }, this.spacer);
    this.scroll.setAttribute("aria-roledescription", "heat map");
    this.scroll.setAttribute("aria-describedby", "keys");
    this.axis = h("canvas", { class: "axis", "aria-hidden": "true" });
    this.hoverLine = h("div", { class: "line hover", hidden: true });
    this.markerLine = h("div", { class: "line marker", hidden: true });
    this.range = h("div", { class: "range", hidden: true });
    const lines = [this.hoverLine, this.markerLine, this.range];
    this.plot = h("div", { class: "plot" }, this.strip, this.scroll, this.axis, ...lines);
    const head = h("header", { class: "panel-head" }, this.title, this.meta);
    this.element = h("section", { class: "panel" }, head, this.plot);
    this.left = 0;
    this.width = 1;
    this.rowHeight = 14;
  }

  /** Returns the cells to draw: those of the view if they are loaded, else those of all steps. */
  cells(view) {
    const { detail, overview } = this;
    if (!detail || !overview) return overview;
    const first = Math.max(view.first, overview.heat.first);
    const last = Math.min(view.last, overview.heat.last);
    const covers = detail.heat.first <= first && detail.heat.last >= last;
    return covers ? detail : overview;
  }

  /** Returns the height of everything except the rows, in CSS pixels. */
  aroundHeight(small, clipping) {
    return HEAD + stripHeight(clipping, small) + AXIS;
  }

  /** Aborts its requests. */
  abandon() {
    for (const request of Object.values(this.requests)) request.next();
  }

  /** Whether the run clips. */
  get clipping() {
    return this.overview !== null && clips(this.overview.heat);
  }

  /** Writes the name and facts of the run, with the optimizer if it has several. */
  describe(summary, several) {
    const { run, optimizer } = this.choice;
    this.title.textContent = shown(run);
    this.title.title = shown(run);
    const parts = several ? [shown(optimizer)] : [];
    this.label = [shown(run), ...parts].join(" · ");
    if (summary) {
      parts.push(counted(summary.parameters, "parameter"));
      parts.push(`steps ${count(summary.first_step)}–${count(summary.last_step)}`);
    }
    this.meta.replaceChildren(parts.join("  ·  "));
    if (summary?.bad_steps) {
      const text = counted(summary.bad_steps, "bad step");
      this.meta.append("  ·  ", h("span", { class: "bad-count", text }));
    }
    const what = `Gradient norms of ${shown(run)}, parameters by steps.`;
    this.scroll.setAttribute("aria-label", `${what} Arrow keys move from cell to cell.`);
  }

  /** Measures the plot. Returns whether its width has changed. */
  measure(picture) {
    this.left = picture.gutter(this);
    const width = Math.max(40, this.scroll.clientWidth - this.left - RIGHT);
    const changed = width !== this.width;
    this.width = width;
    return changed;
  }

  /** Draws everything. */
  draw(picture) {
    const { rows, rowHeight, view, theme, small } = picture;
    if (!this.overview || !this.scroll.clientWidth) return;
    this.rowHeight = rowHeight;
    const total = Math.max(1, Math.ceil(rows.length * rowHeight));
    const height = Math.min(total, picture.room);
    this.scroll.style.height = `${height}px`;
    this.spacer.style.height = `${total}px`;
    this.window.style.height = `${height}px`;
    this.measure(picture);
    const cells = this.cells(view);
    const place = { left: this.left, width: this.width, legend: this.left >= 150 };
    place.height = stripHeight(picture.clipping, small);
    this.plot.style.setProperty("--strip", `${place.height}px`);
    const strip = fitted(this.strip, this.left + this.width + RIGHT, place.height);
    drawStrip(strip, place, cells.heat, view, picture.norms, picture.clipping, theme);
    drawSteps(fitted(this.axis, this.left + this.width + RIGHT, AXIS), place, view, theme);
    this.#drawHeat(picture, cells, height);
    this.#drawLabels(picture, height);
    this.place(picture);
  }

  /** Places the marker line and the cursor. */
  place(picture) {
    const { marker, cursor, view, rows } = picture;
    this.#line(this.markerLine, marker, view);
    const row = cursor ? rows[cursor.row] : null;
    this.cell.hidden = !row;
    if (!row) return;
    const x = this.left + this.xOf(cursor.step, view);
    const width = Math.max(10, this.width / (view.last - view.first + 1));
    const height = Math.max(9, this.rowHeight);
    const top = (cursor.row + 0.5) * this.rowHeight - this.scroll.scrollTop - height / 2;
    const place = { left: x - width / 2, top, width, height };
    for (const [name, value] of Object.entries(place)) this.cell.style[name] = `${value}px`;
  }

  /** Marks the step and the row under the pointer. */
  hover(step, row, picture) {
    this.#line(this.hoverLine, step, picture.view);
    for (const label of this.labels.children) {
      label.classList.toggle("at", row !== null && label.dataset.row === String(row));
    }
  }

  /** Finds the step and the row under a point of the screen. */
  at(clientX, clientY, picture) {
    const box = this.scroll.getBoundingClientRect();
    const share = (clientX - box.left - this.left) / this.width;
    const { view, rows } = picture;
    const step = Math.floor(view.first + share * (view.last - view.first + 1));
    const inside = clientY >= box.top && clientY < box.bottom;
    const index = Math.floor((clientY - box.top + this.scroll.scrollTop) / this.rowHeight);
    const near = Math.max(view.first, Math.min(step, view.last));
    return { share, step: near, row: (inside && rows[index]) || null, inPlot: share >= 0 };
  }

  /** Returns the middle of a step, in CSS pixels from the left edge of the plot. */
  xOf(step, view) {
    return ((step - view.first + 0.5) / (view.last - view.first + 1)) * this.width;
  }

  /** Scrolls a row into view. */
  reveal(row) {
    const [top, bottom] = [row * this.rowHeight, (row + 1) * this.rowHeight];
    const { scrollTop, clientHeight } = this.scroll;
    const [more, end] = [2 * this.rowHeight, scrollTop + clientHeight];
    if (top < scrollTop) this.scroll.scrollTop = top - more;
    else if (bottom > end) this.scroll.scrollTop = bottom + more - clientHeight;
  }

  #line(line, step, view) {
    line.hidden = step === null || step < view.first || step > view.last;
    if (!line.hidden) line.style.left = `${this.left + this.xOf(step, view)}px`;
  }

  #drawHeat(picture, cells, height) {
    const { rows, rowHeight, view, scale, theme } = picture;
    const context = fitted(this.heat, this.width, height);
    this.heat.style.left = `${this.left}px`;
    const ratio = window.devicePixelRatio || 1;
    const { width, height: lines } = this.heat;
    const image = context.createImageData(width, lines);
    const pixels = new Uint32Array(image.data.buffer);
    const scrolled = this.scroll.scrollTop;
    const first = Math.max(0, Math.floor(scrolled / rowHeight) - 4);
    const end = Math.min(rows.length, Math.ceil((scrolled + height) / rowHeight) + 4);
    const gap = rowHeight >= 10 ? 1 : 0;
    const painted = [];
    for (let index = first; index < end; index++) {
      const top = (index * rowHeight - scrolled) * ratio;
      const bottom = ((index + 1) * rowHeight - scrolled - gap) * ratio;
      const typical = scale.relative ? this.overview.typical(rows[index]) : NaN;
      painted.push({ cells: cells.of(rows[index]), typical, top, bottom });
    }
    const absentLine = pixel(theme["absent-line"]);
    const { heat } = cells;
    paint({
      ...{ pixels, width, height: lines, ratio, rows: painted, heat, view, scale },
      theme: { absentLine },
    });
    context.putImageData(image, 0, 0);
  }

  #drawLabels(picture, height) {
    const { rows, rowHeight, theme } = picture;
    if (!picture.labelled(this)) return this.labels.replaceChildren();
    const context = this.axis.getContext("2d");
    context.font = theme.small;
    const every = Math.max(1, Math.ceil(11 / rowHeight));
    const scrolled = this.scroll.scrollTop;
    const labels = [];
    // If rows are thinner than a line of text, only the middle row of each group has a label.
    const from = Math.floor(scrolled / rowHeight / every) * every + (every >> 1);
    for (let index = from; index < rows.length; index += every) {
      const middle = (index + 0.5) * rowHeight - scrolled - (rowHeight >= 10 ? 0.5 : 0);
      if (middle > height + 8) break;
      labels.push(this.#label(rows[index], index, middle, context, picture));
    }
    this.labels.style.width = `${this.left}px`;
    this.labels.classList.toggle("dense", rowHeight < 13);
    this.labels.replaceChildren(...labels);
  }

  #label(row, index, middle, context, picture) {
    const module = row.leaf < 0;
    const indent = picture.indented ? 10 + row.depth * 14 : 12;
    const room = this.left - indent - 10 - (picture.indented ? 14 : 0);
    const text = h("span", { text: shortened(shown(row.label), room, context) });
    const label = h("div", { class: "label", title: shown(row.name) }, text);
    label.style.top = `${middle - 8}px`;
    label.dataset.row = index;
    if (picture.indented) {
      label.classList.add("in-tree");
      label.style.paddingLeft = `${indent}px`;
      label.prepend(h("i", { class: module ? "twisty" : "twisty none" }));
    }
    if (module) {
      label.classList.add("module");
      flag(label, "data-open", picture.isOpen(row));
    }
    label.classList.toggle("selected", row.key === picture.selected);
    return label;
  }
}
