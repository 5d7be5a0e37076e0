/** Messages for when there is nothing to draw. */

import { h } from "./dom.js";

const CODE = `import gradwatch
from gradwatch_tensorboard import TensorBoardWriter

with gradwatch.watch(model, optimizer, sinks=[TensorBoardWriter("runs/first")]):
    for x, y in loader:
        loss_fn(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()`;

/**
 * Says that no run has data, and how to record some.
 *
 * @returns {HTMLElement}
 */
export function noRuns() {
  return h(
    "div",
    { class: "empty" },
    h("h2", { text: "No gradients yet" }),
    h("p", { text: "No run in this log directory has gradient data. To record some, write:" }),
    h("pre", {}, h("code", { text: CODE })),
    h("p", {
      class: "note",
      text:
        "With Lightning, use GradientMonitor() together with a TensorBoardLogger. The first " +
        "steps are written within seconds; TensorBoard shows them at its next reload.",
    }),
  );
}

/**
 * Says that the server did not give a valid answer.
 *
 * @param {string} message
 * @param {function(): void} again
 * @returns {HTMLElement}
 */
export function failed(message, again) {
  return h(
    "div",
    { class: "empty", role: "alert" },
    h("h2", { text: "The gradients could not be read" }),
    h("p", { text: message }),
    h("button", { class: "button", text: "Try again", onclick: again }),
  );
}

/**
 * Says that the data are being loaded.
 *
 * @returns {HTMLElement}
 */
export function loading() {
  return h("div", { class: "empty quiet", role: "status" }, h("p", { text: "Reading gradients…" }));
}

/**
 * Says that no row matches the filter.
 *
 * @param {function(): void} clear
 * @returns {HTMLElement}
 */
export function noRows(clear) {
  return h(
    "div",
    { class: "no-rows", role: "status" },
    h("p", { text: "No parameter's name matches the filter." }),
    h("button", { class: "button", text: "Clear the filter", onclick: clear }),
  );
}
