"""The benchmark of overhead: what it makes of times, checked with times made by hand."""

from __future__ import annotations

import math
from contextlib import contextmanager

import pytest

NAN = math.nan


def _way(name, regime="", sinks=(), lend=None):
    from _overhead_ways import Way

    return Way(name, lend, regime, sinks)


def _result(clip, *, workload="gpt", bare=(0.01, 0.01), delivery=0.0, **ways):
    """A setting with one round per number; both regimes get the same numbers."""
    import _overhead_ways as names
    from _overhead_results import Result
    from _overhead_turns import Round
    from _overhead_workloads import Setting

    added = {names.CLIP: clip, **{getattr(names, name): numbers for name, numbers in ways.items()}}
    labels = [
        _way(name, regime, ("folder",) if name == names.BOTH else ())
        for name in added
        for regime in ([""] if name == names.WATCH else names.LIMITS)
    ]
    rounds = [
        Round(list(bare), {label.key: added[label.name][number] for label in labels})
        for number in range(len(clip))
    ]
    return Result(Setting(workload), labels, {("folder",): delivery}, 1, 4, rounds)


def _rows(result):
    from _overhead_once import Once
    from _overhead_targets import target_rows

    return {row.what: row for row in target_rows([result], Once())}


def test_median_and_quartiles():
    """Of five rounds the quartiles are the second and the fourth; of one it is all there is."""
    from _overhead_spread import Spread, spread

    assert spread([5.0, 1.0, 4.0, 2.0, 3.0]) == Spread(3.0, 2.0, 4.0)
    assert spread([7.0]) == Spread(7.0, 7.0, 7.0)
    assert math.isnan(spread([]).middle)
    assert math.isnan(spread([1.0, NAN]).low)


def test_a_turn_is_held_against_both_neighbours():
    """A machine that becomes slower meanwhile is no cost of the way."""
    from _overhead_spread import paired

    assert paired(10.0, before=6.0, after=8.0) == 3.0


def test_ratio_of_medians():
    """The ratio is that of the medians; a round in which the clip is lost has none of its own."""
    from _overhead_spread import Spread, ratio, ratios

    assert ratio([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]) == Spread(0.5, 0.5, 0.5)
    assert ratio([1.0, 2.0, 3.0], [-1.0, 4.0, 6.0]) == Spread(0.5, 0.5, 0.5)
    assert [math.isnan(r) for r in ratios([1.0, 1.0, 1.0], [-1.0, 0.0, 4.0])] == [True, True, False]
    assert math.isnan(ratio([1.0, 2.0, 3.0], [-1.0, -4.0, 6.0]).middle)


@pytest.mark.parametrize(("bare_s", "steps"), [(0.01, 64), (1.0, 5), (9.0, 1)])
def test_deliveries_are_shared_out(bare_s, steps):
    """64 steps share a delivery, or as many as fit into its 5 seconds."""
    result = _result([0.1], bare=[bare_s], delivery=0.32, BOTH=[0.05])
    both = result.way("watch(clip=) + TensorBoard + run folder", "nothing clipped")
    assert result.added(both) == [pytest.approx(0.05 + 0.32 / steps)]


@pytest.mark.parametrize(
    ("mine", "told", "rounds"),
    [([2.0, 2.5, 9.0], "reached", "2 of 3"), ([2.0, 4.0, 9.0], "not reached", "1 of 3")],
)
def test_reached_is_what_the_median_says(mine, told, rounds):
    """A target of 0.3 is reached by a median ratio of 0.25 and not by one of 0.4."""
    rows = _rows(_result([10.0, 10.0, 10.0], WATCH_CLIP=mine))
    row = rows["`watch(clip=)` ÷ `clip_grad_norm_`, nothing clipped: GPT, 10 million parameters"]
    assert (row.limit, row.verdict) == ("≤ 0.3", told)
    assert f"{rounds} rounds" in row.measured
    other = rows["`watch(clip=)` ÷ `clip_grad_norm_`, nothing clipped: MLP, 300 narrow tensors"]
    assert other.verdict == "not measured"


def test_a_clip_lost_in_the_noise_proves_nothing():
    """Where clip_grad_norm_ seems to cost nothing there is no ratio, neither reached nor missed."""
    rows = _rows(_result([-1.0, -1.0, 5.0], WATCH_CLIP=[1.0] * 3, BOTH=[1.0] * 3))
    told = [row for what, row in rows.items() if "÷" in what and "GPT" in what]
    assert {row.verdict for row in told} == {"not measured"}
    assert "lost in the noise" in told[0].measured


