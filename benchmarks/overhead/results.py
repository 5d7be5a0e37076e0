"""Targets: the numbers that gradwatch is to reach, beside those that were measured."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from _overhead_once import Once
from _overhead_spread import Spread
from _overhead_ways import BOTH, LIMITS, WATCH, WATCH_CLIP
from _overhead_workloads import WORKLOADS, Setting

from _overhead_results import Result

UNTOUCHED, CLIPPED = LIMITS
NOT_MEASURED = "not measured"

SHARES = {"gpt": 0.01, "mlp": 0.05}
RATIOS: Sequence[tuple[str, str, Mapping[str, float]]] = (
    (WATCH_CLIP, UNTOUCHED, {"gpt": 0.3, "mlp": 0.55}),
    (WATCH_CLIP, CLIPPED, {"gpt": 0.6, "mlp": 0.6}),
    (BOTH, UNTOUCHED, {"gpt": 0.6, "mlp": 0.8}),
    (BOTH, CLIPPED, {"gpt": 0.6, "mlp": 0.8}),
)
ALL_BELOW = 1.0  # with clip, TensorBoard and run folder, on every workload
MOST_CALLS, MOST_GROWTH, MOST_IMPORT_S, MOST_OUTSIDE = 12, 4 << 20, 0.1, 0.5


@dataclass(frozen=True)
class Row:
    """A row of the table of targets, all text.

    Attributes:
        what: The number.
        limit: What it is to be.
        measured: What it is.
        verdict: ``reached``, ``not reached`` or ``not measured``.
    """

    what: str
    limit: str
    measured: str = "-"
    verdict: str = NOT_MEASURED


def verdict(value: float, limit: float) -> str:
    """Says whether a number is small enough; it is not if it is NaN."""
    return "reached" if value <= limit else "not reached"


def target_rows(results: Sequence[Result], once: Once) -> list[Row]:
    """Makes the whole table.

    Args:
        results: The settings that are measured so far.
        once: What was measured once.
    """
    by_setting = {result.setting: result for result in results}
    rows = [*_ratio_rows(by_setting), *_share_rows(by_setting), *_below_rows(by_setting)]
    return [*rows, *_count_rows(once), *_gpu_rows(results), *_other_rows(once)]


def _ratio_rows(results: Mapping[Setting, Result]) -> Iterator[Row]:
    for name, regime, limits in RATIOS:
        for workload, limit in limits.items():
            row = Row(f"`{name}` ÷ `clip_grad_norm_`, {regime}: {_title(workload)}", f"≤ {limit:g}")
            yield _ratio(row, results.get(Setting(workload)), (name, regime), limit)


def _below_rows(results: Mapping[Setting, Result]) -> Iterator[Row]:
    """The worst of a workload's settings: every optimizer, every number of micro-batches."""
    for workload in WORKLOADS:
        row = Row(
            f"`{BOTH}` adds less than `clip_grad_norm_` alone: {_title(workload)}, worst setting",
            f"< {ALL_BELOW:g}",
        )
        mine = [result for setting, result in results.items() if setting.workload == workload]
        all_of_them = [(result, (BOTH, regime)) for result in mine for regime in LIMITS]
        worst = max(all_of_them, key=lambda pair: _badness(*pair), default=None)
        yield row if worst is None else _ratio(row, *worst, ALL_BELOW)


def _badness(result: Result, key: tuple[str, str]) -> float:
    """Orders ratios; one that the noise has swallowed is told rather than hidden."""
    way = result.way(*key)
    value = math.nan if way is None else result.ratio(way).middle
    return math.inf if math.isnan(value) else value


def _ratio(row: Row, result: Result | None, key: tuple[str, str], limit: float) -> Row:
    way = result.way(*key) if result is not None else None
    if result is None or way is None or not result.rounds:
        return row
    each, value = result.ratios(way), result.ratio(way)
    if math.isnan(value.middle):
        return Row(row.what, row.limit, "`clip_grad_norm_` was lost in the noise", NOT_MEASURED)
    held = sum(ratio <= limit for ratio in each)
    measured = f"{spread_text(value, '.2f')}, {held} of {len(each)} rounds"
    return Row(row.what, row.limit, measured, verdict(value.middle, limit))


