"""The adapter's public surface."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

import gradwatch
import gradwatch_lightning
from gradwatch.adapters import SharedOptions


def test_the_package_exports_the_monitor_and_the_sink():
    """GradientMonitor and FabricSink are the public names."""
    assert gradwatch_lightning.__all__ == ["FabricSink", "GradientMonitor"]


def test_the_adapter_stays_small():
    """An adapter is under 300 lines and subclasses no Watcher."""
    from lightning.pytorch import Callback

    from gradwatch import Watcher

    files = Path(gradwatch_lightning.__file__).parent.glob("*.py")
    assert all(len(file.read_text(encoding="utf-8").splitlines()) < 300 for file in files)
    assert issubclass(gradwatch_lightning.GradientMonitor, Callback)
    assert not issubclass(gradwatch_lightning.GradientMonitor, Watcher)


def test_the_signature_has_every_option_of_watch():
    """It lists the options with the defaults of watch(), and its own; not the Trainer's scaler."""
    monitor = inspect.signature(gradwatch_lightning.GradientMonitor).parameters
    watch = inspect.signature(gradwatch.watch).parameters
    keywords = {name for name, one in watch.items() if one.kind is one.KEYWORD_ONLY}
    assert set(SharedOptions.__annotations__) == keywords - {"accumulate", "scaler"}
    assert set(monitor) == keywords - {"scaler"} | {"log", "log_blocks", "prog_bar"}
    assert all(
        monitor[name].default == watch[name].default for name in SharedOptions.__annotations__
    )


@pytest.mark.parametrize("name", ["log", "log_blocks", "prog_bar"])
def test_a_flag_that_is_none_is_refused(name):
    """The message has the argument, what it may be, and the value."""
    with pytest.raises(
        TypeError, match=rf"GradientMonitor\({name}=\) must be True or False, got 1\."
    ):
        gradwatch_lightning.GradientMonitor(**{name: 1})


@pytest.mark.parametrize("name", ["clop", "scaler", "optimizer"])
def test_an_unknown_option_is_refused(name):
    """The message names it, and all that there are."""
    with pytest.raises(
        TypeError,
        match=rf"GradientMonitor\(\) got an unexpected argument '{name}'.*: clip, .*curvature",
    ):
        gradwatch_lightning.GradientMonitor(**{name: None})
