"""Runs a function of a test file on several ranks at once, and returns what each of them returned.

Each rank is a fresh process, forked from a server that has imported torch already: it starts in
milliseconds, and leaves nothing behind for the next test. A rank finds the function by the path
of its file, so that `tests` need not be on the path.
"""

import contextlib
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.util
import os
import pickle
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import gradwatch
from tests.support import processes

TIMEOUT = 300.0  # a hang, and no measure of what a slow machine takes
GRACE = 2.0  # for the other ranks, once one has failed
STACK_TIMEOUT = 30.0
LONGEST_FOLDER = 60  # a socket's path has 107 characters at most, and multiprocessing adds 32
RANK_FILE = Path(__file__).with_name("rank.py")
# What takes long to import, and starts no thread: a process with threads must not be forked.
PRELOADED = [
    "numpy",
    "pandas",
    "torch",
    "torch._dynamo",
    "torch.distributed.algorithms.ddp_comm_hooks.default_hooks",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.debug",
    "torch.distributed.tensor.parallel",
    "torch.nn.parallel",
    "gradwatch.history",
    "gradwatch.testing",
]


class RankError(AssertionError):
    """A rank failed, died or hung; the message holds its traceback."""


class CrashedError(RankError):
    """A rank died of a signal."""


def on_ranks(
    job: Callable[..., Any], ranks: int, *, timeout: float = TIMEOUT, **arguments: Any
) -> list[Any]:
    """Call `job(**arguments)` on every rank of a fresh gloo group, and return the results by rank.

    The job is a module-level function; arguments and results are what pickle can carry. The timeout
    is for the job alone: it counts from where the last rank has joined the group.

    A rank that dies of a signal is given a second chance: torch's own reducer crashes in about one
    of a thousand such groups, watched or not. What is ours would crash again.
    """
    try:
        return _on_ranks(job, ranks, timeout, arguments)
    except CrashedError as error:
        print(f"{error}\nonce more:", file=sys.stderr)
        return _on_ranks(job, ranks, timeout, arguments)


@contextlib.contextmanager
def mesh_of_one() -> Iterator[DeviceMesh]:
    """Make this process a group by itself, with its mesh; what is sharded over it is whole."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield init_device_mesh("cpu", (1,))
    finally:
        dist.destroy_process_group()


def _on_ranks(
    job: Callable[..., Any], ranks: int, timeout: float, arguments: dict[str, Any]
) -> list[Any]:
    with tempfile.TemporaryDirectory(prefix="ranks-") as name:
        folder = Path(name)
        processes = [_start(job, rank, ranks, folder, arguments) for rank in range(ranks)]
        try:
            _wait(processes, folder, TIMEOUT, _has_started)
            _wait(processes, folder, timeout, _has_ended)
            _raise_what_failed(processes, folder, timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()
        return [pickle.loads((folder / f"{rank}.result").read_bytes()) for rank in range(ranks)]


def _start(
    job: Callable[..., Any], rank: int, ranks: int, folder: Path, arguments: dict[str, Any]
) -> Any:
    _make_room_for_sockets()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with mock.patch.dict(os.environ, processes.environment()):  # its own sys.path it may not have
        multiprocessing.forkserver.ensure_running()
    task = {
        "file": sys.modules[job.__module__].__file__,
        "function": job.__qualname__,
        "arguments": arguments,
        "rank": rank,
        "ranks": ranks,
        "folder": str(folder),
        "gradwatch_file": gradwatch.__file__,
    }
    process = context.Process(
        target=runpy.run_path,
        args=(str(RANK_FILE),),
        kwargs={"init_globals": {"TASK": task}, "run_name": "rank"},
        daemon=True,
    )
    process.start()
    return process


def _make_room_for_sockets() -> None:
    """Have multiprocessing, which keeps its sockets in one folder, choose one with a short path."""
    if len(tempfile.gettempdir()) > LONGEST_FOLDER:
        with mock.patch.object(tempfile, "tempdir", "/tmp"):
            multiprocessing.util.get_temp_dir()


def _wait(
    processes: list[Any], folder: Path, timeout: float, is_done: Callable[[Any, Path, int], bool]
) -> None:
    """Wait until all ranks are done, or one has failed and the others have had their grace."""
    failed, deadline = False, time.monotonic() + timeout
    while time.monotonic() < deadline:
        if all(is_done(process, folder, rank) for rank, process in enumerate(processes)):
            return
        if not failed and _any_failed(processes, folder):
            failed, deadline = True, min(deadline, time.monotonic() + GRACE)
        time.sleep(0.01)


def _has_started(process: Any, folder: Path, rank: int) -> bool:
    began = (folder / f"{rank}.began").exists()
    return began or process.exitcode is not None or (folder / f"{rank}.error").exists()


def _has_ended(process: Any, folder: Path, rank: int) -> bool:
    return process.exitcode is not None or (folder / f"{rank}.error").exists()


def _any_failed(processes: list[Any], folder: Path) -> bool:
    dead = any(process.exitcode not in (None, 0) for process in processes)
    return dead or any(folder.glob("*.error"))


def _raise_what_failed(processes: list[Any], folder: Path, timeout: float) -> None:
    failed = _any_failed(processes, folder)
    crashed = any((process.exitcode or 0) < 0 for process in processes)
    stories = []
    for rank, process in enumerate(processes):
        error = folder / f"{rank}.error"
        if error.exists():
            stories.append(f"rank {rank} raised\n" + error.read_text(encoding="utf-8"))
        elif process.exitcode not in (None, 0):
            stories.append(f"rank {rank} died with exit code {process.exitcode}")
        elif process.exitcode is None and not failed:
            stack = _stack(process, folder / f"{rank}.stack")
            stories.append(f"rank {rank} had not ended after {timeout:g} s\n{stack}")
    if stories:
        raise (CrashedError if crashed else RankError)("\n\n".join(stories))


def _stack(process: Any, file: Path) -> str:
    if not file.exists():
        return "(it never started)"
    os.kill(process.pid, signal.SIGUSR1)  # it writes its stack, and dies
    process.join(STACK_TIMEOUT)
    return file.read_text(encoding="utf-8")
