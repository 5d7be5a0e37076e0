"""Measures what gradwatch and others add to a training step, side by side, and writes RESULTS.md.

    python -m benchmarks.overhead              # the full page of results, 25 minutes
    python -m benchmarks.overhead --quick      # a minute or two; only shows that everything runs

Other tools are measured if they are installed: `pip install 'gradwatch[bench]'`. Run it on a
machine that does nothing else.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from benchmarks.overhead.counts import count_variant
from benchmarks.overhead.fixed_costs import measure_fixed_costs
from benchmarks.overhead.other_tools import missing, peer_variants
from benchmarks.overhead.report import Report
from benchmarks.overhead.results import Result
from benchmarks.overhead.timing import (
    OWN_TIME_STEPS,
    TIMERS,
    InterleavedTiming,
    flush_seconds,
    no_flush_by_clock,
    own_time,
)
from benchmarks.overhead.variants import (
    Variant,
    bare,
    clip_variants,
    floor_variants,
    gradwatch_variants,
)
from benchmarks.overhead.workloads import WORKLOADS, Setting, Training
from benchmarks.page import machine_rows, say

OUT = Path(__file__).parents[1] / "RESULTS.md"
STEPS = {1: 4, 8: 1}  # timed steps of a turn, by micro-batches
FLUSHES = {False: 64, True: 3}  # by quick
QUICK_NOTE = "**This was a quick run, which only shows that everything runs.**"
CUDA_NOTE = (
    "Measured on the CPU: counts for 10 and 10,000 tensors, memory, import, and the share outside "
    "PyTorch's operators."
)
SINKS: tuple[tuple[str, ...], ...] = ((), ("tensorboard",), ("folder",), ("tensorboard", "folder"))


class Plan:
    """Divides the time among the settings by their weights.

    On a machine that is too slow, every setting still gets one turn in every round, until one and a
    half times the planned time has passed. The page names the settings that were left out.
    """

    def __init__(self, settings: Sequence[Setting], seconds: float) -> None:
        """Starts the clock."""
        self._settings = list(settings)
        self._seconds, self._end = seconds, time.perf_counter() + seconds

    @property
    def left_s(self) -> float:
        """Seconds left of the planned time."""
        return max(0.0, self._end - time.perf_counter())

    @property
    def over(self) -> bool:
        """Whether it is too late to begin another setting."""
        return time.perf_counter() > self._end + self._seconds / 2

    def share(self, setting: Setting) -> float:
        """Returns the seconds for a setting: its share of the time left, by weight."""
        weights = [_weight(s) for s in self._settings[self._settings.index(setting) :]]
        return self.left_s * weights[0] / sum(weights)


def _weight(setting: Setting) -> float:
    accumulated = 0.75 if setting.accumulate > 1 else 1.0
    return WORKLOADS[setting.workload].weight * (0.5 if setting.fused else 1.0) * accumulated


def settings_of(args: argparse.Namespace) -> list[Setting]:
    """Returns the requested settings, those with a target first."""
    fused = {"unfused": [False], "fused": [True], "both": [False, True]}[args.optimizer]
    choices = itertools.product(args.accumulate, fused, args.workload)
    return [Setting(workload, kind, number) for number, kind, workload in choices]


def measure(setting: Setting, args: argparse.Namespace, plan: Plan, report: Report) -> None:
    """Measures one setting, and adds it to the report."""
    began, share = time.perf_counter(), plan.share(setting)
    training = Training.of(setting, args.device)
    names = tuple(name for name, _ in training.model.named_parameters())
    flush_s = {sinks: flush_seconds(names, sinks, FLUSHES[args.quick]) for sinks in SINKS}
    timer = TIMERS["cuda" if args.device == "cuda" else args.clock]
    steps = STEPS.get(setting.accumulate, 1)
    with all_variants(training, report.failed) as (base, variants), no_flush_by_clock():
        timing = InterleavedTiming(base, variants, timer, steps)
        timing.rehearse()
        gc.collect()
        gc.freeze()  # keeps the collector from scanning imported packages during a turn
        spare = share - (time.perf_counter() - began)
        number = timing.fitting(spare / args.rounds)
        labels = [variant.label() for variant in variants]
        result = Result(setting, labels, flush_s, number, steps)
        each_s = timing.round_seconds(number)
        say(f"{setting.title}, {plan.left_s / 60:.0f} minutes left")
        say(f"  {args.rounds} rounds of {each_s:.0f} s, with {number} turn(s) each")
        for count in range(1, args.rounds + 1):
            result.rounds.append(timing.measure_round(number))
            say(f"  round {count} of {args.rounds}; bare step {result.bare_s * 1e3:.1f} ms")
        own_steps = max(4, OWN_TIME_STEPS // setting.accumulate)
        result.own_time = {v.key: own_time(v, own_steps) for v in variants if v.precise}
        result.counts = {v.key: count_variant(v, args.device) for v in (base, *variants)}
    report.results.append(result)
    report.write()
    gc.unfreeze()


@contextmanager
def all_variants(
    training: Training, failed: dict[str, str]
) -> Iterator[tuple[Variant, list[Variant]]]:
    """Yields the bare loop and all variants that are compared with it."""
    with peer_variants(training, failed) as peers:
        others = [*clip_variants(training), *peers, *floor_variants(training)]
        yield bare(training), [*others, *gradwatch_variants(training)]


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overhead",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    choose = parser.add_argument
    choose("--workload", nargs="+", choices=[*WORKLOADS], help="default: all")
    choose("--optimizer", choices=["unfused", "fused", "both"], help="kind of AdamW; default: both")
    choose("--accumulate", nargs="+", type=int, help="micro-batches per step; default: 1 8")
    choose("--rounds", type=int, help="default: 5")
    choose("--minutes", type=float, help="how long to measure; default: 25")
    choose("--quick", action="store_true", help="unfused, one micro-batch, 3 rounds, 2 minutes")
    choose("--threads", type=int, default=torch.get_num_threads(), help="threads of PyTorch")
    choose(
        "--clock", choices=["wall", "cpu"], default="wall", help="cpu is steadier on a busy machine"
    )
    choose("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: timed on the GPU")
    choose("--out", type=Path, default=OUT, help="the page; default: benchmarks/RESULTS.md")
    args = parser.parse_args(argv)
    usual: Mapping[str, object] = {
        "workload": [*WORKLOADS],
        "optimizer": "unfused" if args.quick else "both",
        "accumulate": [1] if args.quick else [1, 8],
        "rounds": 3 if args.quick else 5,
        "minutes": 2.0 if args.quick else 25.0,
    }
    for name, value in usual.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    _check(parser, args)
    return args


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for name in ("rounds", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}.")
    if min(args.accumulate) < 1:
        parser.error(f"--accumulate must be at least 1, got {min(args.accumulate)}.")
    if not args.minutes > 0:
        parser.error(f"--minutes must be more than 0, got {args.minutes:g}.")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error(
            "--device cuda needs a GPU that PyTorch can use, and torch.cuda.is_available() is "
            f"False (torch {torch.__version__}). Leave it out to measure on the CPU."
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Measures all settings and writes the page after each."""
    args = parse_arguments(argv)
    torch.set_num_threads(args.threads)
    settings, absent = settings_of(args), missing()
    machine = machine_rows(
        args.device, args.threads, "GPU" if args.device == "cuda" else args.clock
    )
    notes = [QUICK_NOTE] * args.quick + [CUDA_NOTE] * (args.device == "cuda")
    report = Report(args.out, machine, absent, settings, notes)
    say(f"{len(settings)} settings, about {args.minutes:g} minutes, into {args.out.name}")
    for package, reason in absent.items():
        say(f"{package} is missing, and the page will say so: {reason}")
    plan = Plan(settings, args.minutes * 60)
    report.fixed = measure_fixed_costs(say, quick=args.quick)
    report.write()
    for setting in settings:
        if plan.over:
            say("out of time: this machine is too slow or too busy to measure all settings")
            break
        measure(setting, args, plan, report)
    say(f"done: {args.out.name}")


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):  # the page has what was measured
        main()
