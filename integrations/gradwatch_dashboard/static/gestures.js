/** What a pointer does on a panel: hover, choose, zoom, pan. */

const LEAST_DRAG = 4;
const BURST = 400;

/**
 * What the application does about gestures.
 *
 * @typedef {Object} Actions
 * @property {function(number, number): Object} at What is under a point; see Panel.at.
 * @property {function(Object|null, number=, number=): void} hover
 * @property {function(Object): void} choose
 * @property {function(number, number): void} select Zooms to two shares of the width.
 * @property {function(number): void} pan Moves by a share of the width.
 * @property {function(number, number): void} zoom By a factor, about a share of the width.
 * @property {function(): void} reset
 * @property {function(): void} remember Notes where `back` returns to.
 */

/**
 * Listens to the pointer.
 *
 * @param {import("./panel.js").Panel} panel
 * @param {Actions} actions
 */
export function listenToPointer(panel, actions) {
  const { plot, range } = panel;
  const pointers = new Map();
  let drag = null;

  plot.addEventListener("pointerdown", (event) => {
    if (event.button !== 0 || onScrollbar(panel, event)) return;
    const point = actions.at(event.clientX, event.clientY);
    pointers.set(event.pointerId, event.clientX);
    if (pointers.size === 2) drag = { pinch: spread(pointers) };
    else drag = { ...point, x: event.clientX, pans: event.shiftKey, moved: false, end: point.share };
  });

  plot.addEventListener("pointermove", (event) => {
    const point = actions.at(event.clientX, event.clientY);
    if (pointers.has(event.pointerId)) pointers.set(event.pointerId, event.clientX);
    if (drag?.pinch) {
      const now = spread(pointers);
      if (now > 10) actions.zoom(drag.pinch / now, point.share);
      drag.pinch = now;
      return;
    }
    if (!drag) {
      actions.hover(point.inPlot ? point : null, event.clientX, event.clientY);
      return;
    }
    if (!drag.moved && (Math.abs(event.clientX - drag.x) < LEAST_DRAG || !drag.inPlot)) return;
    if (!drag.moved) start(event);
    if (drag.pans) {
      actions.pan((drag.x - event.clientX) / panel.width);
      drag.x = event.clientX;
    } else {
      drag.end = point.share;
      show(drag.share, drag.end);
    }
  });

  plot.addEventListener("pointerup", (event) => {
    pointers.delete(event.pointerId);
    const done = drag;
    drag = null;
    range.hidden = true;
    plot.classList.remove("panning");
    if (!done || done.pinch) return;
    if (!done.moved) actions.choose(actions.at(event.clientX, event.clientY));
    else if (!done.pans) actions.select(...inOrder(done.share, done.end));
  });

  plot.addEventListener("pointercancel", (event) => {
    pointers.delete(event.pointerId);
    drag = null;
    range.hidden = true;
  });
  plot.addEventListener("pointerleave", () => {
    if (!drag) actions.hover(null);
  });
  plot.addEventListener("dblclick", (event) => {
    if (actions.at(event.clientX, event.clientY).inPlot) actions.reset();
  });
  plot.addEventListener("wheel", wheel(panel, actions), { passive: false });

  function start(event) {
    drag.moved = true;
    plot.setPointerCapture(event.pointerId);
    plot.classList.toggle("panning", drag.pans);
    if (drag.pans) actions.remember();
    actions.hover(null);
  }

  function show(one, other) {
    const [from, to] = inOrder(one, other);
    range.hidden = false;
    range.style.left = `${panel.left + from * panel.width}px`;
    range.style.width = `${Math.max(1, (to - from) * panel.width)}px`;
  }
}

function wheel(panel, actions) {
  let last = 0;
  return (event) => {
    const along = event.shiftKey ? event.deltaY || event.deltaX : event.deltaX;
    const zooms = event.ctrlKey || event.metaKey;
    if (!zooms && !event.shiftKey && Math.abs(event.deltaX) <= Math.abs(event.deltaY)) return;
    event.preventDefault();
    if (event.timeStamp - last > BURST) actions.remember();
    last = event.timeStamp;
    const unit = event.deltaMode === 1 ? 16 : 1;
    if (!zooms) actions.pan((along * unit) / panel.width);
    else {
      const { share } = actions.at(event.clientX, event.clientY);
      const turned = Math.max(-120, Math.min(120, event.deltaY * unit));
      actions.zoom(Math.exp(turned * 0.004), Math.max(0, Math.min(1, share)));
    }
  };
}

function onScrollbar({ scroll }, event) {
  const box = scroll.getBoundingClientRect();
  const inside = event.clientY >= box.top && event.clientY <= box.bottom;
  return inside && event.clientX > box.left + scroll.clientWidth;
}

function inOrder(one, other) {
  const inside = [one, other].map((share) => Math.max(0, Math.min(1, share)));
  return [Math.min(...inside), Math.max(...inside)];
}

function spread(pointers) {
  const [one, other] = [...pointers.values()];
  return Math.abs(one - other);
}
