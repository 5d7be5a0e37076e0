"""Which rank of a launch this process is, and the run folder on which the ranks agree."""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from itertools import count
from pathlib import Path

from gradwatch.cli.locate import UsageError
from gradwatch.cli.program import Program

_RANKS = (
    ("RANK", "WORLD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),  # SLURM_NTASKS is there outside of srun as well
)
"""The variables of torchrun and what builds on it, Open MPI, other MPIs, and srun."""

RUNS = Path("runs")

NO_PLACE = "{option} {place} cannot be written to: {error}. Name another folder."

_TRIES = 3


def rank_and_size(environment: Mapping[str, str]) -> tuple[int, int]:
    """Returns the rank of this process and the number of ranks: 0 and 1 without a launch."""
    # torch.distributed cannot be asked: it may not be there yet, or not any more.
    for rank, size in _RANKS:
        known = environment.get(rank, ""), environment.get(size, "")
        if all(one.isdecimal() for one in known):
            return int(known[0]), int(known[1])
    return 0, 1


def default_folder(program: Program, environment: Mapping[str, str]) -> Path:
    """Returns the folder of a run that has not been given one: ``runs/train-20261130-155200``.

    All ranks of a launch on one machine get the same, without talking to each other: the time is
    that at which their launcher has started.
    """
    size = rank_and_size(environment)[1]
    started = _formatted(time.time()) if size == 1 else _launched()
    again = environment.get("TORCHELASTIC_RESTART_COUNT", "0")
    suffix = "" if size == 1 or again == "0" else f"-{again}"
    return RUNS / f"{_name(program)}-{started}{suffix}"


def writable(option: str, place: str) -> str:
    """Returns the absolute path of a folder that is to be written to.

    Args:
        option: What has named the place, for the error.
        place: The folder, which need not exist. An address like ``gs://...``, to which TensorBoard
            writes, stays as it is.

    Raises:
        UsageError: If the folder cannot be made, or nothing can be written to it.
    """
    if "://" in place:
        return place
    folder = Path.cwd() / place
    try:
        _try_to_write(folder)
    except OSError as error:
        text = NO_PLACE.format(option=option, place=place, error=error.strerror)
        raise UsageError(text) from None
    return str(folder)


def _try_to_write(folder: Path) -> None:
    """Makes a folder inside of another one; leaves nothing behind, as the program may look."""
    # Permissions do not tell: root may do everything, but not on a disk that is read-only.
    new, missing = folder / f".gradwatch-{os.getpid()}", []
    try:
        missing = [one for one in (folder, *folder.parents) if not one.exists()]
        for left in reversed(range(_TRIES)):
            try:
                new.mkdir(parents=True, exist_ok=True)
                break
            except FileNotFoundError:  # another run has just removed a parent that it had made
                if not left:
                    raise
    finally:
        for one in (new, *missing):
            with suppress(OSError):  # another run has made it meanwhile, and put something in it
                one.rmdir()


def reserve(folder: Path) -> Path:
    """Makes a new folder, with ``-1`` behind its name if there is one already; returns its path.

    Raises:
        OSError: If no folder can be made there.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    for number in count():
        path = folder.with_name(f"{folder.name}-{number}") if number else folder
        with suppress(FileExistsError):  # two runs may have started in the same second
            path.mkdir()
            return path
    raise AssertionError  # count() has no end


def give_back(folder: Path) -> None:
    """Removes a folder of :func:`reserve` in which nothing was written."""
    with suppress(OSError):  # one of them is not empty, or gone
        folder.rmdir()
        folder.parent.rmdir()


def _name(program: Program) -> str:
    names = {"code": "code", "stdin": "stdin", "module": program.name}
    name = names.get(program.kind)
    if name is None:
        name = Path(program.name).absolute().stem
    return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip("-.")[:80] or "program"


def _formatted(seconds: float) -> str:
    return time.strftime("%Y%m%d-%H%M%S", time.localtime(seconds))


def _launched() -> str:
    parent = os.getppid()
    if sys.platform == "linux":
        try:
            return _formatted(_started_s(parent))
        except (OSError, ValueError, IndexError):
            pass
    # The system does not tell when: its number says as well which launch it was.
    return f"{_formatted(time.time())[:8]}-p{parent}"


def _started_s(process: int) -> int:
    """Returns when a process has started, in whole seconds: each rank has to get the same."""
    # The name in parentheses may hold anything; it is field 2, and the start is field 22.
    ticks = int(Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()[19])
    system = Path("/proc/stat").read_bytes().splitlines()
    booted = next(int(line.split()[1]) for line in system if line.startswith(b"btime "))
    return booted + ticks // os.sysconf("SC_CLK_TCK")
