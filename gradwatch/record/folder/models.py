"""A run folder for each model that a process trains, in one folder.

::

    runs/a/
      models.jsonl        one line of JSON per model, in the order of their first steps
      Generator/          the run folder of a model
      Discriminator/

The list makes it a folder of models: one that merely holds some runs, such as ``runs/``, has none.
A line is appended in one write, so that two processes do not damage what the other has written.
Nothing is made for a model before its first steps are delivered: what is never stepped leaves
nothing behind.
"""

from __future__ import annotations

import json
import os
import time
import weakref
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from gradwatch.errors import warn_safely
from gradwatch.record.folder.files import UnreadableError
from gradwatch.record.folder.lock import WriterLock
from gradwatch.record.folder.meta import MODELS, NAME, NEWER, has_begun, read_meta
from gradwatch.record.folder.tables import need_pyarrow
from gradwatch.record.folder.writer import RunFolder, checked_path
from gradwatch.record.records import RecordBatch
from gradwatch.record.wording import counted

FORMAT = "gradwatch models"
VERSION = 1

_LONGEST_LINE = 1 << 16
_NAMED = 5

SEVERAL = "{path!r} holds {models}: {names}. {advice}"
LOAD_ONE = "Load one: gradwatch.load({example!r}). Load all: gradwatch.load_all({path!r})."
NONE_BEGUN = (
    "{path!r} holds no step yet: the process that made it was stopped, or has only just begun. "
    "Wait for the first steps of a model, which are written after 5 seconds."
)
HOLDS_A_RUN = (
    "{path!r} is the run folder of one model, and cannot hold a folder for each model as well. "
    "Name another folder, such as {example!r}."
)
IN_A_FILE = "{path!r} cannot be a folder: {file!r} is a file. Name another folder."
ELSEWHERE = (
    "gradwatch: another process writes to {asked!r}, so this one writes to {path!r}. Give each "
    "process a folder of its own, or set RANK if they train one model together."
)


class ModelFolder(RunFolder):
    """The run folder of one model of a process: made when the model has taken its first steps.

    Where another process writes to it already, this one takes a folder beside it, with a warning: a
    training that is under way is not stopped for that.
    """

    _is_late = True
    _stepped_at = 0.0  # in seconds since 1970; 0 before the first step
    _claimed = False

    def move(self, path: str | os.PathLike[str]) -> None:
        """Names another folder, before :meth:`begin`."""
        self._path = Path(path)
        self._lock = WriterLock(self._path)
        weakref.finalize(self, self._lock.release)

    def begin(self) -> None:
        """Notes that the model has stepped: a step that raises is not recorded, its events are."""
        self._stepped_at = self._stepped_at or time.time()

    def claim(self) -> Path:
        """Makes the folder, and lists the model; does nothing the second time.

        Raises:
            OSError: If the disk is full, read-only or gone.
        """
        if not self._claimed:
            self.begin()
            list_model(self._path, self._stepped_at)
            try:
                super().claim()
            except ValueError:
                self._go_elsewhere()
            self._claimed = True
        return self._path

    def write(self, batch: RecordBatch) -> None:
        """Writes a batch; keeps events that come before the first step until then."""
        if batch.steps:
            self.begin()
        if self._held and not self._may_begin():
            early = self._held[-1]
            self._held[-1] = replace(early, events=(*early.events, *batch.events))
        else:
            super().write(batch)

    def close(self) -> None:
        """Ends the run; of a model that was never stepped nothing is left."""
        if not self._may_begin():
            self._held.clear()
        super().close()

    def _may_begin(self) -> bool:
        return self._stepped_at > 0

    def _go_elsewhere(self) -> None:
        asked, number = self._path, os.getpid()
        self.move(asked.with_name(f"{asked.name}-pid{number}"))
        list_model(self._path, self._stepped_at)
        super().claim()
        warn_safely(ELSEWHERE.format(asked=str(asked), path=str(self._path)))


def check_models_folder(path: str | os.PathLike[str]) -> None:
    """Checks that a folder can hold a folder for each model, as far as that can be told now.

    Raises:
        TypeError: If it is not a path.
        ValueError: If it is a file or in one, or is the run folder of one model.
        ModuleNotFoundError: If pyarrow is not installed.
    """
    need_pyarrow("run_dir=", later=True)
    folder = checked_path(path)
    file = next((one for one in (folder, *folder.parents) if one.is_file()), None)
    if file is not None:
        raise ValueError(IN_A_FILE.format(path=str(folder), file=str(file)))
    if has_begun(folder):
        read_meta(folder)  # says so if it is no run of ours, or one in a newer format
        example = f"{folder}-models"
        raise ValueError(HOLDS_A_RUN.format(path=str(folder), example=example))


