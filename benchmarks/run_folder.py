"""Measures the run folder of a long run: disk space, time to write, and time to read.

    python -m benchmarks.run_folder --steps 1000000 --parameters 300

The run is synthetic: float32 norms that follow a random walk and are clipped now and then. Prints
one table.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.memory import peak_resident_bytes
from benchmarks.synthetic_run import BATCH_STEPS, batches
from gradwatch.record.folder.writer import RunFolder


def write(folder: Path, steps: int, parameters: int) -> dict[str, str]:
    """Writes a synthetic run, and times each batch."""
    sink, took = RunFolder(folder), []
    for batch in batches(steps, parameters):
        before = time.perf_counter()
        sink.write(batch)
        took.append(time.perf_counter() - before)
    before = time.perf_counter()
    most = max(len(list((folder / name).iterdir())) for name in ("steps", "parameters"))
    sink.close()
    closing = time.perf_counter() - before
    size = {
        name: sum(f.stat().st_size for f in (folder / name).iterdir())
        for name in ("steps", "parameters")
    }
    files = {name: len(list((folder / name).iterdir())) for name in size}
    per_step = np.array(took) / BATCH_STEPS * 1e6
    return {
        "steps/": f"{size['steps'] / 1e6:,.1f} MB in {files['steps']} files",
        "parameters/": f"{size['parameters'] / 1e6:,.1f} MB in {files['parameters']} files",
        "bytes per step and parameter": f"{size['parameters'] / steps / parameters:.2f}",
        "files per table before the close, at most": f"{most}",
        "write, median per step": f"{np.median(per_step):.0f} us",
        "write, mean per step (merges included)": f"{per_step.mean():.0f} us",
        "write, 99th percentile of a delivery": f"{np.percentile(took, 99) * 1e3:.0f} ms",
        "write, longest delivery (a merge)": f"{max(took) * 1e3:.0f} ms",
        "close": f"{closing:.2f} s",
        "peak memory of the writer": f"{peak_resident_bytes() / 2**20:.0f} MB",
    }


Load = Callable[[], Any]  # returns the History of the run
QUERIES: dict[str, Callable[[Load, int], object]] = {
    "nothing": lambda load, steps: None,
    "load().steps()": lambda load, steps: load().steps(),
    "load().steps(['grad_norm'])": lambda load, steps: load().steps(["grad_norm"]),
    "one parameter's curve": lambda load, steps: load().parameters(load().names[7]),
    "one parameter, grad_norm only": lambda load, steps: load().parameters(
        load().names[7], columns=["grad_norm"]
    ),
    "100 steps, all parameters": lambda load, steps: load().parameters(
        start=steps // 2, stop=steps // 2 + 100
    ),
    "tail: the newest 100 steps": lambda load, steps: load().steps(start=steps - 99),
    "clip_rate() and advice()": lambda load, steps: (load().clip_rate(), load().advice()),
}


def read(folder: Path, query: str, steps: int) -> None:
    """Runs one query, and prints its time and peak memory; call it in a process of its own."""
    import pandas as pd
    import pyarrow.parquet  # noqa: F401

    from gradwatch.history import load

    pd.Series(["a"])  # the first Series of strings loads more of pandas and pyarrow
    before = time.perf_counter()
    result = QUERIES[query](partial(load, folder), steps)
    took = time.perf_counter() - before
    rows = len(result) if isinstance(result, pd.DataFrame) else 0
    print(f"{took:.2f} s, {rows:,} rows, peak memory {peak_resident_bytes() / 2**20:.0f} MB")


def main() -> None:
    """Writes and reads a run, and prints the measurements."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run_folder", description=__doc__)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--parameters", type=int, default=300)
    parser.add_argument("--folder", type=Path, help="where to keep the run; default: not kept")
    parser.add_argument("--read", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read:
        read(arguments.folder, arguments.read, arguments.steps)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary) / "run"
        for name, value in write(folder, arguments.steps, arguments.parameters).items():
            print(f"| {name} | {value} |", flush=True)
        for query in QUERIES:
            print(f"| {query} | {_reading(folder, query, arguments.steps)} |", flush=True)


def _reading(folder: Path, query: str, steps: int) -> str:
    command = [sys.executable, "-m", "benchmarks.run_folder", "--folder", str(folder)]
    command += ["--steps", str(steps), "--read", query]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
