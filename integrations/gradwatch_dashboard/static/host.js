/**
 * The host: TensorBoard's page around this one. It has the same origin, but no public interface for
 * most of this. If the page is not as expected, the feature is silently left out.
 */

const SETTINGS = "_tb_global_settings";

/**
 * Calls a function with the window of TensorBoard's page.
 *
 * @template T
 * @param {function(Window): T} question
 * @param {T} otherwise The result if there is no such page, or the function throws.
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
 * Listens to TensorBoard's messages.
 *
 * @param {function(): void} changed Called when TensorBoard has reloaded its data or runs changed.
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
 * @param {function(): void} changed Called after each change.
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
 * @param {function(): void} changed Called when a font has loaded.
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
 * Reads TensorBoard's own filters of runs. There is no interface for that: the Time Series
 * dashboard uses `?runFilter=`, and the older dashboards use two keys of the hash.
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
 * Tells whether automatic reload is on in TensorBoard's settings.
 *
 * @returns {boolean}
 */
export function reloadsItself() {
  return ask((page) => {
    return JSON.parse(page.localStorage.getItem(SETTINGS) ?? "{}").autoReload === true;
  }, false);
}

/**
 * Reads the hash of TensorBoard's URL.
 *
 * @returns {string}
 */
export function readHash() {
  return ask((page) => page.location.hash, window.location.hash);
}

/**
 * Replaces the hash of TensorBoard's URL, without a history entry or a `hashchange` event.
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
  // TensorBoard's font URLs start at the root, which is wrong under a path prefix.
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
