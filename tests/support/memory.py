"""The memory of processes, as Linux tells it.

`benchmarks/memory.py` has a reader of its own: the benchmarks run without the tests.
"""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

# For the start of a script that runs in a process of its own, and so cannot import the tests.
LIMIT_MEMORY = """
import resource

def limit_memory(further):
    with open("/proc/self/statm") as file:
        in_use = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + further, resource.RLIM_INFINITY))
"""


def resident_bytes(pid: int) -> int:
    """Return the memory in RAM of a process and of those below it."""
    pids, pages = [pid], 0
    for one in pids:  # grows as children are found
        with suppress(OSError):  # it has ended meanwhile
            pages += int(Path(f"/proc/{one}/statm").read_text(encoding="utf-8").split()[1])
            for task in Path(f"/proc/{one}/task").iterdir():
                pids += map(int, (task / "children").read_text(encoding="utf-8").split())
    return pages * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def no_collector() -> Iterator[None]:
    """Turn the garbage collector off: what goes goes by its count of references."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
