"""What one rank does: joins the group, calls its function, leaves the result in a file.

`launch.py` runs this file by its path, with `TASK` among its globals.
"""

import faulthandler
import gc
import importlib
import multiprocessing.connection
import os
import pickle
import signal
import sys
import threading
import traceback
import types
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import gradwatch

TESTS = Path(__file__).resolve().parents[1]
# As in pyproject.toml: of torch 2.4, inside its own checkpoint().
WARNINGS_OF_TORCH = [".torch.cpu.amp.autocast"]
LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


def run(task: dict[str, Any]) -> None:
    """Carry out a task, and end the process; a rank that failed waits for its end."""
    gc.freeze()  # what the server had imported: see tests/conftest.py
    folder, rank = Path(task["folder"]), task["rank"]
    stack = (folder / f"{rank}.stack").open("w", encoding="utf-8")
    faulthandler.register(signal.SIGUSR1, stack, chain=True)
    threading.Thread(target=_die_with_the_tests, daemon=True).start()
    try:
        result = _call(task, folder)
        _write(folder / f"{rank}.result", pickle.dumps(result))
        _wait_for_all(task, folder)
    except BaseException:
        _write(folder / f"{rank}.error", traceback.format_exc().encode())
        # Were it to end here, its connections would break, and the other ranks fail of that.
        while True:
            signal.pause()
    os._exit(0)


def _die_with_the_tests() -> None:
    """End the process where the launcher has been killed, and cannot."""
    multiprocessing.connection.wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _call(task: dict[str, Any], folder: Path) -> Any:
    if gradwatch.__file__ != task["gradwatch_file"]:
        raise ImportError(f"{gradwatch.__file__} is not the gradwatch under test")
    warnings.simplefilter("error")
    for message in WARNINGS_OF_TORCH:
        warnings.filterwarnings("ignore", message)
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", LOOPBACK)
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(str(folder / "store"), task["ranks"]),
        rank=task["rank"],
        world_size=task["ranks"],
        timeout=timedelta(minutes=10),  # a hang is for the launcher to end
    )
    function = _find(Path(task["file"]), task["function"])
    (folder / f"{task['rank']}.began").touch()
    return function(**task["arguments"])


def _find(file: Path, function: str) -> Callable[..., Any]:
    """Return the function of a test file, whose relative imports work as under pytest."""
    root = types.ModuleType("tests")
    root.__path__ = [str(TESTS)]
    sys.modules["tests"] = root
    relative = file.resolve().relative_to(TESTS).with_suffix("")
    return getattr(importlib.import_module(".".join(("tests", *relative.parts))), function)


def _wait_for_all(task: dict[str, Any], folder: Path) -> None:
    """Keep the connections open until no rank needs them any more."""
    store = dist.FileStore(str(folder / "store_of_the_ends"), task["ranks"])
    store.set(str(task["rank"]), "done")
    store.wait([str(rank) for rank in range(task["ranks"])])


def _write(file: Path, content: bytes) -> None:
    """Write a file that is either not there or whole."""
    draft = file.with_suffix(".draft")
    draft.write_bytes(content)
    draft.rename(file)


if __name__ == "rank":
    run(TASK)  # noqa: F821
