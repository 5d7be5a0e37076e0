"""Twenty NaN steps of a hundred thousand: none of them is lost on the way to the picture."""

import numpy as np
import pytest

from gradwatch_dashboard.wire import COLUMNS
from tests.support.board import LOADERS, Board

from .logs import LogFile, event, table_of

STEPS, PARAMETERS, CHUNK = 100_000, 6, 64
SESSION = "018000000001"
NAN_STEPS = np.sort(np.random.default_rng(3).choice(np.arange(1, STEPS + 1), 20, replace=False))


def write(folder):
    """Windows that double in width with the step, as the writer makes them."""
    firsts, step, width = [], 1, 1
    while step <= STEPS:
        width = 1 if step <= 2048 else 2 ** int(np.log2((step - 1) // 2048) + 1)
        firsts.append(step)
        step += width
    firsts = np.array(firsts)
    lasts = np.append(firsts[1:] - 1, STEPS)
    norms = np.random.default_rng(0).uniform(0.1, 1, (len(firsts), PARAMETERS)).astype("f4")
    bad = np.zeros(norms.shape, "u2")
    rows = np.searchsorted(lasts, NAN_STEPS)
    np.add.at(bad, (rows, NAN_STEPS % PARAMETERS), 1)
    norms[(bad > 0) & (lasts == firsts)[:, None]] = np.nan
    table = table_of(firsts, lasts, norms)
    table[:, COLUMNS.index("bad_steps")] = bad.sum(1)
    with LogFile(folder) as log:
        log.add_layout(SESSION, "AdamW", [f"p{number}" for number in range(PARAMETERS)])
        for number, start in enumerate(range(0, len(firsts), CHUNK)):
            here = slice(start, start + CHUNK)
            log.add_windows(SESSION, norms[here], table[here], bad[here], segment=number // 100)
        for step in NAN_STEPS.tolist():
            log.add_events(SESSION, [event(step)], step=step)
    return len(firsts)


@pytest.mark.parametrize("load_fast", LOADERS)
def test_every_nan_step_is_in_the_picture(load_fast, tmp_path):
    """Every NaN step is counted in its cell, in the strip, in `runs` and in the events."""
    windows = write(tmp_path / "long")
    assert windows > 7000
    with Board(tmp_path, load_fast) as board:
        board.wait(lambda: last(board)["windows"] == windows)
        assert last(board)["bad_steps"] == 20
        board.wait(lambda: board.get_json("events", run="long")["total"] == 20)
        events = board.get_json("events", run="long")["events"]
        assert [one["step"] for one in events] == NAN_STEPS.tolist()
        for columns in (100, 1000, 4096):
            found = board.heatmap("long", "AdamW", columns=columns)
            places = (NAN_STEPS - 1) * columns // STEPS
            assert (found["bad"][NAN_STEPS % PARAMETERS, places] >= 1).all()
            assert (found["bad_steps"][places] >= 1).all()
            # a window that lies across two columns counts in both
            assert 20 <= found["bad"].sum() <= 20 * (1 + columns // 100)
        for step in NAN_STEPS.tolist():
            curve = board.get_json(
                "curve", run="long", optimizer="AdamW", parameter=step % PARAMETERS, first=step, last=step,
            )  # fmt: skip
            assert curve["bad"][0] >= 1


def last(board):
    """What `runs` says of the one optimizer."""
    return board.get_json("runs")["runs"][0]["optimizers"][0]
