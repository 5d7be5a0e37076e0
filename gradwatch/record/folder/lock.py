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
"""Name of the file that is locked; other tools skip names with a leading dot."""

TAKEN = (
    "{folder!r} is in use: another process{who} writes here; give each run its own folder, such as "
    "{example!r}, or resume this one after that process has ended."
)
TRIES = 100


@stable_name
class WriterLock:
    """The right to write into a run folder, held from :meth:`acquire` to :meth:`release`.

    It is an advisory lock of the operating system. The system frees it when the process ends, even
    by SIGKILL, and forked processes (the workers of a ``DataLoader``) do not keep it alive. Windows
    and some network file systems have no such locks; there, nothing stops a second writer.
    """

    def __init__(self, folder: Path) -> None:
        """Locks nothing yet."""
        self._folder = folder
        self._path: Path | None = None

    def acquire(self) -> None:
        """Acquires the lock; does nothing if this object holds it already.

        Raises:
            OSError: If the folder cannot be written to.
            ValueError: If another process holds it.
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
        """Releases the lock; safe to call twice, and in a process that was forked since."""
        path, self._path = self._path, None
        held = None if path is None else _held.get(path)
        if path is None or held is None or held.process != os.getpid():
            return
        held.owners -= 1
        if not held.owners:
            del _held[path]
            _unlock(path, held.file)

    def _locked(self, path: Path, *, inherited: bool) -> int | None:
        """Locks the file; None if there are no locks here, or our parent process holds it."""
        for _ in range(TRIES):
            file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                locked = _lock(file)
            except BlockingIOError:
                who = _who(file)
                os.close(file)
                if inherited:  # a launcher opened the folder, and its forked child trains in it
                    return None
                raise ValueError(self._taken(who)) from None
            if not locked:
                os.close(file)
                remove_quietly(path)
                return None
            if _is_at(path, file):
                _sign(file)
                return file
            os.close(file)  # its owner removed it between our open and our lock: try again
        return None

    def _taken(self, who: str) -> str:
        folder = str(self._folder)
        return TAKEN.format(folder=folder, who=who, example=f"{folder}-2")


@dataclass(slots=True)
class _Held:
    """A lock that this process holds, or the process that it was forked from.

    Attributes:
        process: The pid of the holder.
        file: The open file descriptor; None if the system or the disk has no locks.
        owners: How many ``WriterLock`` objects of that process share it.
    """

    process: int
    file: int | None
    owners: int


# A process may open its folder more than once: a resumed run, a second fit(), a notebook cell run
# twice. They must share one open file: under POSIX, closing any descriptor of a file frees all
# locks that the process holds on it.
_held: dict[Path, _Held] = {}


def _lock(file: int) -> bool:
    """Locks a file; False if the file system has no locks.

    Raises:
        BlockingIOError: If another process has locked it.
    """
    import fcntl  # not available on Windows

    try:
        # Not flock(): a forked worker that outlives its killed parent would still hold the lock.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise BlockingIOError from error
        return False
    return True


def _unlock(path: Path, file: int | None) -> None:
    """Removes the file while it is locked, so that nobody locks a file about to be removed."""
    if file is not None:
        if _is_at(path, file):  # not if the folder was recreated and another process locked it
            remove_quietly(path)
        with suppress(OSError):
            os.close(file)


def _is_at(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file))
    except OSError:
        return False


def _sign(file: int) -> None:
    """Writes our pid and host into the file; on a full disk the lock holds without them."""
    with suppress(OSError):
        os.ftruncate(file, 0)
        os.pwrite(file, f"{os.getpid()} {platform.node()}\n".encode(), 0)


def _who(file: int) -> str:
    """Returns who holds the lock as " (pid ...)"; "" if the file does not say."""
    with suppress(OSError, ValueError):
        process, _, host = os.pread(file, 300, 0).decode().strip().partition(" ")
        if process.isdigit():
            elsewhere = f" on {host}" if host and host != platform.node() else ""
            return f" (pid {process}{elsewhere})"
    return ""
