"""Windows into columns: against a slow reference, and by hand."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradwatch_dashboard.binning import bin_bad, bin_norms, bin_table, spans_of
from gradwatch_dashboard.sessions import Piece
from gradwatch_dashboard.tensors import MAX_STEP, MatrixChunks, encode
from gradwatch_dashboard.wire import COLUMNS

from .slow_binning import NOTHING, columns_of_window, slow_heatmap

NORM = st.one_of(
    st.floats(0, 2.0**100, width=32), st.sampled_from([np.nan, np.inf, -1.0, 0.0, NOTHING])
)


@st.composite
def tracks(draw):
    """Windows in pieces, some parameters of which a piece may lack."""
    parameters = draw(st.integers(1, 4))
    step, windows, pieces = draw(st.integers(0, 5)), [], []
    for segment in range(draw(st.integers(1, 3))):
        width = draw(st.integers(1, parameters))
        columns = draw(st.permutations(range(parameters)))[:width]
        start = len(windows)
        rows, bad = [], []
        for _ in range(draw(st.integers(1, 6))):
            step += draw(st.integers(0, 3))
            last = step + draw(st.integers(0, 5))
            rows.append(draw(st.lists(NORM, min_size=width, max_size=width)))
            bad.append(draw(st.lists(st.sampled_from([0, 0, 1, 300, 65535]), min_size=width, max_size=width)))  # fmt: skip
            whole = {"first": step, "last": last, "norms": [NOTHING] * parameters, "bad": [0] * parameters}  # fmt: skip
            for column, norm, count in zip(columns, rows[-1], bad[-1], strict=True):
                whole["norms"][column], whole["bad"][column] = norm, count
            windows.append(whole)
            step = last + 1
        skipped = draw(st.integers(0, 2))  # rows of the segment that are not of the track
        padding = [[7.0] * width] * skipped
        norms = np.array(padding + rows, "f4")
        norms[norms != NOTHING] = encode(norms[norms != NOTHING])
        counts = np.array([[9] * width] * skipped + bad, "u2")
        bad_rows = np.flatnonzero(counts.any(1))
        same = list(columns) == list(range(parameters))
        piece = Piece(("s", 0, segment), slice(skipped, skipped + len(rows)), start,
                      None if same else np.array(columns, np.intp))  # fmt: skip
        pieces.append((piece, MatrixChunks(norms, bad_rows, counts[bad_rows])))
    return parameters, windows, pieces


@settings(max_examples=300, deadline=None)
@given(tracks(), st.data())
def test_agrees_with_the_specification(track, data):
    """Every cell holds what the specification says, in any range, for any number of columns."""
    parameters, windows, pieces = track
    low, high = windows[0]["first"], windows[-1]["last"]
    first = data.draw(st.integers(low, high))
    last = data.draw(st.integers(first, high))
    columns = data.draw(st.integers(1, min(last - first + 1, 100)))
    firsts, lasts = (np.array([w[key] for w in windows]) for key in ("first", "last"))
    spans = spans_of(firsts, lasts, first, last, columns)
    norms, bad = slow_heatmap(windows, parameters, first, last, columns)
    np.testing.assert_array_equal(bin_norms(pieces, parameters, spans), np.array(norms, "f4"))
    found = bin_bad(pieces, parameters, spans)
    expected = np.minimum(bad, 65535)
    if found is None:
        assert not expected.any()
    else:
        assert found.dtype == ("u1" if expected.max() < 256 else "u2")
        np.testing.assert_array_equal(found, expected)


@settings(max_examples=200, deadline=None)
@given(tracks(), st.data())
def test_strips_agree_with_their_windows(track, data):
    """The strips reduce exactly the windows that a column overlaps."""
    _, windows, _ = track
    first, last = windows[0]["first"], windows[-1]["last"]
    columns = data.draw(st.integers(1, last - first + 1))
    table = data.draw(
        st.lists(
            st.lists(st.one_of(st.floats(0, 100, width=32), st.just(np.nan)), min_size=11, max_size=11),
            min_size=len(windows), max_size=len(windows),
        )
    )  # fmt: skip
    table = np.array(table)
    firsts, lasts = (np.array([w[key] for w in windows]) for key in ("first", "last"))
    strips = bin_table(table, spans_of(firsts, lasts, first, last, columns))
    inside = [columns_of_window(window, first, last, columns) for window in windows]
    for column in range(columns):
        rows = dict(zip(COLUMNS, table[[column in of for of in inside]].T, strict=True))
        for name in ("grad_norm", "grad_norm_clipped"):
            values = rows[name][np.isfinite(rows[name])]
            expected = values.max() if len(values) else np.nan
            np.testing.assert_equal(strips[name][column], np.float32(expected))
        finite = rows["clip_coef"][np.isfinite(rows["clip_coef"])]
        np.testing.assert_equal(
            strips["clip_coef"][column], np.float32(finite.min() if len(finite) else np.nan)
        )
        last_threshold = rows["clip_threshold"][-1] if len(rows["clip_threshold"]) else np.nan
        np.testing.assert_equal(strips["clip_threshold"][column], np.float32(last_threshold))
        for name in ("bad_steps", "clipped_steps", "skipped_steps"):
            assert strips[name][column] == pytest.approx(np.nansum(rows[name]), rel=1e-6)


def test_a_wide_window_fills_every_column_that_it_overlaps():
    """A window of eight steps fills eight columns of one step."""
    spans = spans_of(np.array([1, 9]), np.array([8, 9]), 1, 9, 9)
    matrix = MatrixChunks(np.array([[3.0], [5.0]], "f4"), np.array([0]), np.array([[2]], "u2"))
    pieces = [(Piece(("s", 0, 0), slice(0, 2), 0, None), matrix)]
    assert bin_norms(pieces, 1, spans).tolist() == [[3.0] * 8 + [5.0]]
    assert bin_bad(pieces, 1, spans).tolist() == [[2] * 8 + [0]]


def test_a_finite_norm_hides_no_bad_step():
    """A cell with one finite and one NaN norm shows the finite one and counts the bad step."""
    spans = spans_of(np.array([1, 2]), np.array([1, 2]), 1, 2, 1)
    norms = encode(np.array([[np.nan], [2.0]], "f4"))
    matrix = MatrixChunks(norms, np.array([0]), np.array([[1]], "u2"))
    pieces = [(Piece(("s", 0, 0), slice(0, 2), 0, None), matrix)]
    assert bin_norms(pieces, 1, spans).tolist() == [[2.0]]
    assert bin_bad(pieces, 1, spans).tolist() == [[1]]


def test_a_nan_outweighs_an_inf():
    """A cell with both a NaN and an Inf, and nothing finite, shows the NaN, above no gradient."""
    spans = spans_of(np.array([1, 2, 3]), np.array([1, 2, 3]), 1, 3, 1)
    norms = encode(np.array([[np.nan, np.inf], [np.inf, -1], [-1, -1]], "f4"))
    matrix = MatrixChunks(norms, np.empty(0, np.intp), np.empty((0, 2), "u2"))
    cells = bin_norms([(Piece(("s", 0, 0), slice(0, 3), 0, None), matrix)], 2, spans)
    np.testing.assert_array_equal(cells, [[np.nan], [np.inf]])


def test_large_totals_stay_finite():
    """A finite total beyond float32 is its largest number, not Inf."""
    table = np.zeros((1, len(COLUMNS)))
    table[0, COLUMNS.index("grad_norm")] = 1e300
    strips = bin_table(table, spans_of(np.array([1]), np.array([1]), 1, 1, 1))
    assert strips["grad_norm"].tolist() == [np.finfo(np.float32).max]


def test_columns_of_huge_steps_do_not_overflow():
    """The columns are exact up to the largest step that is read."""
    firsts = np.array([0, MAX_STEP])
    spans = spans_of(firsts, firsts, 0, MAX_STEP, 4096)
    assert np.flatnonzero(spans.start < spans.stop).tolist() == [0, 4095]


def cpu_s(task):
    """What a task takes of this thread's own time, which does not run while others have the core."""
    times = []
    for _ in range(3):
        begin = time.thread_time()
        task()
        times.append(time.thread_time() - begin)
    return min(times)


