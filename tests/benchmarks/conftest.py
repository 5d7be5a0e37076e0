"""The modules beside the scripts are found as they are when these run."""

from __future__ import annotations

from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def beside_the_scripts(monkeypatch):
    """Puts their folder on the path."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
