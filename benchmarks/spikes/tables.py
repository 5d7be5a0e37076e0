"""The tables that are printed, in Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from benchmarks.page import table
from benchmarks.spikes import norm_sequences as norms
from benchmarks.spikes.measures import (
    false_clips,
    most_skips_in_a_row,
    steps_to_recover,
    steps_to_stop,
)
from benchmarks.spikes.training import AUTO, AUTO_SKIP, CLEAN, LEFT_OUT, RESCALED, SPIKES, Run, Task

Runs = dict[Task, Run]
NEVER = "never"
ALWAYS = "always"
TARGETS = ("target", "measured", "")


def show(runs: Runs) -> None:
    """Prints the tables of all runs."""
    first = next(iter(runs))
    print(f"\n{len(runs)} runs of {first.steps} steps. Spikes, from step {first.middle + 1} on:")
    for name, what in SPIKES.items():
        print(f"- {name}: {what}")
    for optimizer in dict.fromkeys(task.optimizer for task in runs):
        mine = {task: run for task, run in runs.items() if task.optimizer == optimizer}
        policies = list(dict.fromkeys(task.policy for task in mine))
        print(f"\n## {optimizer}\n\nHeld-out loss without spikes, and what spikes add to it\n")
        rows = [[p, _clean(mine, p), *(_excess(mine, p, s) for s in SPIKES)] for p in policies]
        print(table(["policy", CLEAN, *SPIKES], rows))
        print("\nSteps to recover (median; never in some seeds), and clips when nothing is wrong\n")
        names = ["burst", "early", "mislabelled"]
        rows = [
            [p, *(_recovery(mine, p, s) for s in names), _false(mine, p), _stop(mine, p)]
            for p in policies
        ]
        print(table(["policy", *names, "false clips", "acts after the rise for"], rows))
    print('\n## What was asked of clip="auto", in these runs\n')
    print(table(TARGETS, _model_targets(runs)))


def show_norms() -> None:
    """Prints what the policies do on sequences of norms, without training."""
    print("\n## Norms alone: lognormal, five seeds, the worst of them\n")
    _show_norms()
    print('\n## What was asked of clip="auto", on norms alone\n')
    print(table(TARGETS, _norm_targets()))


def pairs(runs: Runs, policy: str, scenario: str) -> list[tuple[Task, Run, Run]]:
    """Returns the runs of a policy in a scenario, each with the clean run of the same seed."""
    chosen = [task for task in runs if (task.policy, task.scenario) == (policy, scenario)]
    clean = {
        (t.optimizer, t.seed): r
        for t, r in runs.items()
        if (t.policy, t.scenario) == (policy, CLEAN)
    }
    return [(task, runs[task], clean[task.optimizer, task.seed]) for task in chosen]


def excesses(runs: Runs, policy: str, scenario: str) -> list[float]:
    """Returns the share by which each run's final loss is above that of its clean run."""
    return [run.final / clean.final - 1 for _, run, clean in pairs(runs, policy, scenario)]


def _clean(runs: Runs, policy: str) -> str:
    finals = [run.final for _, run, _ in pairs(runs, policy, CLEAN)]
    return f"{statistics.fmean(finals):.3f} ± {_deviation(finals):.3f}"


def _excess(runs: Runs, policy: str, scenario: str) -> str:
    chosen = [run for _, run, _ in pairs(runs, policy, scenario)]
    if not chosen:
        return "as fixed 1.0"
    lost = sum(run.lost for run in chosen)
    if lost:
        return f"**lost, {lost}/{len(chosen)}**"
    shares = excesses(runs, policy, scenario)
    mean = round(statistics.fmean(shares), 3) + 0.0  # no "-0.0%"
    return f"{mean:+.1%} ± {_deviation(shares):.1%}"


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else math.nan


def _recovery(runs: Runs, policy: str, scenario: str) -> str:
    return _median(
        [
            steps_to_recover(run.curve, clean.curve, task.spiked[-1])
            for task, run, clean in pairs(runs, policy, scenario)
        ]
    )


def _median(found: Sequence[float]) -> str:
    if any(map(math.isnan, found)):
        return ALWAYS
    if not found:
        return ""
    never, middle = sum(map(math.isinf, found)), statistics.median(found)
    text = NEVER if math.isinf(middle) else f"{middle:.0f}"
    return text + (f" ({NEVER} {never}/{len(found)})" if 0 < never < len(found) else "")


