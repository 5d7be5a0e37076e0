"""Run folder: what a long run takes on the disk and in the training, and how fast it is read.

    python benchmarks/run_folder.py --steps 1000000 --parameters 300

The steps are made up: norms that wander, as float32, clipped now and then. Prints one table.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from gradwatch.record.folder.writer import RunFolder
from gradwatch.record.records import Layout, RecordBatch, StepRecord, clipped_by

DELIVERY = 64


def batches(steps: int, parameters: int) -> Iterator[RecordBatch]:
    """Makes up a run, delivery by delivery."""
    names = tuple(f"encoder.layers.{i // 12}.block_{i % 12}.weight" for i in range(parameters))
    layout = Layout(names, tuple(name.rpartition(".")[0] for name in names))
    rng = np.random.default_rng(0)
    level = np.zeros(parameters)
    for first in range(1, steps + 1, DELIVERY):
        count = min(DELIVERY, steps + 1 - first)
        level += rng.normal(0, 0.05, parameters)
        level *= 0.999
        norms = np.exp(level + rng.normal(0, 0.2, (count, parameters))).astype(np.float32)
        records = [_record(step, row) for step, row in enumerate(norms, first)]
        coefficients = np.array([[record.clip_coef] for record in records])
        yield RecordBatch(layout, records, norms, clipped_by(norms, coefficients))


def _record(step: int, row: np.ndarray) -> StepRecord:
    total = float(np.linalg.norm(row))
    coefficient = min(1.0, 20 / total)
    return StepRecord(
        step=step,
        optimizer="AdamW",
        time_s=step * 0.0197 + total * 1e-4,
        grad_norm=total,
        grad_norm_clipped=coefficient * total,
        clip_coef=coefficient,
        clip_threshold=20.0,
        clipped=coefficient < 1,
        loss=total / 7,
        lr=1e-3,
        global_step=step,
    )


def write(folder: Path, steps: int, parameters: int) -> dict[str, str]:
    """Writes a run, and measures each delivery."""
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
    per_step = np.array(took) / DELIVERY * 1e6
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
        "peak memory of the writer": f"{_peak_mb():.0f} MB",
    }


def read(folder: Path, what: str, steps: int) -> None:
    """Reads in a process of its own, for its time and its memory."""
    import pandas as pd
    import pyarrow.parquet  # noqa: F401

    from gradwatch.history import load

    pd.Series(["a"])
    queries: dict[str, Callable[[], object]] = {
        "nothing": lambda: None,
        "load().steps()": lambda: load(folder).steps(),
        "load().steps(['grad_norm'])": lambda: load(folder).steps(["grad_norm"]),
        "one parameter's curve": lambda: load(folder).parameters(load(folder).names[7]),
        "one parameter, grad_norm only": lambda: load(folder).parameters(
            load(folder).names[7], columns=["grad_norm"]
        ),
        "100 steps, all parameters": lambda: load(folder).parameters(
            start=steps // 2, stop=steps // 2 + 100
        ),
        "tail: the newest 100 steps": lambda: load(folder).steps(start=steps - 99),
        "clip_rate() and advice()": lambda: (load(folder).clip_rate(), load(folder).advice()),
    }
    before = time.perf_counter()
    result = queries[what]()
    took = time.perf_counter() - before
    rows = len(result) if isinstance(result, pd.DataFrame) else 0
    print(f"{took:.2f} s, {rows:,} rows, peak memory {_peak_mb():.0f} MB")


QUERIES = (
    "nothing",
    "load().steps()",
    "load().steps(['grad_norm'])",
    "one parameter's curve",
    "one parameter, grad_norm only",
    "100 steps, all parameters",
    "tail: the newest 100 steps",
    "clip_rate() and advice()",
)


def main() -> None:
    """Writes, reads, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--parameters", type=int, default=300)
    parser.add_argument("--folder", type=Path, help="kept; a temporary one if left out")
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
    command = [
        sys.executable,
        __file__,
        "--folder",
        str(folder),
        "--steps",
        str(steps),
        "--read",
        query,
    ]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def _peak_mb() -> float:
    # Not ru_maxrss: that of a child begins with the parent's.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


if __name__ == "__main__":
    main()