def test_the_worst_setting_is_told():
    """Of all settings of a workload, the one with the largest ratio counts."""
    from _overhead_once import Once
    from _overhead_targets import target_rows

    good, bad = (_result([10.0] * 3, workload="cnn", BOTH=[x] * 3) for x in (5.0, 12.0))
    for results in ([good, bad], [bad, good]):
        rows = [row for row in target_rows(results[:1], Once()) if "CNN" in row.what]
        assert [row.verdict for row in rows] == ["reached" if results[0] is good else "not reached"]


def test_share_of_the_bare_step():
    """0.1 ms of a step of 10 ms are 1 %."""
    row = _rows(_result([1.0], WATCH=[0.0001]))[
        "`watch()`, share of the bare step: GPT, 10 million parameters"
    ]
    assert (row.measured, row.verdict) == ("1.0% (1.0% to 1.0%)", "reached")


def test_what_is_measured_once():
    """Counts, memory, import and the share outside of operators each have their verdict."""
    from _overhead_once import Once
    from _overhead_outside import Outside
    from _overhead_spread import Spread
    from _overhead_targets import target_rows

    outside = Outside(Spread(2.0, 2.0, 2.0), Spread(0.9, 0.9, 0.9), Spread(0.55, 0.5, 0.6))
    calls = {"watch()": (5, 5), "watch(clip=)": (6, 606)}
    once = Once(calls, {"watch()": 1}, (1 << 20, 100_000), 0.05, outside)
    told = [row.verdict for row in target_rows([], once)][-6:]
    assert told == ["reached", "not reached", "not reached", "reached", "reached", "not reached"]
    short = Once(memory=(1 << 20, 20_000))
    assert {row.verdict for row in target_rows([], short)} == {"not measured"}


class _Machine:
    """A clock that only steps move, and a log of whose steps they were."""

    def __init__(self):
        self.now, self.log = 0.0, []

    def way(self, name, seconds, precise=True):
        from _overhead_ways import Way

        def step():
            self.log.append(name)
            self.now += seconds

        @contextmanager
        def lend():
            yield step

        return Way(name, lend, precise=precise)


def test_turns_alternate_with_the_bare_loop():
    """Bare, two others, bare, two others: and each way's cost comes out exactly."""
    from _overhead_turns import Turns, host_timer

    machine = _Machine()
    costs = {"a": 0.25, "b": 0.5, "c": 0.0}
    ways = [machine.way(name, 1.0 + cost) for name, cost in costs.items()]
    slow = machine.way("slow", 3.0, precise=False)
    bare = machine.way("bare", 1.0)
    turns = Turns(bare, [*ways, slow], host_timer(lambda: machine.now), steps=2)
    turns.rehearse()
    machine.log.clear()
    measured = turns.round(3)
    assert {name: measured.added[name, ""] for name in costs} == pytest.approx(costs)
    assert measured.added["slow", ""] == pytest.approx(2.0)
    order = machine.log[::3]  # three steps a turn, the first for the change
    assert machine.log == [name for name in order for _ in range(3)]
    assert order[:6:3] == ["bare", "bare"]
    assert "".join("b" if name == "bare" else "." for name in order) == "b..b..b" + "b..b.b" * 2
    assert order.count("slow") == 1
    assert len(measured.bare) == order.count("bare")


def test_time_is_kept_to():
    """More turns where there is time for them, and at least one where there is none."""
    from _overhead_turns import MOST_TURNS, Turns, host_timer

    machine = _Machine()
    turns = Turns(machine.way("bare", 1.0), [machine.way("a", 1.0)], host_timer(lambda: 0.0), 2)
    turns._cost = {("bare", ""): 1.0, ("a", ""): 2.0}
    assert turns.round_seconds(3) == 12.0
    assert [turns.fitting(seconds) for seconds in (-5.0, 4.0, 12.5, 1e9)] == [1, 1, 3, MOST_TURNS]


def test_waits_and_kernels_of_a_profile():
    """Launches and waits are told by the names that CUDA's runtime has for them."""
    from _overhead_counts import Counts, tally

    names = ["cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cudaMemcpyAsync"]
    names += ["cudaStreamSynchronize", "cudaDeviceSynchronize", "aten::_local_scalar_dense", "add"]
    assert tally(names) == Counts(numbers=1, waits=2, kernels=3)
    assert tally(names) - tally(names[3:]) == Counts(kernels=3)
