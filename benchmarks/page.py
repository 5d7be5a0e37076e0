"""Shared by the pages of results: tables, a description of the machine, progress messages."""

from __future__ import annotations

import os
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = (
    "gradwatch",
    "numpy",
    "pandas",
    "pyarrow",
    "tensorboard",
    "lightning",
    "pytorch-ignite",
    "wandb",
)
STARTED = time.perf_counter()


def say(text: str) -> None:
    """Prints a line with the time since the start, without buffering."""
    minutes, seconds = divmod(int(time.perf_counter() - STARTED), 60)
    print(f"[{minutes:2d}:{seconds:02d}] {text}", flush=True)


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Formats a table in Markdown."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine_rows(device: str, threads: int, clock: str) -> list[tuple[str, str]]:
    """Describes where and how the numbers were measured.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        threads: Number of threads of PyTorch.
        clock: Name of the clock that timed the steps.
    """
    rows = [
        ("begun", f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC"),
        ("command", command()),
        ("processor", f"{_processor()}, {_cores()} cores, {platform.machine()}"),
        ("system", f"{platform.system()} {platform.release().split('-')[0]}{_memory()}"),
        ("load at the start", _load()),
        ("threads, clock", f"{threads}, {clock}"),
        ("Python, torch", f"{platform.python_version()}, {torch.__version__}"),
        ("packages", ", ".join(filter(None, map(_package, PACKAGES)))),
    ]
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        size = f"{properties.total_memory / 2**30:.0f} GiB"
        rows.insert(2, ("GPU", f"{properties.name}, {size}, CUDA {torch.version.cuda}"))
    return rows


def command() -> str:
    """Returns the command line of this process, as typed in the repository."""
    folder = Path(sys.argv[0]).parent  # `python -m` puts the path of __main__.py there
    arguments = ["-m", f"{folder.parent.name}.{folder.name}", *sys.argv[1:]]
    return "`python " + " ".join(map(shlex.quote, arguments)) + "`"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text(encoding="utf-8").splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0


def _memory() -> str:
    if not hasattr(os, "sysconf"):
        return ""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f", {total / 2**30:.0f} GiB of memory"


def _load() -> str:
    if not hasattr(os, "getloadavg"):
        return "unknown"
    return f"{os.getloadavg()[0]:.1f} runnable processes, averaged over the last minute"


def _package(name: str) -> str | None:
    try:
        return f"{name} {version(name)}"
    except PackageNotFoundError:
        return None
