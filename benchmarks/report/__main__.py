"""Measures how often the report is wrong: false alarms on healthy trainings, hits on sick ones.

    OMP_NUM_THREADS=1 python -m benchmarks.report --seeds 100 101 102

Thresholds were tuned on seeds 0 to 2; ``docs/report.md`` shows results on other seeds.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence

import torch

from benchmarks.report.trainings import HEALTHY, MORE_HEALTHY, SICK, STATISTICS
from gradwatch import History
from gradwatch.report import Report


def main() -> None:
    """Runs the trainings, and prints the tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[100])
    parser.add_argument("--only", default="", help="runs with this in their name")
    parser.add_argument("--show", action="store_true", help="print each report")
    parser.add_argument("--bare", action="store_true", help="watch without extra statistics")
    parser.add_argument("--more", action="store_true", help="only the second set of healthy runs")
    options = parser.parse_args()
    if options.bare:
        STATISTICS.clear()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sound = MORE_HEALTHY if options.more else HEALTHY
    healthy = {n: run for n, run in sound.items() if options.only in n}
    sick = {n: run for n, run in SICK.items() if options.only in n}
    alarms = {n: _reports(run, options.seeds, options.show, n) for n, run in healthy.items()}
    _print_healthy(alarms)
    if options.more:
        return
    found = {n: _reports(run, options.seeds, options.show, n) for n, (run, _) in sick.items()}
    _print_sick(found)


def _reports(
    run: Callable[[], History], seeds: Sequence[int], show: bool, name: str
) -> list[Report]:
    reports = []
    for seed in seeds:
        torch.manual_seed(seed)
        start = time.perf_counter()
        reports.append(run().report())
        if show:
            print(f"\n### {name}, seed {seed}, {time.perf_counter() - start:.1f} s\n{reports[-1]}")
    return reports


def _print_healthy(found: dict[str, list[Report]]) -> None:
    print("\n| healthy training | false alarms |\n|---|---|")
    for name, reports in found.items():
        print(f"| {name} | {_kinds(reports) or 'none'} |")
    runs = sum(map(len, found.values()))
    wrong = [report for reports in found.values() for report in reports if report]
    print(f"\n{len(wrong)} of {runs} healthy runs with a finding; by kind: {_kinds(wrong)}")


def _print_sick(found: dict[str, list[Report]]) -> None:
    print("\n| sick training | should be found | hits | first | also said |\n|---|---|---|---|---|")
    total = 0
    for name, reports in found.items():
        wanted = SICK[name][1]
        hits = sum(bool(wanted & set(report.kinds)) for report in reports)
        first = sum(report.kinds[:1] != () and report.kinds[0] in wanted for report in reports)
        total += hits
        also = _kinds(reports, wanted)
        row = (name, " or ".join(sorted(wanted)), f"{hits}/{len(reports)}", str(first), also)
        print("| " + " | ".join(row) + " |")
    print(f"\n{total} of {sum(map(len, found.values()))} sick runs found")


def _kinds(reports: Sequence[Report], without: set[str] = frozenset()) -> str:  # type: ignore[assignment]
    counts = Counter(kind for report in reports for kind in report.kinds if kind not in without)
    return ", ".join(f"{kind} {count}/{len(reports)}" for kind, count in counts.most_common())


if __name__ == "__main__":
    main()