def _false(runs: Runs, policy: str) -> str:
    scenarios = [CLEAN, *(s for s in SPIKES if s != "rise")]
    steps = [
        clipped
        for scenario in scenarios
        for task, run, _ in pairs(runs, policy, scenario)
        if not run.lost
        for clipped in false_clips(task, run)
    ]
    return f"{statistics.fmean(steps):.1%}" if steps else ""


def _stop(runs: Runs, policy: str) -> str:
    return _median(
        [steps_to_stop(run.acted(), task.middle) for task, run, _ in pairs(runs, policy, "rise")]
    )


def _show_norms() -> None:
    spreads, rises = [f"cv {s}" for s in norms.SPREADS], [f"rise x{r:g}" for r in norms.RISES]
    rows = []
    for name, make in norms.POLICIES.items():
        false = [f"{norms.false_clip_rate(make, spread):.1%}" for spread in norms.SPREADS]
        stops = [_median([norms.stop_after_rise(make, rise)]) for rise in norms.RISES]
        rows.append([name, *false, f"x{norms.spike_passes_as(make):.2f}", *stops])
    titles = ["policy", *(f"false clips, {s}" for s in spreads), "x10 passes as", *rises]
    print(table(titles, rows))


def _row(what: str, value: str, met: bool) -> list[str]:
    return [what, value, "met" if met else "**missed**"]


def _norm_targets() -> list[list[str]]:
    make = norms.POLICIES[AUTO]
    false = [norms.false_clip_rate(make, spread) for spread in norms.SPREADS]
    stops = [norms.stop_after_rise(make, rise) for rise in norms.RISES]
    scales = [norms.changed_by_scale(make, scale) for scale in (100.0, 1e-6)]
    changed = norms.changed_by_nan(make)
    return [
        _row("false clips under 3 %", f"{max(false):.2%}", max(false) < 0.03),
        _row("stops within 50 steps of a rise", f"{max(stops):.0f}", max(stops) <= 50),
        _row(
            "x100, x1e-6 change no decision",
            " and ".join(map(str, scales)) + " changed",
            not any(scales),
        ),
        _row("one NaN changes no later factor", f"{changed} changed", not changed),
    ]


def _model_targets(runs: Runs) -> list[list[str]]:
    rows = []
    if early := excesses(runs, AUTO, "early"):
        means = {
            optimizer: statistics.fmean(
                excesses({t: r for t, r in runs.items() if t.optimizer == optimizer}, AUTO, "early")
            )
            for optimizer in dict.fromkeys(t.optimizer for t, _, _ in pairs(runs, AUTO, "early"))
        }
        value = ", ".join(f"{name} {mean:+.2%}" for name, mean in means.items())
        value += f"; worst run {max(early):+.2%}"
        rows.append(_row("x100 at step 10 costs under 1 %", value, max(means.values()) < 0.01))
    if rise := pairs(runs, AUTO, "rise"):
        stop = [steps_to_stop(run.acted(), task.middle) for task, run, _ in rise]
        value = f"median {statistics.median(stop):.0f}, worst {max(stop):.0f}"
        rows.append(_row("stops within 50 steps of a rise", value, max(stop) <= 50))
    for name in RESCALED:
        compared = _decisions(pairs(runs, AUTO, name))
        if compared:
            rows.append(_changed(f"{name} changes no decision", compared))
    poisoned = [(runs[_twin(t, LEFT_OUT)], r) for t, r, _ in pairs(runs, AUTO, "NaN")]
    if poisoned:
        same = sum(a.final == b.final for a, b in poisoned)
        value = f"{same}/{len(poisoned)} equal"
        rows.append(
            _row(
                "a NaN is as if its batch had not been, to the last bit",
                value,
                same == len(poisoned),
            )
        )
    if skipping := pairs(runs, AUTO_SKIP, "rise"):
        most = [most_skips_in_a_row(run) for _, run, _ in skipping]
        rows.append(
            ["skips in a row after a rise (skip_spikes)", f"{min(most)} to {max(most)}", ""]
        )
    return rows


def _decisions(found: Sequence[tuple[Task, Run, Run]]) -> list[tuple[bool, bool]]:
    return [
        pair for _, run, clean in found for pair in zip(run.clipped, clean.clipped, strict=True)
    ]


def _changed(what: str, compared: Sequence[tuple[bool, bool]]) -> list[str]:
    changed = sum(a != b for a, b in compared)
    return _row(what, f"{changed} of {len(compared):,} changed", not changed)


def _twin(task: Task, scenario: str) -> Task:
    return Task(task.policy, scenario, task.optimizer, task.seed, task.steps)
