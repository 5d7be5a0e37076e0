"""The adapter's public surface."""

from __future__ import annotations

from pathlib import Path

import gradwatch_lightning


def test_the_package_exports_the_monitor_alone():
    """GradientMonitor is the one public name."""
    assert gradwatch_lightning.__all__ == ["GradientMonitor"]


def test_the_adapter_stays_small():
    """An adapter is under 300 lines and subclasses no Watcher."""
    from lightning.pytorch import Callback

    from gradwatch import Watcher

    files = Path(gradwatch_lightning.__file__).parent.glob("*.py")
    assert all(len(file.read_text(encoding="utf-8").splitlines()) < 300 for file in files)
    assert issubclass(gradwatch_lightning.GradientMonitor, Callback)
    assert not issubclass(gradwatch_lightning.GradientMonitor, Watcher)
