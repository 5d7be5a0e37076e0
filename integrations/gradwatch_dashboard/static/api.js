/** The server's answers. All addresses are relative, so that they hold under any path prefix. */

/** Says that the server gave no good answer. */
class ServerError extends Error {}

/**
 * Cells of a heat map.
 *
 * @typedef {Object} Heat
 * @property {number} first First step.
 * @property {number} last Last step.
 * @property {number} columns How many columns divide the steps.
 * @property {number} parameters How many rows there are.
 * @property {Float32Array} norms `[parameters, columns]`; -1: no gradient, -2: nothing recorded.
 * @property {Uint8Array|Uint16Array|null} bad Steps with a NaN or an Inf, like `norms`.
 * @property {Object<string, Float32Array>} strip By name, numbers of a whole column.
 */

/**
 * Asks for JSON.
 *
 * @param {string} route
 * @param {Object<string, string|number>} [parameters]
 * @param {AbortSignal} [signal]
 * @returns {Promise<Object>}
 */
export async function getJson(route, parameters, signal) {
  return (await answer(route, parameters, signal)).json();
}

/**
 * Asks for the cells of a heat map.
 *
 * @param {{run: string, optimizer: string, first?: number, last?: number, columns: number}} wanted
 * @param {AbortSignal} [signal]
 * @returns {Promise<Heat>}
 */
export async function getHeat(wanted, signal) {
  return parseHeat(await (await answer("heatmap", wanted, signal)).arrayBuffer());
}

/**
 * A place for one request: a newer one ends an older one that is still under way.
 */
export class Latest {
  #controller = null;

  /**
   * Ends what is under way.
   *
   * @returns {AbortSignal} For the next request.
   */
  next() {
    this.#controller?.abort();
    this.#controller = new AbortController();
    return this.#controller.signal;
  }
}

/**
 * Tells whether an error only says that a newer request came.
 *
 * @param {unknown} error
 * @returns {boolean}
 */
export function isAbort(error) {
  return error instanceof DOMException && error.name === "AbortError";
}

async function answer(route, parameters = {}, signal = undefined) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(parameters)) {
    if (value !== undefined && value !== null) query.set(name, String(value));
  }
  const text = query.toString();
  let response;
  try {
    response = await fetch(text ? `./${route}?${text}` : `./${route}`, { signal });
  } catch (error) {
    if (isAbort(error)) throw error;
    throw new ServerError("TensorBoard does not answer. Is it still running?");
  }
  if (response.ok) return response;
  const said = (await response.text()).slice(0, 300);
  throw new ServerError(`TensorBoard answered ${response.status} to “${route}”: ${said}`);
}

function aligned(offset) {
  return (offset + 7) & ~7;
}

/** Reads a binary answer: the length of a JSON header, the header, the arrays that it lists. */
function parseHeat(buffer) {
  const length = new DataView(buffer).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 4, length)));
  const kinds = { float32: Float32Array, uint8: Uint8Array, uint16: Uint16Array };
  const arrays = {};
  let at = aligned(4 + length);
  for (const { name, dtype, shape } of header.arrays) {
    const size = shape.reduce((product, side) => product * side, 1);
    arrays[name] = new kinds[dtype](buffer, at, size);
    at = aligned(at + arrays[name].byteLength);
  }
  const { norms, bad = null, ...strip } = arrays;
  const { first_step: first, last_step: last, columns, parameters } = header;
  return { first, last, columns, parameters, norms, bad, strip };
}
