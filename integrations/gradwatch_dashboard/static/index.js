/**
 * The "Gradients" tab of TensorBoard. TensorBoard loads this module in a frame of its own and calls
 * `render`.
 */

import { App } from "./app.js";
import { h } from "./dom.js";
import * as host from "./host.js";
import { readLink, writeLink } from "./links.js";

const LOOK_AT_HOST = 1_000;
const POLL = 10_000;
const QUIET = 300;

/** Shows the tab. */
export async function render() {
  const sheet = h("link", { rel: "stylesheet", href: "./style.css" });
  const styled = new Promise((done) => {
    sheet.onload = sheet.onerror = done;
  });
  document.head.append(sheet);
  document.documentElement.lang = "en";
  document.title = "Gradients";
  await styled;
  const app = new App();
  host.followDarkMode(() => app.restyle());
  host.borrowTypeface(() => app.restyle());
  document.body.replaceChildren(app.element);
  app.restyle();
  linkWith(app);
  follow(app);
  await app.refresh();
}

function linkWith(app) {
  let written = host.readHash();
  let timer = null;
  app.state.set(readLink(written));
  app.onChange = () => {
    clearTimeout(timer);
    timer = setTimeout(() => {
      const hash = writeLink(host.readHash(), app.state);
      if (hash === null || hash === host.readHash()) return;
      host.writeHash(hash);
      written = host.readHash();
    }, QUIET);
  };
  host.ask((page) => {
    page.addEventListener("hashchange", () => {
      const hash = host.readHash();
      if (hash !== written) app.state.set(readLink((written = hash)));
    });
  }, null);
}

function follow(app) {
  let asked = null;
  const refresh = () => {
    clearTimeout(asked);
    asked = setTimeout(() => app.refresh(), QUIET);
  };
  host.listenToHost(refresh);
  let filter = host.runFilter().key;
  setInterval(() => {
    const { key } = host.runFilter();
    if (key !== filter) app.refilter();
    filter = key;
  }, LOOK_AT_HOST);
  setInterval(() => {
    const seen = !document.hidden && app.element.clientWidth > 0;
    if (seen && host.reloadsItself()) refresh();
  }, POLL);
}
