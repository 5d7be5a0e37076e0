"""Starts Python on the packages under test, wherever this process has them from.

Out of the checkout nothing is installed, and out of the wheel nothing is beside the tests: both
are found, and only they, by what is put on `PYTHONPATH` here.
"""

import os
import subprocess
import sys
import textwrap
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from site import getsitepackages
from typing import Any

HANG_S = 600.0  # what has not ended by then never will
PACKAGES = ("gradwatch", "gradwatch_dashboard", "gradwatch_lightning", "gradwatch_tensorboard")


def environment(
    path: Sequence[object] = (), base: Mapping[str, str] = os.environ, **variables: str
) -> dict[str, str]:
    """Return the environment of a process that imports the packages under test.

    Args:
        path: Folders that come before them on the path.
        base: The environment that is changed.
        **variables: Further changes.
    """
    specs = filter(None, map(find_spec, PACKAGES))
    ours = {str(Path(spec.origin).parents[1]): None for spec in specs}
    folders = [*map(str, path), *(folder for folder in ours if folder not in getsitepackages())]
    return {
        **base,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(folders),
        **variables,
    }


def start(*command: object, code: str = "", **options: Any) -> "subprocess.Popen[Any]":
    """Start Python, and return the process.

    Args:
        *command: What follows `python`: a script and its arguments, or those of the code.
        code: A program, indented or not, in the place of a script.
        **options: Those of `subprocess.Popen`; the environment is that of :func:`environment`.
    """
    before = ["-c", textwrap.dedent(code)] if code else []
    options = {"env": environment(), **options}
    return subprocess.Popen([sys.executable, *before, *map(str, command)], **options)


def run(*command: object, code: str = "", **options: Any) -> "subprocess.CompletedProcess[str]":
    """Run Python to its end as :func:`start` does, and return what it printed and its exit code."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    with start(*command, code=code, **options) as process:
        try:
            out, err = process.communicate(timeout=HANG_S)
        finally:
            process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
