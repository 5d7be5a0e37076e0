"""What gradwatch does on a real GPU, settled within eight minutes: torch and gradwatch are enough.

    python tests/gpu/check.py                     # all checks, and a JSON summary
    python tests/gpu/check.py --dry               # on a CPU that is treated like a device
    python tests/gpu/check.py --list              # what is checked
    python tests/gpu/check.py --only waits,kernels --json found.json --budget 300
    python tests/gpu/check.py --device mini --import tests.support.device    # on a stand-in

Each check prints a line: PASS, FAIL with what was wrong, ERROR if it broke off, or SKIP with the
reason. The exit code is 1 if a check failed or broke off. What may leave the device unusable runs in
a process of its own, after everything that is timed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib
import json
import logging
import os
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
MARK = "RESULT "  # begins the line with which a process of its own answers


class Result(NamedTuple):
    """What became of a check.

    Attributes:
        status: ``"PASS"``, ``"FAIL"``, ``"ERROR"`` or ``"SKIP"``.
        detail: What it found, or what was wrong.
        seconds: How long it took.
    """

    status: str
    detail: Any
    seconds: float = 0.0

    @property
    def bad(self) -> bool:
        """Whether something is wrong."""
        return self.status in ("FAIL", "ERROR")

    def line(self, name: str) -> str:
        """Returns the line that is printed."""
        text = self.detail if isinstance(self.detail, str) else json.dumps(self.detail, default=str)
        return f"{self.status:5} {name} [{self.seconds:.1f} s] {text[:1000]}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the checks; returns the exit code."""
    args = _parser().parse_args(arguments)
    importlib.import_module("tests.gpu.checks")  # registers them
    from tests.gpu.registry import CHECKS

    wanted = [name for name in args.only.split(",") if name] or list(CHECKS)
    if unknown := [name for name in wanted if name not in CHECKS]:
        print(f"no such check: {', '.join(unknown)}; --list names them", file=sys.stderr)
        return 2
    if args.list:
        for one in CHECKS.values():
            print(f"{one.name:24} {one.text}")
        return 0
    place = _place(args)
    if place is None:
        print("there is no such device here; --dry treats the CPU like one", file=sys.stderr)
        return 2
    # What the checks provoke is no news; logging prints it where nobody listens.
    logging.getLogger("gradwatch").addHandler(logging.NullHandler())
    if args.alone:
        print(MARK + json.dumps(run(wanted[0], place)[:2], default=str), flush=True)
        return 0
    return _run_all(wanted, place, args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dry", action="store_true", help="treat the CPU like a device")
    parser.add_argument("--device", default="cuda", help="the device to train on (default: cuda)")
    parser.add_argument("--import", dest="module", default="", metavar="MODULE",
                        help="a module that makes --device known, with a counting()")  # fmt: skip
    parser.add_argument("--only", default="", metavar="NAME,...", help="run these alone")
    parser.add_argument("--list", action="store_true", help="say what is checked")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found there")
    parser.add_argument("--budget", type=float, default=450.0, metavar="S",
                        help="start no check after so many seconds (default: 450)")  # fmt: skip
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    return parser


def _place(args: argparse.Namespace) -> Any:
    """Returns where to run; None if there is no such device."""
    import torch

    from tests.gpu.place import Place
    from tests.support.stand_ins import VARIABLE

    os.environ.setdefault(VARIABLE, args.device)
    module = importlib.import_module(args.module) if args.module else None
    if not args.dry and args.device == "cuda" and not torch.cuda.is_available():
        return None
    place = Place(torch.device("cpu" if args.dry else args.device), args.dry, module)
    if place.small:
        torch.set_num_threads(1)  # several on one busy core wait for each other
    return place


def run(name: str, place: Any) -> Result:
    """Runs one check in this process."""
    from tests.gpu.registry import CHECKS, Skipped

    if reason := CHECKS[name].skipped(place):
        return Result("SKIP", reason)
    start = time.perf_counter()

    def result(status: str, detail: Any) -> Result:
        return Result(status, detail, time.perf_counter() - start)

    try:
        return result("PASS", CHECKS[name].run(place))
    except Skipped as reason:
        return result("SKIP", str(reason))
    except AssertionError as error:
        return result("FAIL", str(error))
    except Exception:
        return result("ERROR", traceback.format_exc(limit=-4))


def run_alone(name: str, seconds: float, args: argparse.Namespace) -> Result:
    """Runs one check in a process of its own, for at most so many seconds."""
    command = [sys.executable, __file__, "--alone", "--only", name, "--device", args.device]
    command += ["--dry"] if args.dry else []
    command += ["--import", args.module] if args.module else []
    start = time.perf_counter()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return Result("ERROR", f"took more than {seconds:.0f} s", seconds)
    took = time.perf_counter() - start
    answers = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    end = f"its process ended with {done.returncode}: {done.stderr.strip()[-500:]}"
    if not answers:
        return Result("ERROR", end, took)
    status, detail = json.loads(answers[-1][len(MARK) :])
    if done.returncode and status == "PASS":
        return Result("FAIL", end, took)
    return Result(status, detail, took)


def _run_all(wanted: Sequence[str], place: Any, args: argparse.Namespace) -> int:
    import torch

    import gradwatch
    from tests.gpu.registry import CHECKS

    start = time.perf_counter()
    print(f"torch {torch.__version__} on {place}, gradwatch {gradwatch.__file__}", flush=True)
    results: dict[str, Result] = {}

    def one(name: str) -> None:
        spent, check = time.perf_counter() - start, CHECKS[name]
        if spent > args.budget:
            results[name] = Result("SKIP", "out of budget")
        elif check.is_alone(place) and not check.skipped(place):
            left = max(20.0, args.budget + 30 - spent)
            # Without a GPU nothing is short of time, and the machine may be busy.
            seconds = min(check.alone_s, left) if place.cuda else 600.0
            results[name] = run_alone(name, seconds, args)
        else:
            results[name] = run(name, place)
        print(results[name].line(name), flush=True)

    alone = [name for name in wanted if CHECKS[name].is_alone(place)]
    for name in wanted:
        if name not in alone:
            one(name)
    with concurrent.futures.ThreadPoolExecutor(5) as pool:
        list(pool.map(one, alone))
    took = round(time.perf_counter() - start, 1)
    counts = dict(Counter(result.status for result in results.values()))
    if args.json:
        summary = {
            "torch": torch.__version__,
            "device": str(place),
            "seconds": took,
            "counts": counts,
            "checks": {name: results[name]._asdict() for name in wanted},
        }
        args.json.write_text(json.dumps(summary, indent=1, default=str), encoding="utf-8")
    print(f"{counts} in {took} s", flush=True)
    return int(any(result.bad for result in results.values()))


if __name__ == "__main__":
    # In the checkout gradwatch need not be installed.
    sys.path[:1] = [str(ROOT), str(ROOT / "integrations")]
    sys.exit(main())
