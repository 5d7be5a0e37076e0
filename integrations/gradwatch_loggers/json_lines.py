"""JSONLinesSink: a file with a JSON object per step and per event."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gradwatch import Event, RecordBatch
from gradwatch.adapters import BlockScalars, warn_safely
from gradwatch_loggers.arguments import Deliver, checked_deliver, checked_file, checked_flag
from gradwatch_loggers.background import CLOSED
from gradwatch_loggers.line_file import LineFile
from gradwatch_loggers.order import in_order
from gradwatch_loggers.strict_json import event_object, json_line, number, step_object

NAME = "JSONLinesSink"

EARLIER = (
    "gradwatch: {path!r} holds a run, and this one begins at step 1 again. The earlier run is in "
    "{earlier!r} now. Give each run a file of its own, or resume it: watcher.load_state_dict(...)."
)


class JSONLinesSink:
    """Writes a JSON object per line, for each step and each event.

    An object has ``"type": "step"`` and the columns of ``History.steps()``, or ``"type": "event"``
    and those of ``History.events()``, in the order in which things happened. It is strict JSON:
    ``null`` where a number is not known, and the strings ``"NaN"``, ``"Infinity"`` and
    ``"-Infinity"`` where it is known to be that, which ``pandas.read_json(path, lines=True,
    precise_float=True)`` turns back into numbers.

    The file can be read while it is written, and holds whole lines, also after the process was
    killed. If the disk is full, the watcher says so and passes the records again later.

    If the file is there already, the run in it is continued: new steps replace those of the same
    number and later ones. A run that begins at step 1 again is a new run: the earlier one is moved
    to ``run.earlier-1.jsonl``.

    Attributes:
        path: The file.
        deliver: When the watcher hands records over.

    Example:
        >>> import tempfile, gradwatch
        >>> from gradwatch.testing import LinearModel
        >>> sink = JSONLinesSink(tempfile.mkdtemp() + "/run.jsonl")
        >>> model = LinearModel([3.0, 4.0])
        >>> with gradwatch.watch(model, sinks=[sink]):
        ...     model().backward()
        >>> json.loads(sink.path.read_text())["grad_norm"]
        5.0
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        blocks: bool = False,
        statistics: bool = False,
        deliver: Deliver = "step",
    ) -> None:
        """Makes a sink; the file is made with the first step.

        Args:
            path: The file, ``"run.jsonl"``; folders above it are made.
            blocks: Whether a step also has the norm of each part of the model, at most 20:
                ``"blocks/encoder"``.
            statistics: Whether it also has what ``watch(statistics=)`` measures of each part, in
                the steps in which it was taken: ``"max/encoder"``.
            deliver: ``"step"``: each step is in the file as soon as its numbers are there.
                ``"batch"``: up to 64 steps or 5 seconds at a time, which costs less.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If the path cannot be that of a file, or ``deliver`` is another word.
        """
        self.path = checked_file(f"{NAME}(path)", path, "run.jsonl")
        self._blocks = BlockScalars(
            norms=checked_flag(f"{NAME}(blocks=)", blocks),
            statistics=checked_flag(f"{NAME}(statistics=)", statistics),
        )
        self.deliver: Deliver = checked_deliver(NAME, deliver)
        self._file: LineFile | None = None
        self._made: tuple[RecordBatch, bytes] | None = None
        self._written: RecordBatch | None = None
        self._closed = False

    def write(self, batch: RecordBatch) -> None:
        """Appends the steps and events of a batch; after an error, pass the same batch again.

        Raises:
            OSError: If the disk is full, read-only or gone; no line is there by half then.
            RuntimeError: If this is closed.
        """
        if self._closed:
            raise RuntimeError(CLOSED.format(name=NAME))
        if batch is self._written:
            return
        if self._made is None or self._made[0] is not batch:
            self._made = batch, b"".join(map(json_line, self._objects(batch)))
        if self._file is None:
            self._file = _opened(self.path, batch)
        self._file.append(self._made[1])
        self._written, self._made = batch, None

    def close(self) -> None:
        """Releases the file."""
        self._closed = True
        if self._file is not None:
            self._file.close()

    def _objects(self, batch: RecordBatch) -> Iterator[dict[str, Any]]:
        """Yields what stands in the lines."""
        more = iter(self._blocks.of(batch))
        for one in in_order(batch):
            if isinstance(one, Event):
                yield event_object(one)
            else:
                yield step_object(one) | {tag: number(v) for tag, v in next(more).items()}


def _opened(path: Path, batch: RecordBatch) -> LineFile:
    """Opens the file for a run that begins with a batch."""
    first: dict[str, int] = {}
    for one in in_order(batch):
        first[one.optimizer] = min(one.step, first.get(one.optimizer, one.step))
    if max(first.values(), default=0) <= 1:
        _move_away(path)
        return LineFile(path)
    file = LineFile(path)
    _cut_from(file, first)
    return file


def _move_away(path: Path) -> None:
    if not path.exists() or not path.stat().st_size:
        return
    numbers = range(1, 1_000_000)
    names = (path.with_name(f"{path.stem}.earlier-{n}{path.suffix}") for n in numbers)
    earlier = next(name for name in names if not name.exists())
    path.rename(earlier)
    warn_safely(EARLIER.format(path=str(path), earlier=str(earlier)))


def _cut_from(file: LineFile, first: Mapping[str, int]) -> None:
    """Cuts off the steps that the run takes again, from the first step of each optimizer on."""
    end = None
    for position, line in file.backwards():
        try:
            found = json.loads(line)
            step, begins = int(found["step"]), first.get(found["optimizer"])
        except (ValueError, TypeError, KeyError):  # a line of somebody else
            continue
        if begins is None:
            continue
        if step >= begins:
            end = position
        elif found.get("type") == "step":
            break
    if end is not None:
        file.cut(end)
