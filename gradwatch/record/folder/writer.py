"""The sink that writes a run to a folder; each process that writes is one session."""

from __future__ import annotations

import os
import platform
import shutil
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from gradwatch.checks import described
from gradwatch.errors import warn_safely
from gradwatch.hooks.data_parallel import rank
from gradwatch.pickles import stable_name
from gradwatch.record.columns import Array
from gradwatch.record.folder.event_log import EventLog, event_files, lines_of, read_events
from gradwatch.record.folder.files import write_whole
from gradwatch.record.folder.lock import WriterLock
from gradwatch.record.folder.meta import (
    EARLIER,
    EVENTS,
    MODELS,
    NAME,
    PARAMETERS,
    STEPS,
    TABLES,
    Meta,
    has_begun,
    newest_earlier,
    number_of_earlier,
    read_meta,
)
from gradwatch.record.folder.parts import Part, PartStore
from gradwatch.record.folder.ranks import SessionTimes
from gradwatch.record.folder.reader import SessionStarts
from gradwatch.record.folder.tables import ParametersTable, StepsTable, labels_of, need_pyarrow
from gradwatch.record.records import Layout, ParameterGroups, RecordBatch, StepRecord
from gradwatch.record.sink_queue import lost_records

RETRY_S = 30.0
"""Pause after a disk failure before the next attempt, because the training waits for each one."""

HELD_VALUES = 1 << 21
HELD_BATCHES = 64
"""Limits on what is held in memory while the disk fails; beyond them the oldest batch is lost."""

_NOT_A_PATH = (
    "RunFolder(path=) must be a folder (str or PathLike), got {value}. "
    "Write RunFolder('runs/my_run')."
)
_EMPTY = "RunFolder(path=) must name a folder, got an empty path. Write RunFolder('runs/my_run')."
_HOLDS_MODELS = (
    "{path!r} holds a folder for each model of a process, and cannot be a run folder as well. Name "
    "another folder, such as {example!r}."
)
_FULL = (
    "gradwatch cannot write to the run folder {path!r}: {error}. The training goes on, and the "
    "newest steps are held in memory in case there is room again later."
)
_LOST = "gradwatch could not write everything to the run folder {path!r}. {lost}"
_UNTIDY = (
    "gradwatch cannot merge the parts of the run folder {path!r}: {error}. The run is still "
    "recorded, but in more and smaller files."
)
_EARLIER = (
    "gradwatch: the run folder {path!r} holds a run, and this one begins at step 1 again. The "
    "earlier run is in {earlier!r} now. Give each run a folder of its own, or resume it: "
    "watcher.load_state_dict(...)."
)


