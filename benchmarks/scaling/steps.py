"""Measures the cost of keeping many steps: synthetic ones for the sinks, real ones for memory."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

import gradwatch
from benchmarks.memory import resident_bytes
from benchmarks.synthetic_run import BATCH_STEPS, batches
from gradwatch.record.folder.writer import RunFolder
from gradwatch_tensorboard import TensorBoardWriter

SINKS: Sequence[str] = ("run folder", "TensorBoard")


@dataclass(frozen=True)
class Reached:
    """The state after a number of steps.

    Attributes:
        steps: Number of steps so far.
        step_s: Seconds per step since the previous entry.
        memory: Growth of the resident memory in bytes, since after the first steps.
        disk: Bytes in the folder.
    """

    steps: int
    step_s: float
    memory: int
    disk: int


def marks(last: int, first: int = 1_000) -> list[int]:
    """Returns the steps to measure at: 1,000, 10,000 and so on, and the last one."""
    powers = [first * 10**i for i in range(9)]
    return [mark for mark in powers if mark < last] + [last]


def kept(sink: str, last: int, parameters: int) -> list[Reached]:
    """Writes a synthetic run to one of the ``SINKS``, and measures at some steps up to ``last``."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        writer = RunFolder(folder) if sink == "run folder" else TensorBoardWriter(folder)
        found, took, since, start = list[Reached](), 0.0, 0, 0
        open_marks = marks(last)
        for number, batch in enumerate(batches(last, parameters)):
            before = time.perf_counter()
            writer.write(batch)
            took += time.perf_counter() - before
            done = min(last, (number + 1) * BATCH_STEPS)
            start = start or resident_bytes()  # after the first batch, which opens the files
            if done >= open_marks[0]:
                grown = resident_bytes() - start
                found.append(Reached(done, took / (done - since), grown, _size(folder)))
                print(f"        {done:,} steps", flush=True)
                open_marks.pop(0)
                took, since = 0.0, done
        writer.close()
        return found


def watched_steps(last: int) -> list[Reached]:
    """Watches a tiny training, and measures time and memory at some steps up to ``last``."""
    x = torch.ones(2, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=0.0)
    found, start, since = list[Reached](), 0, 0
    with gradwatch.watch({"x": x}, optimizer, clip=1.0):
        for mark in marks(last):
            before = time.perf_counter()
            for _ in range(mark - since):
                x.sum().backward()
                optimizer.step()
                optimizer.zero_grad()
            step_s = (time.perf_counter() - before) / (mark - since)
            start = start or resident_bytes()
            found.append(Reached(mark, step_s, resident_bytes() - start, 0))
            print(f"        {mark:,} steps", flush=True)
            since = mark
    return found


def _apart(measure: Callable[..., list[Reached]], *arguments: object) -> list[Reached]:
    """Measures in a new process, whose memory nothing else has grown and freed before."""
    context = torch.multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(measure, *arguments).result()


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def all_steps(
    last: int, watched_last: int, parameters: int, say: Callable[[str], None]
) -> dict[str, list[Reached]]:
    """Measures the sinks up to step ``last``, and the watcher up to step ``watched_last``."""
    found = {}
    for sink in SINKS:
        say(f"{last:,} synthetic steps of {parameters} parameters into: {sink}")
        found[sink] = _apart(kept, sink, last, parameters)
    say(f"{watched_last:,} real steps")
    found["watch(clip=), a real loop"] = _apart(watched_steps, watched_last)
    return found
