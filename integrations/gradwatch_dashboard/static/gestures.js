/** Pointer gestures on a panel: hover, choose, zoom and pan. */

const LEAST_DRAG = 4;
const BURST = 400;

/**
 * Listens to the pointer.
 *
 * @param {import("./panel.js").Panel} panel
 * @param {import("./actions.js").Actions} actions
 */
export function listenToPointer(panel, actions) {
  const { plot, range } = panel;
  const at = (event) => pointAt(panel, actions, event);
  const pointers = new Map();
  let drag = null;

  plot.addEventListener("pointerdown", (event) => {
    if (event.button !== 0 || onScrollbar(panel, event)) return;
    const point = at(event);
    pointers.set(event.pointerId, event.clientX);
    drag = { ...point, end: point.share, x: event.clientX, pans: event.shiftKey, moved: false };
    if (pointers.size === 2) drag = { pinch: spread(pointers) };
  });

  plot.addEventListener("pointermove", (event) => {
    const point = at(event);
    if (pointers.has(event.pointerId)) pointers.set(event.pointerId, event.clientX);
    if (drag?.pinch) {
      const now = spread(pointers);
      if (now > 10) actions.zoom(drag.pinch / now, point.share, false);
      drag.pinch = now;
      return;
    }
    if (!drag) {
      actions.hover(panel, point.inPlot ? point : null, event.clientX, event.clientY);
      return;
    }
    if (!drag.moved && (Math.abs(event.clientX - drag.x) < LEAST_DRAG || !drag.inPlot)) return;
    if (!drag.moved) start(event);
    if (drag.pans) {
      actions.pan((drag.x - event.clientX) / panel.width, false);
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
    if (!done.moved) actions.choose(at(event));
    else if (!done.pans) actions.select(...inOrder(done.share, done.end));
  });

  plot.addEventListener("pointercancel", (event) => {
    pointers.delete(event.pointerId);
    drag = null;
    range.hidden = true;
  });
  plot.addEventListener("pointerleave", () => {
    if (!drag) actions.hover(panel, null);
  });
  plot.addEventListener("dblclick", (event) => {
    if (at(event).inPlot) actions.reset();
  });
  plot.addEventListener("wheel", wheel(panel, actions), { passive: false });

  function start(event) {
    drag.moved = true;
    plot.setPointerCapture(event.pointerId);
    plot.classList.toggle("panning", drag.pans);
    if (drag.pans) actions.state.remember();
    actions.hover(panel, null);
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
    if (event.timeStamp - last > BURST) actions.state.remember();
    last = event.timeStamp;
    const unit = event.deltaMode === 1 ? 16 : 1;
    if (!zooms) actions.pan((along * unit) / panel.width, false);
    else {
      const { share } = pointAt(panel, actions, event);
      const turned = Math.max(-120, Math.min(120, event.deltaY * unit));
      actions.zoom(Math.exp(turned * 0.004), Math.max(0, Math.min(1, share)), false);
    }
  };
}

function pointAt(panel, { picture }, event) {
  return picture ? panel.at(event.clientX, event.clientY, picture) : {};
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
