"""Event files: our own, or the one of the user's SummaryWriter."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import FileWriter, SummaryWriter

from gradwatch.adapters import warn_safely

FLUSH_SECS = 5
"""Seconds between two flushes: TensorBoard also looks for new data every 5 s."""

MAX_QUEUE = 1024
"""Events that may wait for the disk: several batches, so that training does not block on it."""

SUFFIX = ".gradwatch"
"""The end of the names of our own event files."""

_NOT_A_TARGET = (
    "log_dir_or_writer must be a folder (str or PathLike) or a "
    "torch.utils.tensorboard.SummaryWriter, got {what}: the values of a step go out in one Event, "
    "which other writers do not take. Write TensorBoardWriter('runs/my_run'), or "
    "TensorBoardWriter(summary_writer); for a Lightning TensorBoardLogger, pass logger.experiment."
)
_NO_FOLDER = (
    "log_dir_or_writer must name a folder, got {what}. Write TensorBoardWriter('runs/my_run')."
)
_CLOSED_BEFORE = (
    "log_dir_or_writer must be open, got a SummaryWriter that was closed. "
    "Make a new one: TensorBoardWriter(SummaryWriter({log_dir!r}))."
)
_CLOSED_SINCE = (
    "The SummaryWriter of {log_dir!r} was closed while gradwatch still writes to it, so later "
    "steps are lost. Close it after the `with gradwatch.watch(...)` block."
)

_LOST = (
    "gradwatch: the event file in {log_dir!r} failed, and its writer thread ended. Values of the "
    "last seconds before that may be missing in TensorBoard. A new file continues it."
)


def event_file(log_dir_or_writer: object) -> OwnFile | SharedFile:
    """Returns the event file for a folder or a SummaryWriter.

    Raises:
        TypeError: If the argument is neither a folder nor a SummaryWriter.
        ValueError: If the path is empty or is a file, or the SummaryWriter is closed.
    """
    if isinstance(log_dir_or_writer, SummaryWriter):
        if log_dir_or_writer.file_writer is None:
            raise ValueError(_CLOSED_BEFORE.format(log_dir=str(log_dir_or_writer.log_dir)))
        return SharedFile(log_dir_or_writer)
    if not isinstance(log_dir_or_writer, str | os.PathLike):
        kind = type(log_dir_or_writer)
        raise TypeError(_NOT_A_TARGET.format(what=f"{kind.__module__}.{kind.__qualname__}"))
    log_dir = os.fspath(log_dir_or_writer)
    if not isinstance(log_dir, str):
        raise TypeError(_NOT_A_TARGET.format(what="a path of bytes"))
    if not log_dir or Path(log_dir).is_file():
        what = f"{log_dir!r}, which is a file" if log_dir else "an empty one"
        raise ValueError(_NO_FOLDER.format(what=what))
    return OwnFile(log_dir)


class OwnFile:
    """An event file of our own, created when the first value arrives.

    The first step is only known then. A resumed run needs it to announce from which step on it
    replaces the earlier run in the same folder.
    """

    # Another reason to wait: an empty file of a process that never writes would make TensorBoard's
    # Python loader follow it instead of the file with the data.

    _failed = False  # on the class, as pickles of earlier versions do not have it

    def __init__(self, log_dir: str) -> None:
        """Creates the folder, unless it is an address like ``gs://...``."""
        self.log_dir = log_dir
        if "://" not in log_dir:
            Path(log_dir).mkdir(parents=True, exist_ok=True)
        self._writer: SummaryWriter | None = None

    def writer(self, first_step: int) -> Any:
        """Returns torch's ``FileWriter``; the first call creates it, to start at ``first_step``.

        Raises:
            OSError: If the file cannot be created, or its folder was removed under an earlier one.
        """
        if self._writer is None:
            if self._failed and "://" not in self.log_dir and not Path(self.log_dir).is_dir():
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.log_dir)
            self._writer = SummaryWriter(
                self.log_dir,
                purge_step=first_step if self._is_ours() and not self._failed else None,
                max_queue=MAX_QUEUE,
                flush_secs=FLUSH_SECS,
                filename_suffix=SUFFIX,
            )
        return self._writer.file_writer

    def _is_ours(self) -> bool:
        """Whether all event files in the folder are ours, so that a restart may be announced."""
        # A restart (purge_step) hides all values of the run from that step on, also those of other
        # writers. A new run announces one too, because TensorBoard's Python loader ignores the
        # first restart that it reads.
        if "://" in self.log_dir:
            return False
        return all(path.name.endswith(SUFFIX) for path in Path(self.log_dir).glob("*tfevents*"))

    def renew(self) -> None:
        """Leaves a file that failed; the next value begins a new one, which continues it."""
        # The thread of a SummaryWriter ends at its first error, with all that it had not written.
        if self._writer is None:
            return
        if not self._failed:
            warn_safely(_LOST.format(log_dir=self.log_dir))
        self._failed = True
        with suppress(Exception):
            self.close()
        self._writer = None

    def flush(self) -> None:
        """Blocks until everything is on disk."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Flushes and closes the file."""
        if self._writer is None:
            return
        # Not SummaryWriter.close(): if its flush fails, it never stops its writer thread.
        file_writer: Any = self._writer.file_writer
        try:
            file_writer.flush()
        finally:
            file_writer.close()


class SharedFile:
    """The event file of the user's SummaryWriter, which stays open."""

    def __init__(self, writer: SummaryWriter) -> None:
        self._writer = writer

    @property
    def log_dir(self) -> str:
        """The folder that TensorBoard shows as the run."""
        return str(self._writer.log_dir)

    def writer(self, first_step: int) -> FileWriter:
        """Returns torch's ``FileWriter``; ``first_step`` is ignored, because the file exists.

        Raises:
            RuntimeError: If the user closed the SummaryWriter.
        """
        # None after SummaryWriter.close(). SummaryWriter's own methods would then open a new file.
        file_writer: FileWriter | None = self._writer.file_writer
        if file_writer is None:
            raise RuntimeError(_CLOSED_SINCE.format(log_dir=self.log_dir))
        return file_writer

    def renew(self) -> None:
        """Does nothing: the file is its owner's."""

    def flush(self) -> None:
        """Blocks until everything is on disk."""
        self._writer.flush()

    def close(self) -> None:
        """Flushes, and leaves the file open for its owner."""
        self._writer.flush()
