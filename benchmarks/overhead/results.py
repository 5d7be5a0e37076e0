"""The result of each setting, and which targets are reached."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from benchmarks.overhead.counts import Counts
from benchmarks.overhead.fixed_costs import FixedCosts
from benchmarks.overhead.timing import Round, steps_per_flush
from benchmarks.overhead.variants import (
    BARE,
    BOTH,
    CLIP,
    EVERY_STEP_CLIPPED,
    MAX_NORMS,
    NOTHING_CLIPPED,
    WATCH,
    WATCH_CLIP,
    Key,
    Variant,
)
from benchmarks.overhead.workloads import WORKLOADS, Setting
from benchmarks.spread import Spread, ratio, ratios, spread, spread_text

NOT_MEASURED = "not measured"

SHARES = {"gpt": 0.01, "mlp": 0.05}
RATIOS: Sequence[tuple[str, str, Mapping[str, float]]] = (
    (WATCH_CLIP, NOTHING_CLIPPED, {"gpt": 0.3, "mlp": 0.55}),
    (WATCH_CLIP, EVERY_STEP_CLIPPED, {"gpt": 0.6, "mlp": 0.6}),
    (BOTH, NOTHING_CLIPPED, {"gpt": 0.6, "mlp": 0.8}),
    (BOTH, EVERY_STEP_CLIPPED, {"gpt": 0.6, "mlp": 0.8}),
)
ALL_BELOW = 1.0  # with clip, TensorBoard and run folder, on every workload
MOST_CALLS, MOST_GROWTH, MOST_IMPORT_S, MOST_OUTSIDE = 12, 4 << 20, 0.1, 0.5


@dataclass
class Result:
    """The measurements of one setting.

    Attributes:
        setting: The setting that was measured.
        variants: All variants that were compared with the bare loop; without their models.
        flush_s: By sinks, the seconds to make 64 records and pass them on.
        turns: Turns of a precise variant in a round.
        steps: Timed steps in a turn.
        rounds: The measurements of each round.
        own_time: By variant, the seconds per step in its own calls, if it measures them.
        counts: By variant, what PyTorch does in one step; the bare loop is ``BARE, ""``.
    """

    setting: Setting
    variants: Sequence[Variant]
    flush_s: Mapping[tuple[str, ...], float]
    turns: int
    steps: int
    rounds: list[Round] = field(default_factory=list)
    own_time: dict[Key, Spread] = field(default_factory=dict)
    counts: dict[Key, Counts] = field(default_factory=dict)

    @property
    def bare_s(self) -> float:
        """Median seconds per step of the bare loop."""
        return statistics.median(seconds for each in self.rounds for seconds in each.bare)

    def variant(self, name: str, regime: str = "") -> Variant | None:
        """Returns a variant by its name, or None if this setting has none."""
        return next((each for each in self.variants if each.key == (name, regime)), None)

    def added(self, variant: Variant) -> list[float]:
        """Returns the seconds that a variant adds to a step, by round, including flushes."""
        shared = steps_per_flush(self.bare_s)
        flush_s = 0.0 if variant.sinks is None else self.flush_s.get(variant.sinks, 0.0) / shared
        return [each.added[variant.key] + flush_s for each in self.rounds]

    def ratios(self, variant: Variant) -> list[float]:
        """Returns what a variant adds divided by what ``clip_grad_norm_`` adds, by round.

        A variant that does not clip is compared with a clip that changes nothing.
        """
        clip = self.variant(CLIP, variant.regime or NOTHING_CLIPPED)
        return [] if clip is None else ratios(self.added(variant), self.added(clip))

    def ratio(self, variant: Variant) -> Spread:
        """Returns the same ratio over all rounds."""
        clip = self.variant(CLIP, variant.regime or NOTHING_CLIPPED)
        return spread([]) if clip is None else ratio(self.added(variant), self.added(clip))

    def share(self, variant: Variant) -> Spread:
        """Returns what a variant adds as a share of the bare step."""
        return spread(self.added(variant)).times(1 / self.bare_s)

    def count(self, variant: Variant) -> Counts | None:
        """Returns a variant's counts beyond those of the bare loop; None if not counted."""
        if variant.key not in self.counts:
            return None
        return self.counts[variant.key] - self.counts[BARE, ""]


@dataclass(frozen=True)
class Row:
    """A row of the table of targets, all text.

    Attributes:
        what: What is measured.
        limit: The target.
        measured: The measured value.
        verdict: ``reached``, ``not reached`` or ``not measured``.
    """

    what: str
    limit: str
    measured: str = "-"
    verdict: str = NOT_MEASURED


def verdict(value: float, limit: float) -> str:
    """Says whether a number is within its limit; NaN is not."""
    return "reached" if value <= limit else "not reached"


def target_rows(results: Sequence[Result], fixed: FixedCosts) -> list[Row]:
    """Makes all rows of the table of targets, from the settings measured so far."""
    by_setting = {result.setting: result for result in results}
    rows = [*_ratio_rows(by_setting), *_share_rows(by_setting), *_below_rows(by_setting)]
    return [*rows, *_count_rows(fixed), *_gpu_rows(results), *_other_rows(fixed)]


