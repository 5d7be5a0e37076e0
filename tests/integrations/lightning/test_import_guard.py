"""The package says what to install where Lightning is missing."""

from __future__ import annotations

import importlib
import sys

import pytest


@pytest.fixture
def _fresh_import(monkeypatch):
    """Forgets the package for the length of a test."""
    for name in [name for name in sys.modules if name.startswith("gradwatch_lightning")]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.usefixtures("_fresh_import")
def test_missing_lightning_is_named(monkeypatch):
    """Without Lightning the error tells the command that installs it."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "lightning"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [_Missing("lightning"), *sys.meta_path])

    with pytest.raises(
        ModuleNotFoundError, match=r"pip install 'gradwatch\[lightning\]'"
    ) as caught:
        importlib.import_module("gradwatch_lightning")

    assert caught.value.name == "lightning"


@pytest.mark.usefixtures("_fresh_import")
def test_another_missing_module_keeps_its_own_message(monkeypatch):
    """A dependency that is missing inside Lightning is not taken for Lightning."""
    monkeypatch.setattr(sys, "meta_path", [_Missing("lightning.pytorch.broken"), *sys.meta_path])
    monkeypatch.setitem(sys.modules, "gradwatch_lightning.monitor", None)

    with pytest.raises(ModuleNotFoundError) as caught:
        importlib.import_module("gradwatch_lightning")

    assert "pip install" not in str(caught.value)


class _Missing:
    """A finder that finds one module missing."""

    def __init__(self, name):
        self.name = name

    def find_spec(self, fullname, path=None, target=None):
        if fullname == self.name:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)
