/** The keyboard commands of a heat map. */

/**
 * Listens to the keys.
 *
 * @param {import("./panel.js").Panel} panel
 * @param {import("./actions.js").Actions} actions
 */
export function listenToKeys(panel, actions) {
  panel.scroll.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const task = tasks(panel, actions, event.shiftKey ? 10 : 1)[event.key];
    if (!task) return;
    event.preventDefault();
    event.stopPropagation();
    task();
  });
  panel.scroll.addEventListener("focus", () => {
    // A click focuses too, but then the pointer shows the place, so no cursor is needed.
    if (panel.scroll.matches(":focus-visible")) move(panel, actions, 0, 0);
  });
  panel.scroll.addEventListener("blur", () => actions.state.set({ cursor: null }));
}

function tasks(panel, actions, far) {
  const { state } = actions;
  const { rows } = actions.picture;
  const page = Math.max(1, Math.floor(panel.scroll.clientHeight / panel.rowHeight) - 1);
  const row = () => (state.cursor ? rows[state.cursor.row] : null);
  return {
    ArrowLeft: () => move(panel, actions, -far, 0),
    ArrowRight: () => move(panel, actions, far, 0),
    ArrowUp: () => move(panel, actions, 0, -far),
    ArrowDown: () => move(panel, actions, 0, far),
    PageUp: () => move(panel, actions, 0, -page),
    PageDown: () => move(panel, actions, 0, page),
    Home: () => move(panel, actions, -Infinity, 0),
    End: () => move(panel, actions, Infinity, 0),
    "+": () => actions.zoom(0.5),
    "=": () => actions.zoom(0.5),
    "-": () => actions.zoom(2),
    "[": () => actions.pan(-0.25),
    "]": () => actions.pan(0.25),
    0: () => actions.reset(),
    Escape: () => state.back(),
    Backspace: () => state.back(),
    Enter: () => row() && state.set({ selected: row().key }),
    " ": () => row() && actions.toggle(row()),
  };
}

/** Moves the cursor by a number of columns and rows, and describes the cell there. */
function move(panel, actions, columns, rows) {
  const { picture, state } = actions;
  const cells = panel.cells(picture.view);
  if (!cells || !picture.rows.length) return;
  const { first, last } = picture.view;
  const { heat } = cells;
  const middle = Math.round((first + last) / 2);
  const from = state.cursor ?? { row: 0, step: middle };
  const unit = (heat.last - heat.first + 1) / heat.columns;
  let step = from.step;
  if (Number.isFinite(columns)) step += Math.sign(columns) * Math.ceil(Math.abs(columns) * unit);
  else step = columns;
  step = Math.max(first, heat.first, Math.min(step, last, heat.last));
  const row = Math.max(0, Math.min(from.row + rows, picture.rows.length - 1));
  panel.reveal(row);
  state.set({ cursor: { row, step } });
  actions.say(panel, picture.rows[row], step);
}