@stable_name
class RunFolder:
    """Writes steps and per-parameter statistics as Parquet, and events as JSON lines.

    If the process is killed, only the steps that the watcher had not delivered yet are lost: at
    most 64 steps or 5 seconds. The folder can be read at any moment, with :func:`gradwatch.load`
    or, table by table, with ``pandas.read_parquet(path + "/steps")``, DuckDB and Polars.

    If the folder already holds a run, that run is continued: new steps replace older ones from the
    first new step on. A run that begins at step 1 again is a new run: the earlier one is moved into
    the subfolder ``earlier-1``.

    If the disk is full, read-only or gone, there is one warning and the training goes on. What
    could not be written later either is told at the end. Two processes cannot write into one
    folder: the second is refused before its first step (on disks that support locks).

    Example:
        >>> import tempfile, torch, gradwatch
        >>> folder = tempfile.mkdtemp()
        >>> x = torch.tensor(2.0, requires_grad=True)
        >>> with gradwatch.watch({"x": x}, sinks=[RunFolder(folder)]):
        ...     (x**2 + 3 * x + 1).backward()
        >>> from gradwatch.history import load
        >>> load(folder).steps()["grad_norm"].tolist()
        [7.0]
    """

    # On the class, as pickles of earlier versions do not have them.
    _written: RecordBatch | None = None
    _lost_steps = 0
    _lost_events = 0
    _began = 0.0
    _ends = False
    _is_late = False  # whether nothing is made before the first step

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        optimizers: Iterable[Mapping[str, Any]] = (),
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """Makes the folder; writes nothing yet.

        Args:
            path: The run folder. It may hold other files, and a run that this one resumes.
            optimizers: One mapping per optimizer, stored in meta.json; values that JSON cannot
                hold are stored as text.
            options: The arguments of ``watch()``, stored in meta.json in the same way.

        Raises:
            TypeError: If the path is neither a str nor a PathLike.
            ValueError: If it is a file, holds a run that is incomplete or in a newer format, or
                another process writes there.
            ModuleNotFoundError: If pyarrow is not installed.
        """
        need_pyarrow("RunFolder()", later=self._is_late)
        self._path = _checked(path)
        began = datetime.now(timezone.utc)
        self._began = began.timestamp()
        self._about = {
            "started": began.isoformat(timespec="microseconds"),
            "versions": _versions(),
            "optimizers": list(optimizers),
            "options": dict(options or {}),
        }
        self._session: Session | None = None
        self._held: list[RecordBatch] = []
        self._retry_at = 0.0
        self._warned = False
        self._tidies = True
        self._lock = WriterLock(self._path)
        weakref.finalize(self, self._lock.release)
        if not self._is_late:
            self._reserve()

    @property
    def path(self) -> Path:
        """The folder."""
        return self._path

    @property
    def has_written(self) -> bool:
        """Whether a step or an event of this object is in the folder."""
        return self._written is not None

    def __repr__(self) -> str:
        return f"RunFolder({str(self._path)!r})"

    def claim(self) -> Path:
        """Makes the folder and takes the lock, unless that has been done; returns the folder.

        Raises:
            OSError: If the disk is full, read-only or gone.
            ValueError: If another process writes there.
        """
        self._path.mkdir(parents=True, exist_ok=True)
        self._lock.acquire()
        return self._path

    def write(self, batch: RecordBatch) -> None:
        """Writes a batch, after those that a failing disk has not taken yet.

        A batch that was passed before, as happens after an error, is not written twice.
        """
        if batch is not self._written and not any(batch is held for held in self._held):
            self._held.append(batch)
        if time.monotonic() >= self._retry_at:
            self._attempt(self._write_held)
        self._drop_oldest()

    def close(self) -> None:
        """Writes what is still held in memory, and merges small parts.

        If the disk takes nothing even now, or has not for so long that not everything could be
        held, a warning says what is lost.
        """
        self._ends = True
        try:
            self._attempt(self._write_held)
            self._lose(len(self._held))
            if self._lost_steps or self._lost_events:
                lost = lost_records(self._lost_steps, self._lost_events)
                warn_safely(_LOST.format(path=str(self._path), lost=lost))
            if self._session is not None:
                self._tidy(self._session.close)
        finally:
            self._lock.release()

    def _reserve(self) -> None:
        self._attempt(lambda: self._path.mkdir(parents=True, exist_ok=True))
        self._retry_at = 0.0  # try again at the first steps, whether this worked or not
        if rank() == 0:  # the other ranks make the same object, and never write to it
            with suppress(OSError):  # reported once there is something to write
                self._lock.acquire()

    def _may_begin(self) -> bool:
        """Tells whether to begin a session with what is held."""
        # Only steps tell a new run from a resumed one, so a run that is there waits for them.
        has_steps = any(batch.steps for batch in self._held)
        return has_steps or self._ends or next(run_parts(self._path), None) is None

    def _write_held(self) -> None:
        while self._held:
            batch = self._held[0]
            if self._session is None:
                if not self._may_begin():
                    return
                self.claim()
                self._keep_earlier()
                self._session = Session(self._path, batch.layout, self._about)
            self._session.write(batch)
            self._written = self._held.pop(0)
            self._tidy(partial(self._session.tidy, batch))

    def _keep_earlier(self) -> None:
        steps = next((batch.steps for batch in self._held if batch.steps), ())
        finish_setting_aside(self._path, self._began)
        earlier = set_aside(self._path, self._began) if begins_anew(steps) else None
        if earlier is not None:
            warn_safely(_EARLIER.format(path=str(self._path), earlier=str(earlier)))

    def _attempt(self, act: Callable[[], object]) -> None:
        try:
            act()
        except OSError as error:
            self._retry_at = time.monotonic() + RETRY_S
            self._warn(_FULL, error)

    def _tidy(self, act: Callable[[], object]) -> None:
        """Merges or cuts parts; an error here never endangers what has been written."""
        if not self._tidies:
            return
        try:
            act()
        except Exception as error:
            self._tidies = False
            self._warn(_UNTIDY, error)

    def _warn(self, text: str, error: Exception) -> None:
        if not self._warned:
            self._warned = True
            warn_safely(text.format(path=str(self._path), error=error))

    def _drop_oldest(self) -> None:
        while self._held and (
            len(self._held) > HELD_BATCHES
            or (len(self._held) > 1 and sum(batch.norms.size for batch in self._held) > HELD_VALUES)
        ):
            self._lose(1)

    def _lose(self, batches: int) -> None:
        for batch in self._held[:batches]:
            self._lost_steps += len(batch.steps)
            self._lost_events += len(batch.events)
        del self._held[:batches]


