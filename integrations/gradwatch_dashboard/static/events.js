/** The list of events. A click on one shows its step and its row. */

import { getJson, isAbort, Latest } from "./api.js";
import { flag, h } from "./dom.js";
import { count, shown } from "./format.js";

const PAGE = 200;
const MOST = 5000;

/** Events of the runs on the screen. */
export class Events {
  /**
   * @param {import("./state.js").State} state
   * @param {function(Object): void} jump Called with the event that was clicked.
   */
  constructor(state, jump) {
    this.state = state;
    this.jump = jump;
    this.request = new Latest();
    this.events = [];
    this.beyond = 0;
    this.page = PAGE;
    this.known = "";
    this.summary = h("span", { class: "side-count" });
    this.kinds = h("div", { class: "kinds", role: "group", "aria-label": "Kinds of events" });
    this.list = h("ol", { class: "event-list" });
    const head = h("h3", {}, "Events", this.summary);
    this.element = h("section", { class: "events" }, head, this.kinds, this.list);
  }

  /**
   * Fetches the events of some runs.
   *
   * @param {import("./state.js").Choice[]} choices
   */
  async load(choices) {
    const signal = this.request.next();
    try {
      const answers = await Promise.all(
        choices.map(({ run }) => getJson("events", { run, limit: MOST }, signal)),
      );
      const told = answers.flatMap(({ events }, index) =>
        events.filter((event) => ofChoice(event, choices[index])).map((event) => ({
          ...event,
          choice: choices[index],
        })),
      );
      told.sort((one, other) => one.step - other.step);
      const known = JSON.stringify([choices, told.length, told.at(-1)?.step]);
      if (known === this.known) return;
      this.known = known;
      this.events = told;
      this.beyond = answers.reduce((sum, { total, events }) => sum + total - events.length, 0);
      this.show();
    } catch (error) {
      if (isAbort(error)) return;
      this.list.replaceChildren(h("li", { class: "note", text: error.message }));
    }
  }

  /** Writes the list. */
  show() {
    const byKind = new Map();
    for (const event of this.events) {
      byKind.set(event.kind, [...(byKind.get(event.kind) ?? []), event]);
    }
    this.kinds.replaceChildren(...[...byKind.values()].map((events) => this.#kind(events)));
    const seen = this.events.filter(({ kind }) => !this.state.hidden.has(kind));
    const several = new Set(this.events.map(({ choice }) => choice.run)).size > 1;
    const all = this.events.length + this.beyond;
    const some = seen.length === all ? "" : `${count(seen.length)} of `;
    this.summary.textContent = some + count(all);
    const items = seen.slice(0, this.page).map((event) => this.#item(event, several));
    if (!seen.length) {
      const none = "Nothing out of the ordinary.";
      const text = this.events.length ? "All kinds are switched off." : none;
      items.push(h("li", { class: "note", text }));
    }
    if (seen.length > this.page) {
      const text = `Show ${count(Math.min(PAGE, seen.length - this.page))} more`;
      const more = () => {
        this.page += PAGE;
        this.show();
      };
      items.push(h("li", { class: "note" }, h("button", { class: "link", text, onclick: more })));
    } else if (this.beyond) {
      const text = `${count(this.beyond)} later events are not listed.`;
      items.push(h("li", { class: "note", text }));
    }
    this.list.replaceChildren(...items);
  }

  #kind(events) {
    const [{ kind }] = events;
    const toggle = () => {
      const hidden = new Set(this.state.hidden);
      if (!hidden.delete(kind)) hidden.add(kind);
      this.state.set({ hidden });
    };
    const text = `${shown(kind).replaceAll("_", " ")} ${count(events.length)}`;
    const chip = h("button", { class: "chip", onclick: toggle }, markOf(events[0]), text);
    flag(chip, "aria-pressed", !this.state.hidden.has(kind));
    return chip;
  }

  #item(event, several) {
    const words = [h("b", { text: shown(event.kind).replaceAll("_", " ") })];
    if (several) words.push(h("em", { text: shown(event.choice.run) }));
    const button = h(
      "button",
      { class: "event", onclick: () => this.jump(event), title: shown(event.message) },
      markOf(event),
      h("span", { class: "event-step", text: count(event.step) }),
      h("span", { class: "event-head" }, ...words),
      event.parameter ? h("span", { class: "event-name", text: shown(event.parameter) }) : null,
      h("span", { class: "event-text", text: shown(event.message) }),
    );
    return h("li", {}, button);
  }
}

/** Makes the mark of an event. The server has checked its color and shape. */
function markOf({ color, shape }) {
  const mark = h("i", { class: `dot ${shape}` });
  mark.style.setProperty("--kind", color);
  return mark;
}

function ofChoice(event, choice) {
  return !choice.optimizer || !event.optimizer || event.optimizer === choice.optimizer;
}
