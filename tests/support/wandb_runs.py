"""Runs of W&B without a server: makes them, reads their file, and says what W&B keeps of a log."""

from __future__ import annotations

import contextlib
import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import wandb
from wandb.proto import wandb_internal_pb2

BLOCK = 32_768
HEADER = 7
DEADLINE_S = 60.0
OWN = ("_timestamp", "_runtime")
"""What W&B adds to each row, besides `_step`."""


def start(folder: Path, **settings: Any) -> wandb.Run:
    """Start a run that writes a file and nothing else."""
    quiet = {"console": "off", "silent": True, "x_disable_stats": True, "x_disable_meta": True}
    settings = {"mode": "offline", **quiet, "x_save_requirements": False, **settings}
    return wandb.init(project="tests", dir=folder, settings=wandb.Settings(**settings))


@contextlib.contextmanager
def run_in(folder: Path, **settings: Any) -> Iterator[wandb.Run]:
    """Start a run, and finish it at the end of the block."""
    run = start(folder, **settings)
    try:
        yield run
    finally:
        run.finish()


def file_of(folder: Path) -> Path:
    """Return the file of the newest run in a folder."""
    return max(folder.glob("wandb/*run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)


def records(path: Path) -> list[Any]:
    """Read the file of a run that has ended, once it is complete; it may be behind `finish()`."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        found = list(_records(path.read_bytes()))
        if any(one.WhichOneof("record_type") == "exit" for one in found):
            return found
        assert time.monotonic() < deadline, f"{path} holds no exit record"
        time.sleep(0.02)


def rows(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of the newest run in a folder, with `_step`."""
    return [
        _row(one.history)
        for one in records(file_of(folder))
        if one.WhichOneof("record_type") == "history"
    ]


def series(found: list[dict[str, Any]], tag: str) -> list[tuple[int, float]]:
    """Return the points of a tag of gradwatch: its own x-axis and the value, as they were written."""
    group = tag.rpartition("/")[0]
    return [(row[f"{group}/step"], row[tag]) for row in found if tag in row]


class Keeps:
    """What W&B keeps of what is logged to a run: its open row, and a step that only rises."""

    def __init__(self, step: int = 0) -> None:
        self.step, self.rows, self._open = step, [], {}

    def log(
        self, data: dict[str, Any], step: int | None = None, commit: bool | None = None
    ) -> None:
        """Log as `run.log()` does."""
        if step is not None and step < self.step:
            return
        if step is not None and step > self.step:
            self.close(step)
        self._open.update(data)
        if commit or (commit is None and step is None):
            self.close(self.step + 1)

    def close(self, step: int) -> None:
        """Close the open row."""
        if self._open:
            self.rows.append({**self._open, "_step": self.step})
        self._open, self.step = {}, step


def _records(data: bytes) -> Iterator[Any]:
    """Read a log of LevelDB: blocks of 32 KiB, whose pieces have a check sum, a size and a kind."""
    at, parts = HEADER, b""  # the file begins with a header of W&B, as long as that of a piece
    while at + HEADER <= len(data):
        left = BLOCK - at % BLOCK
        if left < HEADER:
            at += left
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + HEADER])
        if at + HEADER + size > len(data) or kind == 0:  # not all of it has been written
            return
        piece = data[at + HEADER : at + HEADER + size]
        at += HEADER + size
        parts = piece if kind in (1, 2) else parts + piece
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record


def _row(history: Any) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for item in history.item:
        row[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
    return {"_step": history.step.num, **row}