@pytest.mark.parametrize(("windows", "width"), [(4322, None), (10_000, 1)])
def test_is_fast(windows, width):
    """To make 1000 columns of 3000 parameters by 10,000 windows takes about as long as to copy them."""
    rng = np.random.default_rng(0)
    edges = (
        np.arange(1, windows + 2)
        if width
        else np.concatenate(
            [np.arange(1, 2049), np.arange(2049, 4097, 2), np.arange(4097, 10001, 4)]
        )
    )
    firsts, lasts = edges[:-1], edges[1:] - 1
    norms = rng.random((len(firsts), 3000), "f4")
    matrix = MatrixChunks(norms, np.empty(0, np.intp), np.empty((0, 3000), "u2"))
    pieces = [(Piece(("s", 0, 0), slice(0, len(firsts)), 0, None), matrix)]

    def bins():
        spans = spans_of(firsts, lasts, 1, int(lasts[-1]), 1000)
        bin_norms(pieces, 3000, spans)

    assert cpu_s(bins) < 10 * cpu_s(norms.copy)  # 1.5 times as long


def test_further_columns_are_binned_as_the_layout_says():
    """The largest, the smallest or the last number; a NaN among them is passed over."""
    table = np.zeros((4, len(COLUMNS) + 3))
    table[:, -3:] = np.array([[1, 5, 2], [np.nan, 4, np.nan], [3, np.nan, 8], [2, 6, np.nan]])
    steps = np.arange(1, 5)
    further = (("high", "largest"), ("low", "smallest"), ("last", "newest"))
    strips = bin_table(table, spans_of(steps, steps, 1, 4, 2), further)
    assert strips["high"].tolist() == [1, 3]
    assert strips["low"].tolist() == [4, 6]
    np.testing.assert_array_equal(strips["last"], [np.nan, np.nan])
    strips = bin_table(table, spans_of(steps, steps, 1, 4, 4), further)
    np.testing.assert_array_equal(strips["last"], [2, np.nan, 8, np.nan])