def list_model(folder: Path, stepped_at: float) -> None:
    """Adds the run folder of a model to the list beside it, unless it is there.

    Args:
        folder: The run folder.
        stepped_at: When the model took its first step, in seconds since 1970.

    Raises:
        OSError: If the disk is full, read-only or gone.
    """
    listing = folder.parent / MODELS
    listing.parent.mkdir(parents=True, exist_ok=True)
    if folder.name in _names_in(listing):
        return
    line = {"format": FORMAT, "version": VERSION, "model": folder.name, "time": stepped_at}
    with listing.open("a+b") as file:
        file.seek(max(0, file.tell() - 1))
        torn = file.read() not in (b"", b"\n")  # a process was killed while it wrote a line
        file.write(b"\n" * torn + json.dumps(line).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def models_in(path: str | os.PathLike[str]) -> dict[str, Path] | None:
    """Finds the run folders of the models in a folder, by name, in the order of their first steps.

    Returns:
        Those that exist, also if no step has been written yet; None for any other folder.

    Raises:
        UnreadableError: If the list is in a newer format.
    """
    folder = Path(path)
    if (folder / NAME).exists() or not (folder / MODELS).is_file():
        return None
    there = {name: folder / name for name in _names_in(folder / MODELS)}
    return {name: model for name, model in there.items() if model.is_dir()}


def begun_in(path: str | os.PathLike[str]) -> dict[str, Path] | None:
    """Returns those of :func:`models_in` that have steps."""
    there = models_in(path)
    if there is None:
        return None
    return {name: folder for name, folder in there.items() if (folder / NAME).exists()}


def runs_in(path: str | os.PathLike[str]) -> dict[str, Path]:
    """Returns the run folders of all models by name; for a run folder, itself under its own name.

    Raises:
        UnreadableError: If it is a folder of models, but none of them has steps.
    """
    begun = begun_in(path)
    if begun is None:
        return {Path(path).resolve().name: Path(path)}
    if not begun:
        raise UnreadableError(NONE_BEGUN.format(path=os.fspath(path)))
    return begun


def one_run(path: str | os.PathLike[str], advice: str = LOAD_ONE) -> Path:
    """Returns the run folder that a path means: the only model of a folder, else the path itself.

    Args:
        path: A run folder, or a folder of models.
        advice: What to do if there are several; may hold ``{path!r}`` and ``{example!r}``, which is
            the path of one of them.

    Raises:
        UnreadableError: If there are several models, or none of them has steps.
    """
    found = runs_in(path)
    if len(found) == 1:
        return next(iter(found.values()))
    names = ", ".join(list(found)[:_NAMED])
    names += f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    example = str(next(iter(found.values())))
    told = advice.format(path=os.fspath(path), example=example)
    models = counted(len(found), "model")
    raise UnreadableError(
        SEVERAL.format(path=os.fspath(path), models=models, names=names, advice=told)
    )


def _names_in(listing: Path) -> list[str]:
    """Reads the names in a list, in the order of first steps."""
    first: dict[str, float] = {}
    with suppress(FileNotFoundError), listing.open("rb") as file:
        while line := file.readline(_LONGEST_LINE):
            name, stepped_at = _model_in(line, listing)
            if name:
                first.setdefault(name, stepped_at)
    return sorted(first, key=first.__getitem__)


def _model_in(line: bytes, listing: Path) -> tuple[str, float]:
    """Reads a line; no name if it is incomplete, foreign, or would lead out of the folder."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        return "", 0.0
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        return "", 0.0
    version, name = content.get("version"), content.get("model")
    if isinstance(version, int) and version > VERSION:
        path = str(listing.parent)
        raise UnreadableError(NEWER.format(path=path, theirs=version, ours=VERSION))
    if not isinstance(name, str) or set(name) & set("/\\\0:") or name in ("", ".", ".."):
        return "", 0.0
    stepped_at = content.get("time")
    return name, stepped_at if isinstance(stepped_at, float) else 0.0
