/**
 * Builds elements without HTML strings: names in a log are untrusted and must stay plain text.
 */

/**
 * Makes an element.
 *
 * @param {string} tag Its tag.
 * @param {Object} [properties] `class`, `text`, listeners such as `onclick`; all others become
 *   attributes. null, undefined and false leave a property out.
 * @param {...(Node|string|null)} children Strings become text nodes; null is ignored.
 * @returns {HTMLElement}
 */
export function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "class") element.className = value;
    else if (name === "text") element.textContent = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  for (const child of children) if (child !== null) element.append(child);
  return element;
}

/**
 * Sets an attribute that is "true" or "false".
 *
 * @param {Element} element
 * @param {string} name
 * @param {boolean} value
 */
export function flag(element, name, value) {
  element.setAttribute(name, value ? "true" : "false");
}

/**
 * Resizes and clears a canvas so that it is sharp at any device pixel ratio.
 *
 * @param {HTMLCanvasElement} canvas
 * @param {number} width In CSS pixels.
 * @param {number} height In CSS pixels.
 * @returns {CanvasRenderingContext2D} Cleared; its unit is a CSS pixel.
 */
export function fitted(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  const [w, t] = [Math.max(1, Math.round(width * ratio)), Math.max(1, Math.round(height * ratio))];
  if (canvas.width !== w) canvas.width = w;
  if (canvas.height !== t) canvas.height = t;
  canvas.style.width = `${width}px`;
  canvas.style.height = `${height}px`;
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return context;
}

/**
 * Makes a function that calls `task` once in the next frame, however often it is called before.
 *
 * @param {function(): void} task
 * @returns {function(): void}
 */
export function perFrame(task) {
  let asked = false;
  return () => {
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => {
      asked = false;
      task();
    });
  };
}
