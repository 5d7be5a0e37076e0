"""Sessions into tracks: against a slow reference, and by hand."""

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gradwatch_dashboard.sessions import join_sessions
from gradwatch_dashboard.wire import COLUMNS, StreamLayout


def table(*windows):
    """A table that says nothing but the steps."""
    rows = np.zeros((len(windows), len(COLUMNS)))
    for row, (first, last) in zip(rows, windows, strict=True):
        row[:2] = first, last
    return rows


def layout(*parameters, optimizer="A"):
    """A layout of scalars."""
    return StreamLayout(optimizer, parameters, parameters, ((),) * len(parameters))


def owners(track):
    """Step -> (segment, row) that shows it."""
    owner = {}
    for piece in track.pieces:
        for offset in range(piece.stop - piece.start):
            window = piece.start + offset
            for step in range(track.first_steps[window], track.last_steps[window] + 1):
                assert step not in owner
                owner[step] = (piece.segment, piece.rows.start + offset)
    return owner


@st.composite
def runs(draw):
    """Sessions of one optimizer, each with windows in segments."""
    tables = {}
    for session in range(draw(st.integers(1, 4))):
        step = draw(st.integers(0, 30))
        for segment in range(draw(st.integers(1, 3))):
            windows = []
            for _ in range(draw(st.integers(0, 5))):
                step += draw(st.integers(0, 2))
                windows.append((step, step + draw(st.integers(0, 4))))
                step = windows[-1][1] + 1
            tables[f"{session:012x}", 0, segment] = table(*windows)
    return tables


@settings(max_examples=300, deadline=None)
@given(runs())
def test_the_newest_session_that_has_begun_shows_a_step(tables):
    """Each step belongs to the newest session that begins at it or before, and only if it has it."""
    layouts = {key[:2]: layout("p") for key in tables}
    expected = {}
    for session in sorted({key[0] for key in tables}):
        windows = [
            (int(first), int(last), key, row)
            for key in sorted(tables)
            if key[0] == session
            for row, (first, last, *_) in enumerate(tables[key])
        ]
        if windows:
            expected = {step: owner for step, owner in expected.items() if step < windows[0][0]}
            for first, last, key, row in windows:
                expected |= dict.fromkeys(range(first, last + 1), (key, row))
    tracks = join_sessions(layouts, tables)
    if not expected:
        assert tracks == {}
        return
    track = tracks["A"]
    assert owners(track) == expected
    assert (np.diff(track.first_steps) > 0).all()
    assert (track.first_steps[1:] > track.last_steps[:-1]).all()
    assert (track.first_step, track.last_step) == (min(expected), max(expected))


def test_a_window_partly_beyond_is_cut_short():
    """A window that a later session cuts in two keeps its first steps."""
    tables = {("a", 0, 0): table((1, 4), (5, 8), (9, 12)), ("b", 0, 0): table((7, 7), (8, 9))}
    track = join_sessions({key[:2]: layout("p") for key in tables}, tables)["A"]
    windows = list(zip(track.first_steps.tolist(), track.last_steps.tolist(), strict=True))
    assert windows == [(1, 4), (5, 6), (7, 7), (8, 9)]


def test_the_newest_parameters_come_first():
    """The layout is that of the newest session; what only earlier ones had follows."""
    tables = {("a", 0, 0): table((1, 1)), ("b", 0, 0): table((2, 2))}
    layouts = {("a", 0): layout("old", "both"), ("b", 0): layout("both", "new")}
    track = join_sessions(layouts, tables)["A"]
    assert track.layout.parameters == ("both", "new", "old")
    columns = [None if piece.columns is None else piece.columns.tolist() for piece in track.pieces]
    assert columns == [[2, 0], [0, 1]]


def test_optimizers_replace_only_their_own():
    """A later session of one optimizer leaves what another holds of the same steps."""
    tables = {("a", 0, 0): table((1, 9)), ("a", 1, 0): table((1, 9)), ("b", 0, 0): table((3, 3))}
    layouts = {
        ("a", 0): layout("p", optimizer="A"),
        ("a", 1): layout("q", optimizer="B"),
        ("b", 0): layout("q", optimizer="B"),
    }
    tracks = join_sessions(layouts, tables)
    assert tracks["A"].last_steps.tolist() == [9]
    assert tracks["B"].last_steps.tolist() == [2, 3]


def test_a_stream_without_layout_is_left_out():
    """Windows whose layout is missing or damaged are not shown, the others are."""
    tables = {("a", 0, 0): table((1, 1)), ("b", 0, 0): table((1, 1), (2, 2))}
    track = join_sessions({("a", 0): layout("p")}, tables)["A"]
    assert track.last_step == 1


def test_a_session_that_has_not_begun_replaces_nothing():
    """A session with a layout and no window yet leaves the earlier one as it is."""
    tables = {("a", 0, 0): table((1, 5)), ("b", 0, 0): table()}
    track = join_sessions({("a", 0): layout("p"), ("b", 0): layout("q")}, tables)["A"]
    assert track.last_step == 5
    assert track.layout.parameters == ("p",)


def test_further_columns_of_sessions_are_joined():
    """Each keeps its numbers under the name it had; a column that a session lacks is NaN in it."""
    old, new = ("000000000000", 0), ("000000000001", 0)
    loss, rate = ("loss", "newest"), ("rate", "largest")
    tables = {
        (*old, 0): np.hstack([table((1, 1), (2, 2)), [[10.0, 0.5], [20.0, 0.6]]]),
        (*new, 0): np.hstack([table((2, 2), (3, 3)), [[0.7], [0.8]]]),
    }
    layouts = {
        old: replace(layout("p"), columns=(loss, rate)),
        new: replace(layout("p"), columns=(rate,)),
    }
    track = join_sessions(layouts, tables)["A"]
    assert track.layout.columns == (rate, loss)
    further = track.table[:, len(COLUMNS) :]
    np.testing.assert_array_equal(further, [[0.5, 10.0], [0.7, np.nan], [0.8, np.nan]])
