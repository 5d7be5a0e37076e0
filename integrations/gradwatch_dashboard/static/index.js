/**
 * The entry point of the "Gradients" tab. TensorBoard loads this module in its own frame and calls
 * `render`.
 */

import { App } from "./app.js";
import { h } from "./dom.js";
import * as host from "./host.js";
import { readLink, writeLink } from "./links.js";

const SHEETS = ["style", "side", "toolbar", "plots", "overlays"];
const LOOK_AT_HOST = 1_000;
const POLL = 10_000;
const QUIET = 300;

/** Shows the tab. */
export async function render() {
  document.documentElement.lang = "en";
  document.title = "Gradients";
  await Promise.all(SHEETS.map(styled));
  const app = new App();
  host.followDarkMode(() => app.restyle());
  host.borrowTypeface(() => app.restyle());
  document.body.replaceChildren(app.element);
  app.restyle();
  linkWith(app);
  follow(app);
  await app.refresh();
}

function styled(name) {
  return new Promise((done) => {
    const href = `./${name}.css`;
    document.head.append(h("link", { rel: "stylesheet", href, onload: done, onerror: done }));
  });
}

function linkWith(app) {
  let written = host.readHash();
  let timer = null;
  app.restore(readLink(written));
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
      if (hash !== written) app.restore(readLink((written = hash)));
    });
  }, null);
}

function follow(app) {
  let [asked, late] = [null, false];
  const refresh = () => {
    clearTimeout(asked);
    // A hidden tab fetches nothing. It catches up as soon as it is visible again.
    asked = setTimeout(() => {
      late = !app.isSeen;
      if (!late) app.refresh();
    }, QUIET);
  };
  host.listenToHost(refresh);
  const makeUp = () => (late && app.isSeen ? refresh() : null);
  document.addEventListener("visibilitychange", makeUp);
  let filter = host.runFilter().key;
  setInterval(() => {
    const { key } = host.runFilter();
    if (key !== filter) app.refilter();
    filter = key;
    makeUp();
  }, LOOK_AT_HOST);
  setInterval(() => {
    if (app.isSeen && host.reloadsItself()) refresh();
  }, POLL);
}