def run_parts(folder: Path) -> Iterator[Path]:
    """Finds the files with the steps of the run in a folder."""
    # Only parts count: a temporary file left by a killed process holds no steps.
    return (folder / STEPS).glob("*.parquet")


def begins_anew(steps: Sequence[StepRecord]) -> bool:
    """Tells whether a session's first steps begin a new run: every optimizer is at step 1."""
    # A resumed run would go on after the last step of its checkpoint.
    first = {record.optimizer: record.step for record in reversed(steps)}
    return bool(first) and all(step == 1 for step in first.values())


def set_aside(folder: Path, before: float) -> Path | None:
    """Moves the run in a folder into a subfolder ``earlier-N``, itself a run folder.

    Args:
        folder: The run folder.
        before: When the new run began, in seconds since 1970.

    Returns:
        The subfolder; None if the folder held no run with steps.

    Raises:
        OSError: If the disk is full or read-only.
    """
    if next(run_parts(folder), None) is None:
        return None
    target = newest_earlier(folder)
    if target is None or (target / STEPS).exists():  # if not, finish a move stopped at its start
        target = folder / f"{EARLIER}{number_of_earlier(target) + 1}"
        target.mkdir()
    # meta.json is copied, not moved, and the steps are moved first. If the process is killed in
    # between, no step is lost, and what has been moved is no longer read here.
    shutil.copy2(folder / NAME, target / NAME)
    (folder / STEPS).rename(target / STEPS)
    finish_setting_aside(folder, before)
    return target


def finish_setting_aside(folder: Path, before: float) -> None:
    """Moves what is still here of a run although its steps have been set aside.

    That happens if a process was killed during the move. A new session would take it for its own.

    Args:
        folder: The run folder.
        before: When the new run began, in seconds since 1970.

    Raises:
        OSError: If the disk is full or read-only.
    """
    target = newest_earlier(folder)
    if target is None or (folder / STEPS).exists() or not (target / STEPS).exists():
        return
    from gradwatch.record.folder.explanations import set_aside_explanations  # few runs need it

    set_aside_explanations(folder, target, before)
    for table in TABLES:
        if (folder / table).exists() and not (target / table).exists():
            (folder / table).rename(target / table)


