"""The memory of processes, as Linux reports it; 0 on other systems."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def resident_bytes(pid: int | None = None) -> int:
    """Returns the resident memory of a process and its descendants, in bytes.

    Args:
        pid: None for this process.
    """
    pids, pages = [os.getpid() if pid is None else pid], 0
    for one in pids:  # the list grows as children are found
        with suppress(OSError):  # the process may have ended meanwhile
            pages += int(Path(f"/proc/{one}/statm").read_text(encoding="utf-8").split()[1])
            for task in Path(f"/proc/{one}/task").iterdir():
                pids += map(int, (task / "children").read_text().split())
    return pages * os.sysconf("SC_PAGE_SIZE") if pages else 0


def peak_resident_bytes() -> int:
    """Returns the peak resident memory of this process, in bytes."""
    # Not ru_maxrss: a child process inherits the value of its parent.
    status = Path("/proc/self/status")
    return (
        int(status.read_text(encoding="utf-8").split("VmHWM:")[1].split()[0]) * 1024
        if status.exists()
        else 0
    )