def _ratio_rows(results: Mapping[Setting, Result]) -> Iterator[Row]:
    for name, regime, limits in RATIOS:
        for workload, limit in limits.items():
            row = Row(f"`{name}` ÷ `clip_grad_norm_`, {regime}: {_title(workload)}", f"≤ {limit:g}")
            yield _ratio(row, results.get(Setting(workload)), (name, regime), limit)


def _below_rows(results: Mapping[Setting, Result]) -> Iterator[Row]:
    """Yields the worst setting of each workload, over optimizers and numbers of micro-batches."""
    for workload in WORKLOADS:
        row = Row(
            f"`{BOTH}` adds less than `clip_grad_norm_` alone: {_title(workload)}, worst setting",
            f"< {ALL_BELOW:g}",
        )
        mine = [result for setting, result in results.items() if setting.workload == workload]
        all_of_them = [(result, (BOTH, regime)) for result in mine for regime in MAX_NORMS]
        worst = max(all_of_them, key=lambda pair: _badness(*pair), default=None)
        yield row if worst is None else _ratio(row, *worst, ALL_BELOW)


def _badness(result: Result, key: Key) -> float:
    """Orders ratios; a ratio lost in the noise counts as the worst, so that it is shown."""
    variant = result.variant(*key)
    value = math.nan if variant is None else result.ratio(variant).middle
    return math.inf if math.isnan(value) else value


def _ratio(row: Row, result: Result | None, key: Key, limit: float) -> Row:
    variant = result.variant(*key) if result is not None else None
    if result is None or variant is None or not result.rounds:
        return row
    each, value = result.ratios(variant), result.ratio(variant)
    if math.isnan(value.middle):
        return Row(row.what, row.limit, "`clip_grad_norm_` was lost in the noise", NOT_MEASURED)
    held = sum(ratio <= limit for ratio in each)
    measured = f"{spread_text(value, '.2f')}, {held} of {len(each)} rounds"
    return Row(row.what, row.limit, measured, verdict(value.middle, limit))


def _share_rows(results: Mapping[Setting, Result]) -> Iterator[Row]:
    for workload, limit in SHARES.items():
        row = Row(f"`{WATCH}`, share of the bare step: {_title(workload)}", f"≤ {limit:.0%}")
        result = results.get(Setting(workload))
        variant = result.variant(WATCH) if result is not None else None
        if result is None or variant is None or not result.rounds:
            yield row
            continue
        value = result.share(variant)
        text = spread_text(value, ".1%")
        yield Row(row.what, row.limit, text, verdict(value.middle, limit))


def _count_rows(fixed: FixedCosts) -> Iterator[Row]:
    what = "ATen calls added to a step by `{}`, 10 / 10,000 tensors"
    limit = f"the same, ≤ {MOST_CALLS}"
    for name, (few, many) in (fixed.calls or {}).items():
        reached = few == many <= MOST_CALLS
        told = "reached" if reached else "not reached"
        yield Row(what.format(name), limit, f"{few} / {many}", told)
    if fixed.calls is None:
        yield Row("ATen calls added to a step, 10 / 10,000 tensors", limit)
    what = "host waits added to a step, an accelerator's path run on the CPU"
    if fixed.numbers is None:
        yield Row(what, "0")
    else:
        most = max(fixed.numbers.values())
        yield Row(what, "0", str(most), verdict(most, 0))


def _gpu_rows(results: Sequence[Result]) -> Iterator[Row]:
    """Yields the waits that were counted on a GPU, if one was used."""
    on_gpu = [result for result in results if any(c.kernels for c in result.counts.values())]
    keys = [(WATCH, ""), *((name, regime) for name in (WATCH_CLIP, BOTH) for regime in MAX_NORMS)]
    pairs = [(result, result.variant(*key)) for result in on_gpu for key in keys]
    counted = [result.count(variant) for result, variant in pairs if variant is not None]
    waits = [counts.waits for counts in counted if counts is not None]
    if waits:
        what = f"host waits added to a step on the GPU, {len(on_gpu)} setting(s), the most"
        yield Row(what, "0", str(max(waits)), verdict(max(waits), 0))


def _other_rows(fixed: FixedCosts) -> Iterator[Row]:
    what, limit = "memory over 100,000 steps", f"flat (less than {MOST_GROWTH >> 20} MB more)"
    if fixed.memory is None:
        yield Row(what, limit)
    else:
        grown, last = fixed.memory
        told = verdict(grown, MOST_GROWTH) if last >= 100_000 else NOT_MEASURED
        yield Row(what, limit, f"{grown / 2**20:+.1f} MB from step 10,000 to {last:,}", told)
    what, limit = "`import gradwatch` on top of `import torch`", f"≤ {MOST_IMPORT_S * 1e3:.0f} ms"
    if fixed.import_s is None:
        yield Row(what, limit)
    else:
        told = verdict(fixed.import_s, MOST_IMPORT_S)
        yield Row(what, limit, f"{fixed.import_s * 1e3:.0f} ms", told)
    what = f"share of `{WATCH}` outside of PyTorch's operators, 10,000 small tensors"
    limit = f"< {MOST_OUTSIDE:.0%}"
    if fixed.operators is None:
        yield Row(what, limit)
    else:
        outside = fixed.operators.outside
        yield Row(what, limit, spread_text(outside, ".0%"), verdict(outside.middle, MOST_OUTSIDE))


def _title(workload: str) -> str:
    return WORKLOADS[workload].title
