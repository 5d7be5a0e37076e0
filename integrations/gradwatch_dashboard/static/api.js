/** Requests to the server. All URLs are relative, so that they work under any path prefix. */

/** The server did not answer, or answered with an error. */
class ServerError extends Error {}

/**
 * Cells of a heat map.
 *
 * @typedef {Object} Heat
 * @property {number} first First step.
 * @property {number} last Last step.
 * @property {number} columns Number of columns that the steps are divided into.
 * @property {number} parameters Number of rows.
 * @property {Float32Array} norms `[parameters, columns]`; -1: no gradient, -2: nothing recorded.
 * @property {Uint8Array|Uint16Array|null} bad `[parameters, columns]`: number of steps with a NaN
 *   or an Inf; null if there are none.
 * @property {Object<string, Float32Array>} strip By name, the values `[columns]` of whole steps.
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

/** A slot for one request: a newer request aborts the older one. */
export class Latest {
  #controller = null;

  /**
   * Aborts the current request.
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
 * Tells whether an error only means that a newer request replaced this one.
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

/** Parses a binary answer: the length of a JSON header, the header, and the arrays it lists. */
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