class Session:
    """The files that one process writes into a run folder, from its first step on."""

    def __init__(self, folder: Path, layout: Layout, about: Mapping[str, Any]) -> None:
        """Makes the folder, or continues the run that it holds.

        Args:
            folder: The run folder; need not exist yet.
            layout: The parameters of this session.
            about: What meta.json stores about the session.

        Raises:
            OSError: If the disk is full or read-only.
            ValueError: If the folder is not a run folder.
        """
        self._folder = folder
        self._steps_table, self._parameters_table = StepsTable(), ParametersTable()
        self._steps = PartStore(folder / STEPS, self._steps_table)
        self._parameters = PartStore(folder / PARAMETERS, self._parameters_table)
        folder.mkdir(parents=True, exist_ok=True)
        meta = read_meta(folder) if (folder / NAME).exists() else Meta(layout)
        (folder / EVENTS).mkdir(exist_ok=True)
        self._parameters.open()
        self._steps.open()  # last: a folder without steps/ counts as a run that has not begun
        written = {part.session: part.last for part in self._steps.parts()}
        self._parameters.remove_beyond(written)
        self._resumes = bool(written)
        # Take the larger of both: a session without steps has no part, and one that found its
        # number claimed has a higher number than meta.json has sessions.
        newest = max([len(meta.sessions), *written])
        self._log = EventLog(folder / EVENTS, newest + 1)
        self.number = self._log.session
        self._meta = meta.with_session(layout, {"session": self.number, **about})
        self._groups: Sequence[ParameterGroups] = ()
        try:
            self._meta.write(folder)
        except OSError:
            self._log.give_up()
            raise
        self._starts = SessionStarts(folder / STEPS)
        self._rows = 0
        self._failed: list[Part] = []
        self._first: dict[str, int] = {}

    def write(self, batch: RecordBatch) -> None:
        """Writes a batch of steps and their events, all or nothing.

        Raises:
            OSError: If the disk is full, read-only or gone.
        """
        self._note_groups(batch)
        length = self._log.length
        part = Part(self.number, self._rows, self._rows + len(batch.steps) - 1)
        self._withdraw_failed()  # again: the disk may have refused even that
        try:
            self._log.append(batch.events, part.last)
            if batch.steps:
                self._parameters.write(part, self._parameters_table.to_arrow(batch, self._rows))
                # Steps last: readers ignore everything whose row is not in the table of steps.
                self._steps.write(part, self._steps_table.to_arrow(batch.steps, self._rows))
                # Sync both folders at the end: on most file systems the first call does both.
                self._steps.sync()
                self._parameters.sync()
        except BaseException:
            self._log.length = length
            self._failed.append(part)
            self._withdraw_failed()
            raise
        else:
            self._failed = []
        finally:
            # Also after a failure: the next attempt must not share rows with leftovers of this one.
            self._rows += len(batch.steps)

    def _withdraw_failed(self) -> None:
        for part in self._failed:
            # Steps first: the batch is written again, and no step may be there twice. Without its
            # row in the table of steps nothing else of the batch is read.
            self._steps.withdraw(part)
            self._parameters.withdraw(part)

    def tidy(self, batch: RecordBatch) -> None:
        """Merges small parts if there are many, and cuts the steps that the newest ones void."""
        if self._begins(batch) and self._resumes:
            self._cut()
        self._steps.merge_due()
        self._parameters.merge_due()

    def close(self) -> None:
        """Merges the small parts of all sessions."""
        self._steps.merge_all()
        self._parameters.merge_all()

    def _note_groups(self, batch: RecordBatch) -> None:
        # Before the steps: a reader then knows the groups of every step that it sees.
        if tuple(batch.groups) != self._groups:
            self._meta = self._meta.with_groups(batch.layout, batch.groups)
            self._meta.write(self._folder)
            self._groups = tuple(batch.groups)

    def _begins(self, batch: RecordBatch) -> bool:
        before = dict(self._first)
        for record in batch.steps:
            lowest = self._first.get(record.optimizer, record.step)
            self._first[record.optimizer] = min(lowest, record.step)
        return before != self._first

    def _cut(self) -> None:
        parts = self._steps.parts()
        rule = self._starts.rule(parts)

        def valid(part: Part, table: Any) -> Array:
            optimizers = labels_of(table["optimizer"])
            return rule.valid_steps(part.session, optimizers, table["step"].to_numpy())

        lowest = min(rule.void_from(parts[0].session).values(), default=None)
        if lowest is None:  # an earlier cut left nothing of the earlier sessions
            return
        self._parameters.cut(self.number, lowest, valid)
        self._steps.cut(self.number, lowest, valid)
        for session, path in event_files(self._folder / EVENTS):
            if session < self.number:
                events = [logged for logged, _ in read_events(path)]
                kept = [logged for logged in events if rule.keeps(session, logged.event)]
                if len(kept) < len(events):
                    write_whole(path, lines_of(kept))
        from gradwatch.record.folder.explanations import read_explanations, remove_explanation

        times = SessionTimes.of(self._meta.sessions)
        for one in read_explanations(self._folder):
            of = one.session(times)
            if of is None or not rule.keeps(of, one.explanation):
                remove_explanation(one)


def checked_path(path: object) -> Path:
    """Checks that a path may name a folder.

    Raises:
        TypeError: If it is neither a str nor a PathLike.
        ValueError: If it is empty.
    """
    # A PathLike may return bytes, which cannot go into meta.json or a message as text.
    name = os.fspath(path) if isinstance(path, str | os.PathLike) else None
    if not isinstance(name, str):
        raise TypeError(_NOT_A_PATH.format(value=described(path)))
    if not name:
        raise ValueError(_EMPTY)
    return Path(name)


def _checked(path: object) -> Path:
    folder = checked_path(path)
    if (folder / MODELS).exists():
        example = str(folder / "my_run")
        raise ValueError(_HOLDS_MODELS.format(path=str(folder), example=example))
    if folder.exists() and (not folder.is_dir() or has_begun(folder)):
        read_meta(folder)
    return folder


def _versions() -> dict[str, str]:
    packages = {name: _version(name) for name in ("gradwatch", "torch", "pyarrow")}
    return {"python": platform.python_version(), **packages}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"
