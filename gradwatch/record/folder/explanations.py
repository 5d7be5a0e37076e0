"""The evidence of bad steps in a run folder: explanations as JSON, and micro-batches if asked.

::

    nonfinite/
      step-000120/explanation.json       what Explanation.as_dict() says, and what is below
      step-000120/batch.pt               the micro-batch, for torch.load(weights_only=True)
      step-000120-2/...                  a second explanation of the same step
      step-000120-Adam/...               where there are several optimizers
      step-000120-rank-1/...             of another rank than the first

Each rank writes its own explanations, at once, so nothing here needs a collective or waits for the
tables. An explanation counts once its ``explanation.json`` is there, which is written last. Beside
the fields it holds ``written`` (seconds since 1970), by which a reader knows the session that it
belongs to, ``batch`` (name of the file, or null), ``batch_note`` (why it is not there) and
``left_out`` (arguments that are not in the file, with their types).
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from gradwatch.errors import described_error, warn_safely
from gradwatch.hooks.generators import RandomState
from gradwatch.record.explanation import Explanation
from gradwatch.record.folder.files import plain_data, sync_folder, write_whole
from gradwatch.record.folder.ranks import SessionTimes

if TYPE_CHECKING:
    from gradwatch.hooks.forwards import ForwardCall

NONFINITE = "nonfinite"
NAME = "explanation.json"
BATCH = "batch.pt"

MOST_BYTES = 256 * 2**20
MOST_BATCHES = 8
MOST_EXPLANATIONS = 1_000  # of one process; a run whose every step is bad needs no more
LONGEST = 1 << 24
"""Bytes of an ``explanation.json``; a longer file is none."""

_LONGEST_LABEL = 64
_UNSAFE = re.compile(r"[^A-Za-z0-9_.-]+")

CANNOT_WRITE = (
    "gradwatch cannot keep explanations in the run folder {path!r}: {error}. The training goes on, "
    "and watcher.explanations has them."
)
TOO_LARGE = "not kept: its tensors take more than {most:g} MiB"
TOO_MANY = "not kept: the run folder holds {most} batches already"
NOT_KEPT = "not kept: {error}"


class KeptExplanation(NamedTuple):
    """An explanation in a run folder.

    Attributes:
        folder: Where it is.
        written: When it was written, in seconds since 1970.
        explanation: What it says.
        batch_note: Why the micro-batch is not there; empty if it is, or was not asked for.
    """

    folder: Path
    written: float
    explanation: Explanation
    batch_note: str = ""

    @property
    def batch(self) -> Path | None:
        """The file with the micro-batch, if there is one."""
        path = self.folder / BATCH
        return path if path.is_file() else None

    def session(self, times: SessionTimes) -> int | None:
        """Returns the number of the session that wrote it; None if no step of that was written."""
        return times.at(self.written, of_another_rank=self.explanation.rank > 0)

    def is_before(self, time_s: float) -> bool:
        """Tells whether a session wrote it that had begun before a time, seconds since 1970."""
        times = SessionTimes([(time_s, 1)])
        return self.session(times) is None


class _Evidence(NamedTuple):
    """An explanation as it is written.

    Attributes:
        name: What its folder is called, without a number.
        content: What ``explanation.json`` says.
        batch: The content of ``batch.pt``; None for no such file.
    """

    name: str
    content: Mapping[str, Any]
    batch: memoryview | None


class ExplanationStore:
    """Writes the explanations of one rank; a disk that fails costs only these, with one warning."""

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        rank: int = 0,
        *,
        most_bytes: int = MOST_BYTES,
        most_batches: int = MOST_BATCHES,
        waits: bool = False,
    ) -> None:
        """Writes nothing yet.

        Args:
            run_dir: The run folder, whose tables the first rank writes.
            rank: Rank of this process.
            most_bytes: The most that the tensors of one batch may take.
            most_batches: The most batches in the folder, those of earlier sessions included.
            waits: Whether to keep everything in memory until :meth:`begin`.
        """
        self._waiting: list[_Evidence] | None = [] if waits else None
        self._claim: Callable[[], Path] | None = None
        self._folder = Path(run_dir) / NONFINITE
        self._rank = rank
        self._most_bytes, self._most_batches = most_bytes, most_batches
        self._began = time.time()
        self._count = 0
        self._warned = False

    def write(
        self, explanation: Explanation, calls: Sequence[ForwardCall] = (), *, labeled: bool = False
    ) -> Path | None:
        """Writes an explanation, and the micro-batch that it is about; never raises.

        Args:
            explanation: What is kept.
            calls: The forwards of the micro-batch; empty to keep only the explanation.
            labeled: Whether the name of the folder has the optimizer's label.

        Returns:
            The folder of the explanation; None if it waits, or could not be written.
        """
        if self._count >= MOST_EXPLANATIONS:
            return None
        self._count += 1
        try:
            evidence = self._evidence(replace(explanation, rank=self._rank), calls, labeled)
            if self._waiting is None:
                return self._write(evidence)
            self._waiting.append(evidence)
        except Exception as error:  # evidence is never worth a training
            self._warn(error)
        return None

    def move(self, run_dir: str | os.PathLike[str]) -> None:
        """Names another run folder, before :meth:`begin`."""
        self._folder = Path(run_dir) / NONFINITE

    def begin(self, claim: Callable[[], Path] | None = None) -> None:
        """Writes what has waited; from now on explanations are written at once. Never raises.

        Args:
            claim: Makes the run folder, unless that has been done, and returns it; None if another
                rank makes it.
        """
        waiting, self._waiting = self._waiting or [], None
        self._claim = claim
        try:
            for evidence in waiting:
                self._write(evidence)
        except Exception as error:
            self._warn(error)

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            path, told = str(self._folder.parent), described_error(error)
            warn_safely(CANNOT_WRITE.format(path=path, error=told))

    def read(self) -> list[Explanation]:
        """Returns all explanations that are there, of all ranks and sessions, by step."""
        return [one.explanation for one in read_explanations(self._folder.parent)]

    def _evidence(
        self, explanation: Explanation, calls: Sequence[ForwardCall], labeled: bool
    ) -> _Evidence:
        """Prepares what is written, now: the training may change the tensors of a batch later."""
        content = explanation.as_dict() | {"batch": None, "batch_note": "", "left_out": {}}
        packed: memoryview | None = None
        if calls:
            described, packed = self._packed(calls)
            content |= described
        content["written"] = time.time()
        return _Evidence(_folder_name(explanation, labeled), content, packed)

    def _write(self, evidence: _Evidence) -> Path:
        if self._claim is not None:
            self._folder = self._claim() / NONFINITE
        folder = self._new_folder(evidence.name)
        if evidence.batch is not None:
            write_whole(folder / BATCH, evidence.batch)
        # Last: without it the folder does not count, so a reader never sees half of the evidence.
        text = json.dumps(plain_data(evidence.content), indent=1, allow_nan=False)
        write_whole(folder / NAME, text.encode())
        sync_folder(folder.parent)
        return folder

    def _new_folder(self, name: str) -> Path:
        self._folder.mkdir(parents=True, exist_ok=True)
        there = self._folder / name
        known = _read(there)
        if known is not None and known.is_before(self._began):
            # Of an earlier session, whose steps are about to be void: the name is for the new one.
            with suppress(OSError):
                there.rename(next(path for path in _numbered(there) if not path.exists()))
        for path in _numbered(there):
            with suppress(FileExistsError):
                path.mkdir()
                return path
        raise AssertionError  # the numbers never end

    def _packed(self, calls: Sequence[ForwardCall]) -> tuple[dict[str, Any], memoryview | None]:
        """Returns what ``explanation.json`` says of a batch, and the bytes of its file."""
        waiting = [one.batch for one in self._waiting or () if one.batch is not None]
        there = sum(1 for _ in self._folder.glob(f"*/{BATCH}"))
        if there + len(waiting) >= self._most_batches:
            return {"batch_note": TOO_MANY.format(most=self._most_batches)}, None
        plain = _PlainCopy(self._most_bytes - sum(batch.nbytes for batch in waiting))
        try:
            content = {"calls": [_call(plain, call, place) for place, call in enumerate(calls)]}
            file = io.BytesIO()
            torch.save(content, file)
        except _TooLargeError:
            return {"batch_note": TOO_LARGE.format(most=self._most_bytes / 2**20)}, None
        except Exception as error:  # the explanation is worth more than the batch
            return {"batch_note": NOT_KEPT.format(error=described_error(error))}, None
        return {"batch": BATCH, "left_out": plain.left_out}, file.getbuffer()


def read_explanations(run_dir: Path) -> list[KeptExplanation]:
    """Reads all explanations in a run folder, by step; a folder without a whole one is left out."""
    folder = run_dir / NONFINITE
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    kept = [one for one in map(_read, paths) if one is not None]
    return sorted(kept, key=lambda one: (one.explanation.step, one.written))


def set_aside_explanations(run_dir: Path, target: Path, before: float) -> None:
    """Moves the explanations of an earlier run into the run folder that has its tables.

    Args:
        run_dir: The run folder.
        target: The run folder of the earlier run.
        before: When the new run began, in seconds since 1970: it may have explanations already.

    Raises:
        OSError: If the disk is full or read-only.
    """
    for one in read_explanations(run_dir):
        if one.is_before(before):
            (target / NONFINITE).mkdir(exist_ok=True)
            one.folder.rename(target / NONFINITE / one.folder.name)


def remove_explanation(one: KeptExplanation) -> None:
    """Removes an explanation whose step is void, as far as the disk allows it."""
    # First the file that makes it count: what is left of the folder is then ignored.
    with suppress(OSError):
        (one.folder / NAME).unlink()
        shutil.rmtree(one.folder)


def _folder_name(explanation: Explanation, labeled: bool) -> str:
    label = _UNSAFE.sub("_", explanation.optimizer)[:_LONGEST_LABEL]
    rank = f"-rank-{explanation.rank}" if explanation.rank else ""
    return f"step-{explanation.step:06d}{f'-{label}' if labeled and label else ''}{rank}"


def _numbered(path: Path) -> Iterator[Path]:
    yield path
    for number in count(2):
        yield path.with_name(f"{path.name}-{number}")


def _read(folder: Path) -> KeptExplanation | None:
    try:
        with (folder / NAME).open("rb") as file:
            content = file.read(LONGEST + 1)
        values = json.loads(content if len(content) <= LONGEST else "{}")
        explanation = Explanation.from_dict(values)
        note = str(values.get("batch_note") or "")
        return KeptExplanation(folder, float(values["written"]), explanation, note)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None  # killed while writing it, or no explanation


# -- the micro-batch ---------------------------------------------------------------------------


class _TooLargeError(Exception):
    """The tensors of a batch take more than is allowed."""


_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)
_TENSORS = (Tensor, nn.Parameter)


class _PlainCopy:
    """Copies arguments into dicts, lists, tuples, tensors on the CPU, numbers and strings.

    ``torch.load(weights_only=True)`` reads no other types, so that a file never runs code.

    Attributes:
        left_out: For each argument that is of another type, its type; the copy has None there.
    """

    def __init__(self, most_bytes: int) -> None:
        self.left_out: dict[str, str] = {}
        self._room = most_bytes
        # The tensors themselves, too: an id is free for another one after its tensor is gone.
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}

    def of(self, value: Any, name: str) -> Any:
        """Copies a value; ``name`` is how the user would write it, as ``kwargs['mask']``."""
        if type(value) in _PLAIN:
            return value
        if isinstance(value, Mapping):
            return {key: self.of(one, f"{name}[{key!r}]") for key, one in self._items(value, name)}
        if isinstance(value, list | tuple):
            parts = [self.of(one, f"{name}[{place}]") for place, one in enumerate(value)]
            return parts if isinstance(value, list) else tuple(parts)
        if isinstance(value, np.generic):
            return self.of(value.item(), name)
        if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
            value = torch.from_numpy(np.ascontiguousarray(value))
        if type(value) in _TENSORS and not value.is_meta and not value.is_nested:
            return self._tensor(value)
        self.left_out[name] = f"{type(value).__module__}.{type(value).__qualname__}"
        return None

    def _items(self, value: Mapping[Any, Any], name: str) -> Iterator[tuple[Any, Any]]:
        for key, one in value.items():
            if type(key) in _PLAIN:
                yield key, one
            else:
                self.left_out[f"{name}[{key!r}]"] = f"{type(key).__module__}.{type(key).__name__}"

    def _tensor(self, tensor: Tensor) -> Tensor:
        if id(tensor) not in self._copies:
            self._room -= _bytes_of(tensor)
            if self._room < 0:  # before anything is copied
                raise _TooLargeError
            # A copy of its own: torch.save() writes the whole storage that a view is a part of.
            copy = tensor.detach().to("cpu", copy=True).resolve_conj().resolve_neg()
            self._copies[id(tensor)] = tensor, copy.requires_grad_(tensor.requires_grad)
        return self._copies[id(tensor)][1]


def _bytes_of(tensor: Tensor) -> int:
    if tensor.layout == torch.sparse_coo:
        return tensor._values().nbytes + tensor._indices().nbytes
    if tensor.layout == torch.strided:
        return tensor.numel() * tensor.element_size()
    return tensor.values().nbytes * 2  # as many indices, about


def _call(plain: _PlainCopy, call: ForwardCall, place: int) -> dict[str, Any]:
    of = f"calls[{place}]."
    return {
        "args": plain.of(tuple(call.args), f"{of}args"),
        "kwargs": plain.of(dict(call.kwargs), f"{of}kwargs"),
        "random": plain.of(_random_states(call.context.random), f"{of}random"),
        "autocast": plain.of(dict(call.context.autocast), f"{of}autocast"),
        "grad": call.context.grad,
    }


def _random_states(random: RandomState) -> dict[str, Any]:
    states = {str(generator.device): state for generator, state in random.generators}
    return {"torch": states, "python": random.python, "numpy": random.numpy}
