"""The benchmarks are found as they are when they run from the repository."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def from_the_repository(monkeypatch):
    """Puts the repository on the path; a test of the wheel runs without it."""
    monkeypatch.syspath_prepend(str(ROOT))
