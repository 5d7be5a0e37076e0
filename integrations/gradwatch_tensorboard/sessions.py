"""Sessions: a name for each process that writes a run, in the order in which they began."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

_begun = [0]


def new_session(log_dir: str) -> str:
    """Names a session, later than all that this process or another has begun in the folder.

    Where the clock was set back since, or two begin in one millisecond, the name is that of the
    millisecond after the newest event file was written to.

    Args:
        log_dir: The folder of the run, or an address like ``gs://...``.

    Returns:
        Milliseconds since 1970, 12 hexadecimal digits.
    """
    now = int(time.time() * 1000)
    _begun.append(max(now, _newest_file(log_dir) + 1, _begun.pop() + 1))
    return f"{_begun[-1]:012x}"


def _newest_file(log_dir: str) -> int:
    newest = 0
    if "://" not in log_dir:
        for path in Path(log_dir).glob("*tfevents*"):
            with suppress(OSError):  # another process may remove it
                newest = max(newest, path.stat().st_mtime_ns // 1_000_000)
    return newest