def _share_rows(results: Mapping[Setting, Result]) -> Iterator[Row]:
    for workload, limit in SHARES.items():
        row = Row(f"`{WATCH}`, share of the bare step: {_title(workload)}", f"≤ {limit:.0%}")
        result = results.get(Setting(workload))
        way = result.way(WATCH) if result is not None else None
        if result is None or way is None or not result.rounds:
            yield row
            continue
        value = result.share(way)
        text = spread_text(value, ".1%")
        yield Row(row.what, row.limit, text, verdict(value.middle, limit))


def _count_rows(once: Once) -> Iterator[Row]:
    what = "ATen calls added to a step by `{}`, 10 / 10,000 tensors"
    limit = f"the same, ≤ {MOST_CALLS}"
    for name, (few, many) in (once.calls or {}).items():
        reached = few == many <= MOST_CALLS
        told = "reached" if reached else "not reached"
        yield Row(what.format(name), limit, f"{few} / {many}", told)
    if once.calls is None:
        yield Row("ATen calls added to a step, 10 / 10,000 tensors", limit)
    what = "host waits added to a step, an accelerator's path run on the CPU"
    if once.numbers is None:
        yield Row(what, "0")
    else:
        most = max(once.numbers.values())
        yield Row(what, "0", str(most), verdict(most, 0))


def _gpu_rows(results: Sequence[Result]) -> Iterator[Row]:
    """Waits that were counted on a GPU; nothing where there was none."""
    on_gpu = [result for result in results if any(c.kernels for c in result.counts.values())]
    keys = [(WATCH, ""), *((name, regime) for name in (WATCH_CLIP, BOTH) for regime in LIMITS)]
    ways = [(result, result.way(*key)) for result in on_gpu for key in keys]
    counted = [result.count(way) for result, way in ways if way is not None]
    waits = [counts.waits for counts in counted if counts is not None]
    if waits:
        what = f"host waits added to a step on the GPU, {len(on_gpu)} setting(s), the most"
        yield Row(what, "0", str(max(waits)), verdict(max(waits), 0))


def _other_rows(once: Once) -> Iterator[Row]:
    what, limit = "memory over 100,000 steps", f"flat (less than {MOST_GROWTH >> 20} MB more)"
    if once.memory is None:
        yield Row(what, limit)
    else:
        grown, last = once.memory
        told = verdict(grown, MOST_GROWTH) if last >= 100_000 else NOT_MEASURED
        yield Row(what, limit, f"{grown / 2**20:+.1f} MB from step 10,000 to {last:,}", told)
    what, limit = "`import gradwatch` on top of `import torch`", f"≤ {MOST_IMPORT_S * 1e3:.0f} ms"
    if once.import_s is None:
        yield Row(what, limit)
    else:
        told = verdict(once.import_s, MOST_IMPORT_S)
        yield Row(what, limit, f"{once.import_s * 1e3:.0f} ms", told)
    what = f"share of `{WATCH}` outside of PyTorch's operators, 10,000 small tensors"
    limit = f"< {MOST_OUTSIDE:.0%}"
    if once.outside is None:
        yield Row(what, limit)
    else:
        share = once.outside.share
        yield Row(what, limit, spread_text(share, ".0%"), verdict(share.middle, MOST_OUTSIDE))


def spread_text(value: Spread, form: str) -> str:
    """Writes a median, and the quartiles in brackets.

    Args:
        value: The numbers; NaN is written as a dash.
        form: How to format each.
    """
    if math.isnan(value.middle):
        return "-"
    return f"{value.middle:{form}} ({value.low:{form}} to {value.high:{form}})"


def _title(workload: str) -> str:
    return WORKLOADS[workload].title
