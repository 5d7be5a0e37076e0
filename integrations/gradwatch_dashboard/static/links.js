/** Links: keeps the state in the URL of TensorBoard's page, so that a view can be shared. */

// TensorBoard's own part of the URL has the form `#<tab>&<key>=<value>...`. It keeps keys that it
// does not know, but takes a part without `=` for the name of a tab.
const PREFIX = "p.gradwatch.";
const TAB = "gradwatch";
const MOST_OPEN = 40;

/**
 * Reads the state from the hash of a URL.
 *
 * @param {string} hash
 * @returns {Object} Fields of a `State`; invalid ones are left out.
 */
export function readLink(hash) {
  const found = new Map();
  for (const part of hash.replace(/^#/, "").split("&")) {
    const [key, value] = part.split("=");
    try {
      if (value !== undefined) found.set(decodeURIComponent(key), decodeURIComponent(value));
    } catch {
      continue;
    }
  }
  const get = (name) => found.get(PREFIX + name);
  const patch = {};
  if (get("run")) patch.main = { run: get("run"), optimizer: get("optimizer") ?? "" };
  if (get("compare")) {
    patch.other = { run: get("compare"), optimizer: get("compareOptimizer") ?? "" };
  }
  const range = /^(\d{1,12})-(\d{1,12})$/.exec(get("steps") ?? "");
  if (range && Number(range[1]) < Number(range[2])) {
    patch.view = { first: Number(range[1]), last: Number(range[2]) };
  }
  if (isPattern(get("filter"))) patch.filter = get("filter");
  if (["parameters", "modules"].includes(get("rows"))) patch.rows = get("rows");
  if (get("open") !== undefined) patch.open = new Set(readList(get("open")));
  if (get("colour") === "relative") patch.relative = true;
  if (get("fit") === "1") patch.fit = true;
  if (get("stacked") === "1") patch.stacked = true;
  if (get("curve")) patch.selected = get("curve");
  if (/^\d{1,12}$/.test(get("marker") ?? "")) patch.marker = Number(get("marker"));
  if (get("hide")) patch.hidden = new Set(readList(get("hide")));
  return patch;
}

/**
 * Writes the state into the hash of a URL.
 *
 * @param {string} hash The current hash.
 * @param {import("./state.js").State} state
 * @returns {string|null} The new hash; null if another tab is open.
 */
export function writeLink(hash, state) {
  const parts = hash.replace(/^#/, "").split("&");
  if (parts[0] !== TAB && parts[0] !== "") return null;
  const kept = parts.slice(1).filter((part) => part && !safely(part).startsWith(PREFIX));
  const own = [];
  const put = (name, value) => {
    if (value === null || value === "" || value === false) return;
    own.push(`${encodeURIComponent(PREFIX + name)}=${encodeURIComponent(value)}`);
  };
  put("run", state.main?.run ?? null);
  put("optimizer", state.main?.optimizer ?? null);
  put("compare", state.other?.run ?? null);
  put("compareOptimizer", state.other?.optimizer ?? null);
  put("steps", state.view && `${state.view.first}-${state.view.last}`);
  put("filter", state.filter);
  put("rows", state.rows);
  if (state.open && state.open.size <= MOST_OPEN) put("open", JSON.stringify([...state.open]));
  put("colour", state.relative && "relative");
  put("fit", state.fit && "1");
  put("stacked", state.stacked && "1");
  put("curve", state.selected);
  put("marker", state.marker === null ? null : String(state.marker));
  put("hide", state.hidden.size ? JSON.stringify([...state.hidden]) : null);
  return `#${[TAB, ...kept, ...own].join("&")}`;
}

function isPattern(text) {
  try {
    new RegExp(text);
    return Boolean(text) && text.length <= 500;
  } catch {
    return false;
  }
}

function readList(text) {
  try {
    const list = JSON.parse(text);
    return Array.isArray(list) ? list.filter((item) => typeof item === "string") : [];
  } catch {
    return [];
  }
}

function safely(part) {
  try {
    return decodeURIComponent(part);
  } catch {
    return part;
  }
}
