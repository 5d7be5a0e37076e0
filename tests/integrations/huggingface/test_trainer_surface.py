"""The public surface of the callback, and what is said where Transformers is missing."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="NOT TESTED: the Trainer (transformers is missing)")

from transformers import TrainerCallback

import gradwatch
import gradwatch_huggingface
from gradwatch.adapters import SharedOptions
from tests.support import processes

WITHOUT = """
import sys
sys.modules["transformers"] = None
import gradwatch_huggingface
try:
    gradwatch_huggingface.GradientMonitorCallback
except ModuleNotFoundError as error:
    print(error)
"""


def test_the_adapter_stays_small():
    """Each of its files is under 300 lines, and the callback is no Watcher."""
    files = Path(gradwatch_huggingface.__file__).parent.glob("*.py")
    assert all(len(file.read_text(encoding="utf-8").splitlines()) < 300 for file in files)
    assert issubclass(gradwatch_huggingface.GradientMonitorCallback, TrainerCallback)
    assert not issubclass(gradwatch_huggingface.GradientMonitorCallback, gradwatch.Watcher)


def test_the_signature_has_every_option_of_watch():
    """It lists the options with the defaults of watch(), and its own; not what the Trainer decides."""
    ours = inspect.signature(gradwatch_huggingface.GradientMonitorCallback).parameters
    watch = inspect.signature(gradwatch.watch).parameters
    shared = set(SharedOptions.__annotations__)
    assert set(ours) == shared | {"log", "log_blocks", "log_statistics"}
    assert all(ours[name].default == watch[name].default for name in shared)


def test_missing_transformers_is_named():
    """Without Transformers the error tells the command that installs it."""
    done = processes.run(code=WITHOUT)
    assert done.returncode == 0, done.stderr
    assert "pip install 'gradwatch[huggingface]'" in done.stdout
