/**
 * The host: TensorBoard's page around this one. It has the same origin and no interface for most of
 * this; each part is left out silently where the page is another than expected.
 */

const SETTINGS = "_tb_global_settings";

/**
 * Asks the page around this one for something.
 *
 * @template T
 * @param {function(Window): T} question
 * @param {T} otherwise
 * @returns {T}
 */
export function ask(question, otherwise) {
  try {
    return window.parent === window ? otherwise : question(window.parent);
  } catch {
    return otherwise;
  }
}

/**
 * Hears of TensorBoard's messages.
 *
 * @param {function(): void} changed Is called when data were loaded or runs changed.
 */
export function listenToHost(changed) {
  const { port1, port2 } = new MessageChannel();
  port1.onmessage = (event) => {
    let message;
    try {
      message = JSON.parse(event.data);
    } catch {
      return;
    }
    if (message.isReply) return;
    const { type, id } = message;
    port1.postMessage(JSON.stringify({ type, id, payload: null, error: null, isReply: true }));
    if (/^experimental\.(DataReloaded|RunsChanged)$/.test(type)) changed();
  };
  ask((page) => page.postMessage("experimental.bootstrap", "*", [port2]), null);
}

/**
 * Tells whether TensorBoard shows the frame of this page: it hides the frames of other tabs.
 *
 * @returns {boolean}
 */
export function isInFront() {
  const hidden = (page) => page.getComputedStyle(window.frameElement).visibility === "hidden";
  return !ask(hidden, false);
}

/**
 * Follows dark mode.
 *
 * @param {function(): void} changed Is called after each change.
 */
export function followDarkMode(changed) {
  const preferred = window.matchMedia("(prefers-color-scheme: dark)");
  const apply = () => {
    const isDark = (page) => page.document.body.classList.contains("dark-mode");
    const dark = ask(isDark, preferred.matches);
    if (document.body.classList.contains("dark-mode") === dark) return;
    document.body.classList.toggle("dark-mode", dark);
    changed();
  };
  apply();
  preferred.addEventListener("change", apply);
  ask((page) => {
    const observer = new MutationObserver(apply);
    observer.observe(page.document.body, { attributes: true, attributeFilter: ["class"] });
  }, null);
}

/**
 * Borrows TensorBoard's own typeface, which its page has already loaded.
 *
 * @param {function(): void} changed Is called when letters look different.
 */
export function borrowTypeface(changed) {
  const faces = ask((page) => {
    const rules = [...page.document.styleSheets].flatMap((sheet) => [...sheet.cssRules]);
    return rules
      .filter((rule) => rule.constructor.name === "CSSFontFaceRule")
      .filter((rule) => /^"?Roboto"?$/.test(rule.style.getPropertyValue("font-family")))
      .map((rule) => faceOf(rule, page.location.href));
  }, []);
  for (const face of faces) document.fonts.add(face);
  document.fonts.addEventListener("loadingdone", changed);
}

/**
 * Reads which runs the person left in TensorBoard's own filters. There is no interface for that:
 * Time Series has `?runFilter=`, the older dashboards two keys of the hash.
 *
 * @returns {{shows: function(string): boolean, key: string}} `key` changes when the filter does.
 */
export function runFilter() {
  const [search, hash] = ask((page) => [page.location.search, page.location.hash], ["", ""]);
  const parts = new Map(hash.replace(/^#/, "").split("&").map((part) => part.split("=", 2)));
  const texts = [new URLSearchParams(search).get("runFilter"), decoded(parts.get("regexInput"))];
  const patterns = [pattern(texts[0], "i"), pattern(texts[1], "")].filter((regex) => regex);
  const chosen = selection(decoded(parts.get("runSelectionState")));
  return {
    key: JSON.stringify([texts, chosen]),
    shows: (run) => patterns.every((regex) => regex.test(run)) && chosen[run] !== false,
  };
}

/**
 * Tells whether TensorBoard's page reloads its data by itself.
 *
 * @returns {boolean}
 */
export function reloadsItself() {
  return ask((page) => {
    return JSON.parse(page.localStorage.getItem(SETTINGS) ?? "{}").autoReload === true;
  }, false);
}

/**
 * Reads the hash of TensorBoard's address.
 *
 * @returns {string}
 */
export function readHash() {
  return ask((page) => page.location.hash, window.location.hash);
}

/**
 * Replaces the hash of TensorBoard's address; no entry of its history and no event comes of it.
 *
 * @param {string} hash
 */
export function writeHash(hash) {
  ask((page) => {
    const address = new URL(page.location.href);
    address.hash = hash;
    page.history.replaceState(page.history.state, "", address.href);
  }, null);
}

function faceOf(rule, base) {
  // TensorBoard names its fonts from the root, which is wrong below a path prefix.
  const found = (url) => new URL(url.replace(/^\//, "./"), base).href;
  const source = rule.style
    .getPropertyValue("src")
    .replace(/url\("?([^")]+)"?\)/g, (_, url) => `url("${found(url)}")`);
  return new FontFace("Roboto", source, {
    weight: rule.style.getPropertyValue("font-weight") || "400",
    style: rule.style.getPropertyValue("font-style") || "normal",
    unicodeRange: rule.style.getPropertyValue("unicode-range") || "U+0-10FFFF",
  });
}

function decoded(text) {
  try {
    return text === undefined ? null : decodeURIComponent(text);
  } catch {
    return null;
  }
}

function pattern(text, flags) {
  try {
    return text ? new RegExp(text, flags) : null;
  } catch {
    return null;
  }
}

function selection(text) {
  try {
    const chosen = text ? JSON.parse(atob(text)) : {};
    return chosen && typeof chosen === "object" ? chosen : {};
  } catch {
    return {};
  }
}
