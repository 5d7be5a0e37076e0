"""Windows against a plain loop: widths, largest finite norms, counts, early ends."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from gradwatch.record.records import StepRecord
from gradwatch_dashboard.wire import COLUMNS
from gradwatch_tensorboard.windows import (
    FURTHER_COLUMNS,
    EarlyEnds,
    WindowReducer,
    Windows,
    window_ends,
)

NAN, INF = math.nan, math.inf


def width(step):
    """The width of the window of a step, by its definition: it doubles when the steps have."""
    found = 1
    while step > 2048 * found:
        found *= 2
    return found


def reference(steps, rows, early_ends):
    """The windows of a run as lists of places, by a plain loop."""
    groups, group, was_bad, end_before = [], [], False, 0
    for place, step in enumerate(steps):
        end = -(-step // width(step)) * width(step)
        if group and end != end_before:
            groups.append(group)
            group = []
        group.append(place)
        end_before = end
        bad = any(not math.isfinite(norm) for norm in rows[place])
        early = bad and not was_bad and step != end and early_ends > 0
        early_ends -= early
        was_bad = bad
        if early or step == end:
            groups.append(group)
            group = []
    return groups, group


def largest(values):
    """The largest finite value that is a norm; else NaN before Inf; else -1."""
    finite = [value for value in values if math.isfinite(value)]
    others = [value for value in values if not math.isfinite(value)]
    if others and max(finite, default=-1) < 0:
        return NAN if any(map(math.isnan, others)) else INF
    return max(finite)


def records_of(steps, rows):
    """Records whose fields differ from step to step."""
    return [
        StepRecord(step=step, grad_norm=row[0] if row[0] >= 0 else NAN, grad_norm_clipped=step * 0.5,
                   clip_threshold=step * 2.0, loss=step * 0.25, clip_coef=1 / (1 + step % 7), clipped=step % 3 == 0,
                   outcome="applied" if step % 5 else "skipped_policy", global_step=step + 100,
                   nonfinite_parameters=sum(not math.isfinite(norm) for norm in row))
        for step, row in zip(steps, rows, strict=True)
    ]  # fmt: skip


def reduce(steps, rows, cuts=(), early_ends=1000, dtype=np.float32):
    """Feeds the steps in batches that end at the cuts; the windows and what is left open."""
    reducer = WindowReducer(EarlyEnds(early_ends))
    norms, records, parts = np.array(rows, dtype), records_of(steps, rows), []
    bounds = sorted({0, *cuts, len(steps)})
    for a, b in itertools.pairwise(bounds):
        times = [step * 0.1 for step in steps[a:b]]
        parts.append(reducer.add(Windows.of_steps(records[a:b], norms[a:b], times)))
    return Windows.join(parts), reducer.rest()


STARTS = [1, 2000, 2040, 2049, 4090, 4097, 8170, 50_001, 999_990]
NORMS = st.sampled_from([-1.0, -1.0, 0.0, 0.25, 1.0, 3.0e38, NAN, INF]) | st.floats(
    0, 100, width=32
)


@st.composite
def runs(draw):
    """Steps from somewhere on, some left out, with rows of three norms and how they are cut."""
    step, steps = draw(st.sampled_from(STARTS)), []
    for gap in draw(st.lists(st.sampled_from([1] * 20 + [2, 40, 3000]), min_size=1, max_size=60)):
        step += gap
        steps.append(step)
    often_fine = st.lists(st.just(0.5) | st.just(0.0), min_size=3, max_size=3)
    row = st.one_of(often_fine, often_fine, st.lists(NORMS, min_size=3, max_size=3))
    rows = draw(st.lists(row, min_size=len(steps), max_size=len(steps)))
    cuts = draw(st.sets(st.integers(1, len(steps)), max_size=6))
    return steps, rows, cuts, draw(st.sampled_from([0, 1, 3, 1000]))


@settings(deadline=None, max_examples=300)
@given(runs())
@example((list(range(2049, 2053)), [[NAN] * 3] * 4, {1, 2, 3}, 1000))
def test_windows_equal_a_plain_loop(run):
    """Every number of every window, whatever the values and however the run is cut into batches."""
    steps, rows, cuts, early_ends = run
    windows, rest = reduce(steps, rows, cuts, early_ends)
    groups, open_group = reference(steps, rows, early_ends)
    assert (rest is None) == (not open_group)
    if rest is not None:
        windows, groups = Windows.join([windows, rest]), [*groups, open_group]
    assert len(windows) == len(groups)
    records = records_of(steps, rows)
    for window, group in enumerate(groups):
        columns = np.array(rows)[group].T.tolist()
        expected = np.array([largest(column) for column in columns], np.float32)
        np.testing.assert_array_equal(windows.norms[window], expected)
        counts = [sum(not math.isfinite(norm) for norm in column) for column in columns]
        assert windows.bad[window].tolist() == counts
        taken = [records[place] for place in group]
        last = taken[-1]
        np.testing.assert_array_equal(
            windows.table[window],
            [
                taken[0].step, last.step, last.global_step, last.step * 0.1,
                largest([r.grad_norm for r in taken]), last.grad_norm_clipped, last.clip_threshold,
                min(r.clip_coef for r in taken), sum(r.nonfinite_parameters > 0 for r in taken),
                sum(r.clipped for r in taken), sum(r.outcome != "applied" for r in taken),
                *(getattr(last, name) for name, _ in FURTHER_COLUMNS),
            ],
        )  # fmt: skip


@settings(deadline=None)
@given(st.integers(1, 2**50))
def test_window_ends_by_definition(step):
    """A window begins behind a multiple of its width, and ends at the next one."""
    assert window_ends(np.array([step]))[0] == -(-step // width(step)) * width(step)


def test_a_million_steps_are_twelve_thousand_windows():
    """2048 single steps, and 1024 windows for each doubling: 11,170 up to step 1,000,000."""
    ends = window_ends(np.arange(1, 1_000_001))
    assert len(np.unique(ends)) == 11_170
    assert ends[-1] == 1_000_448


def test_a_window_waits_for_its_last_step():
    """Steps 2049 and 2050 are one window, which is there when both are, and holds the larger norm."""
    assert len(reduce([2049], [[1.0]])[0]) == 0
    windows, rest = reduce([2049, 2050], [[3.0], [2.0]])
    assert windows.norms.tolist() == [[3.0]]
    assert rest is None


def test_a_nan_does_not_wait():
    """A window ends at the first NaN of a streak; those after it wait for the end of theirs."""
    steps = list(range(8193, 8201))
    windows, rest = reduce(steps, [[1.0], [NAN], [NAN], [NAN], [2.0], [NAN], [1.0], [1.0]])
    assert windows.table[:, :2].tolist() == [[8193, 8194], [8195, 8198], [8199, 8200]]
    assert windows.bad.ravel().tolist() == [1, 3, 0]
    assert rest is None


@pytest.mark.parametrize("cuts", [(), range(0, 8192, 5)])
def test_early_ends_are_counted(cuts):
    """After the last early end a NaN waits for the end of its window, and is counted there."""
    rows = [[NAN if step % 2 else 1.0] for step in range(8192)]
    windows, rest = reduce(list(range(8193, 16385)), rows, cuts, early_ends=10)
    assert len(windows) == 8192 // 8 + 10
    assert windows.bad.sum() == 4096
    assert rest is None


def test_no_gradient_and_zero():
    """-1 only where there was no gradient in any step, 0 only where all of them were 0."""
    rows = [[-1, -1, 0, 0, -1], [-1, 0, 0, 1e-30, NAN]]
    windows, _ = reduce([2049, 2050], rows)
    np.testing.assert_array_equal(windows.norms[0], np.array([-1, 0, 0, 1e-30, NAN], np.float32))
    assert windows.bad[0].tolist() == [0, 0, 0, 0, 1]


@pytest.mark.parametrize(
    ("norm", "narrow"), [(1e300, np.finfo("f4").max), (1e-300, 1e-45), (INF, INF)]
)
def test_what_float32_cannot_hold(norm, narrow):
    """A finite norm stays finite and one above zero above it: neither is a bad step or a dead one."""
    windows, _ = reduce([1], [[norm, 0.0]], dtype=np.float64)
    assert windows.norms.tolist() == [[pytest.approx(narrow), 0]]
    assert windows.bad.tolist() == [[norm == INF, 0]]


def test_counts_that_are_too_large():
    """Beyond 65,535 bad steps the count of a window stays there."""
    last = 2**28  # the windows before it are 131,072 wide
    steps = np.arange(last - 131_071, last + 1)
    windows, rest = reduce(steps.tolist(), np.full((131_072, 1), NAN), early_ends=0)
    assert windows.bad.tolist() == [[65_535]]
    assert windows.table[0, COLUMNS.index("bad_steps")] == 131_072
    assert rest is None


def test_a_bad_step_without_a_bad_norm():
    """A record that counts non-finite parameters is a bad step though all norms are finite."""
    record = StepRecord(step=1, nonfinite_parameters=1)
    windows = Windows.of_steps([record], np.ones((1, 2), np.float32), [0.0])
    assert windows.are_bad.tolist() == [True]
    assert windows.bad.tolist() == [[0, 0]]


def test_a_clip_coefficient_that_is_not_known():
    """A NaN, of a bad step, does not hide the smallest coefficient of the others."""
    records = [StepRecord(step=2049 + i, clip_coef=coef) for i, coef in enumerate([0.5, NAN])]
    windows = Windows.of_steps(records, np.ones((2, 1), np.float32), [0.0, 0.0])
    assert windows.merged(np.array([0])).table[0, COLUMNS.index("clip_coef")] == 0.5


def test_takes_arrays_of_its_own():
    """What the batch held may change afterwards."""
    norms = np.ones((1, 2), np.float32)
    windows = Windows.of_steps([StepRecord(step=1)], norms, [0.0])
    norms[:] = 7
    assert windows.norms.tolist() == [[1, 1]]
