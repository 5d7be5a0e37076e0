"""The benchmark of overhead: what it makes of times, checked with times made by hand."""

from __future__ import annotations

import math
from contextlib import contextmanager

import pytest

NAN = math.nan


def _variant(name, regime="", sinks=(), prepare=None):
    from benchmarks.overhead.variants import Variant

    return Variant(name, prepare, regime, sinks)


def _result(clip, *, workload="gpt", bare=(0.01, 0.01), flush_s=0.0, **variants):
    """A setting with one round per number; both regimes get the same numbers."""
    from benchmarks.overhead import variants as names
    from benchmarks.overhead.results import Result
    from benchmarks.overhead.timing import Round
    from benchmarks.overhead.workloads import Setting

    others = {getattr(names, name): numbers for name, numbers in variants.items()}
    added = {names.CLIP: clip, **others}
    labels = [
        _variant(name, regime, ("folder",) if name == names.BOTH else ())
        for name in added
        for regime in ([""] if name == names.WATCH else names.MAX_NORMS)
    ]
    rounds = [
        Round(list(bare), {label.key: added[label.name][number] for label in labels})
        for number in range(len(clip))
    ]
    return Result(Setting(workload), labels, {("folder",): flush_s}, 1, 4, rounds)


def _rows(result):
    from benchmarks.overhead.fixed_costs import FixedCosts
    from benchmarks.overhead.results import target_rows

    return {row.what: row for row in target_rows([result], FixedCosts())}


def test_median_and_quartiles():
    """Of five rounds the quartiles are the second and the fourth; of one it is all there is."""
    from benchmarks.spread import Spread, spread

    assert spread([5.0, 1.0, 4.0, 2.0, 3.0]) == Spread(3.0, 2.0, 4.0)
    assert spread([7.0]) == Spread(7.0, 7.0, 7.0)
    assert math.isnan(spread([]).middle)
    assert math.isnan(spread([1.0, NAN]).low)


def test_a_turn_is_held_against_both_neighbours():
    """A machine that becomes slower meanwhile is no cost of the variant."""
    from benchmarks.overhead.timing import paired

    assert paired(10.0, before=6.0, after=8.0) == 3.0


def test_ratio_of_medians():
    """The ratio is that of the medians; a round in which the clip is lost has none of its own."""
    from benchmarks.spread import Spread, ratio, ratios

    assert ratio([1.0, 2.0, 3.0], [2.0, 4.0, 6.0]) == Spread(0.5, 0.5, 0.5)
    assert ratio([1.0, 2.0, 3.0], [-1.0, 4.0, 6.0]) == Spread(0.5, 0.5, 0.5)
    assert [math.isnan(r) for r in ratios([1.0, 1.0, 1.0], [-1.0, 0.0, 4.0])] == [True, True, False]
    assert math.isnan(ratio([1.0, 2.0, 3.0], [-1.0, -4.0, 6.0]).middle)


@pytest.mark.parametrize(("bare_s", "steps"), [(0.01, 64), (1.0, 5), (9.0, 1)])
def test_flushes_are_shared_out(bare_s, steps):
    """64 steps share a flush, or as many as fit into its 5 seconds."""
    result = _result([0.1], bare=[bare_s], flush_s=0.32, BOTH=[0.05])
    both = result.variant("watch(clip=) + TensorBoard + run folder", "nothing clipped")
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
    from benchmarks.overhead.fixed_costs import FixedCosts
    from benchmarks.overhead.results import target_rows

    good, bad = (_result([10.0] * 3, workload="cnn", BOTH=[x] * 3) for x in (5.0, 12.0))
    for results in ([good, bad], [bad, good]):
        rows = [row for row in target_rows(results[:1], FixedCosts()) if "CNN" in row.what]
        assert [row.verdict for row in rows] == ["reached" if results[0] is good else "not reached"]


def test_share_of_the_bare_step():
    """0.1 ms of a step of 10 ms are 1 %."""
    row = _rows(_result([1.0], WATCH=[0.0001]))[
        "`watch()`, share of the bare step: GPT, 10 million parameters"
    ]
    assert (row.measured, row.verdict) == ("1.0% (1.0% to 1.0%)", "reached")


def test_what_is_measured_once():
    """Counts, memory, import and the share outside of operators each have their verdict."""
    from benchmarks.overhead.fixed_costs import FixedCosts
    from benchmarks.overhead.operators import OperatorTime
    from benchmarks.overhead.results import target_rows
    from benchmarks.spread import Spread

    operators = OperatorTime(Spread(2.0, 2.0, 2.0), Spread(0.9, 0.9, 0.9), Spread(0.55, 0.5, 0.6))
    calls = {"watch()": (5, 5), "watch(clip=)": (6, 606)}
    fixed = FixedCosts(calls, {"watch()": 1}, (1 << 20, 100_000), 0.05, operators)
    told = [row.verdict for row in target_rows([], fixed)][-6:]
    assert told == ["reached", "not reached", "not reached", "reached", "reached", "not reached"]
    short = FixedCosts(memory=(1 << 20, 20_000))
    assert {row.verdict for row in target_rows([], short)} == {"not measured"}


class _Machine:
    """A clock that only steps move, and a log of whose steps they were."""

    def __init__(self):
        self.now, self.log = 0.0, []

    def variant(self, name, seconds, precise=True):
        from benchmarks.overhead.variants import Loop, Variant

        def step():
            self.log.append(name)
            self.now += seconds

        @contextmanager
        def prepare():
            yield Loop(step)

        return Variant(name, prepare, precise=precise)


def test_turns_alternate_with_the_bare_loop():
    """Bare, two others, bare, two others: and each variant's cost comes out exactly."""
    from benchmarks.overhead.timing import InterleavedTiming, host_timer

    machine = _Machine()
    costs = {"a": 0.25, "b": 0.5, "c": 0.0}
    variants = [machine.variant(name, 1.0 + cost) for name, cost in costs.items()]
    slow = machine.variant("slow", 3.0, precise=False)
    bare = machine.variant("bare", 1.0)
    timing = InterleavedTiming(bare, [*variants, slow], host_timer(lambda: machine.now), steps=2)
    timing.rehearse()
    machine.log.clear()
    measured = timing.measure_round(3)
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
    from benchmarks.overhead.timing import MOST_TURNS, InterleavedTiming, host_timer

    machine = _Machine()
    timing = InterleavedTiming(
        machine.variant("bare", 1.0), [machine.variant("a", 1.0)], host_timer(lambda: 0.0), 2
    )
    timing._cost = {("bare", ""): 1.0, ("a", ""): 2.0}
    assert timing.round_seconds(3) == 12.0
    assert [timing.fitting(seconds) for seconds in (-5.0, 4.0, 12.5, 1e9)] == [1, 1, 3, MOST_TURNS]


def test_waits_and_kernels_of_a_profile():
    """Launches and waits are told by the names that CUDA's runtime has for them."""
    from benchmarks.overhead.counts import Counts, tally

    names = ["cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cudaMemcpyAsync"]
    names += ["cudaStreamSynchronize", "cudaDeviceSynchronize", "aten::_local_scalar_dense", "add"]
    assert tally(names) == Counts(numbers=1, waits=2, kernels=3)
    assert tally(names) - tally(names[3:]) == Counts(kernels=3)
