"""The lock that keeps two processes from writing into one run folder."""

from __future__ import annotations

import errno
import os
import platform
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gradwatch.pickles import stable_name
from gradwatch.record.folder.files import remove_quietly

LOCK = ".lock"
"""Name of the file that is locked; the leading dot keeps it out of other tools' listings."""

TAKEN = (
    "{folder!r} is in use: another process{who} writes here; give each run its own folder, such as "
    "{example!r}, or resume this one when that process has ended."
)
TRIES = 100


@stable_name
class WriterLock:
    """The right to write into a run folder, from :meth:`acquire` to :meth:`release`.

    It is an advisory lock of the system's, which goes with the process however that ends, SIGKILL
    included, and which processes that it forks (the workers of a ``DataLoader``) do not keep alive.
    Where there are no such locks, on Windows and on some network file systems, there is no guard.
    """

    def __init__(self, folder: Path) -> None:
        """Names the run folder; locks nothing yet."""
        self._folder = folder
        self._path: Path | None = None

    def acquire(self) -> None:
        """Acquires the right; safe to call again.

        Raises:
            OSError: If the folder cannot be written to.
            ValueError: If another process has it.
        """
        if self._path is not None or sys.platform == "win32":
            return
        path = self._folder.resolve() / LOCK
        held = _held.get(path)
        if held is None or held.process != os.getpid():
            file = self._locked(path, inherited=held is not None)
            held = _held[path] = _Held(os.getpid(), file, 0)
        held.owners += 1
        self._path = path

    def release(self) -> None:
        """Gives the right back; safe to call again, and in a process that was forked since."""
        path, self._path = self._path, None
        held = None if path is None else _held.get(path)
        if path is None or held is None or held.process != os.getpid():
            return
        held.owners -= 1
        if not held.owners:
            del _held[path]
            _unlock(path, held.file)

    def _locked(self, path: Path, *, inherited: bool) -> int | None:
        """Locks the file; None where that cannot be done, or our parent has done it."""
        for _ in range(TRIES):
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                locked = _lock(file)
            except BlockingIOError:
                who = _who(file)
                os.close(file)
                if inherited:  # a launcher's fork trains where its parent was to
                    return None
                raise ValueError(self._taken(who)) from None
            if not locked:
                os.close(file)
                remove_quietly(path)
                return None
            if _is_at(path, file):
                _sign(file)
                return file
            os.close(file)  # its owner has removed it between our opening and our locking
        return None

    def _taken(self, who: str) -> str:
        folder = str(self._folder)
        return TAKEN.format(folder=folder, who=who, example=f"{folder}-2")


@dataclass(slots=True)
class _Held:
    """A lock that this process, or the one that it was forked from, has.

    Attributes:
        process: Whose it is.
        file: The open file; None where the system or the disk has no locks.
        owners: How many run folders of that process share it.
    """

    process: int
    file: int | None
    owners: int


# A process may open its folder again: resumed, fitted again, a cell run twice. They share one open
# file, as closing any other that the process has of it would free the lock (POSIX).
_held: dict[Path, _Held] = {}


def _lock(file: int) -> bool:
    """Locks a file; False where nothing can be locked.

    Raises:
        BlockingIOError: If another process has locked it.
    """
    import fcntl  # there is none on Windows

    try:
        # Not flock(), which a forked worker that outlives its killed parent would go on holding.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise BlockingIOError from error
        return False
    return True


def _unlock(path: Path, file: int | None) -> None:
    """Removes the file while it is locked, so that nobody locks one that is about to go."""
    if file is not None:
        if _is_at(path, file):  # and not that of another process, in a folder that was made anew
            remove_quietly(path)
        with suppress(OSError):
            os.close(file)


def _is_at(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file))
    except OSError:
        return False


def _sign(file: int) -> None:
    """Writes who we are; on a full disk the lock stands without a name."""
    with suppress(OSError):
        os.ftruncate(file, 0)
        os.pwrite(file, f"{os.getpid()} {platform.node()}\n".encode(), 0)


def _who(file: int) -> str:
    """Reads who has the lock; nothing where that is not written."""
    with suppress(OSError, ValueError):
        process, _, host = os.pread(file, 300, 0).decode().strip().partition(" ")
        if process.isdigit():
            elsewhere = f" on {host}" if host and host != platform.node() else ""
            return f" (pid {process}{elsewhere})"
    return ""
