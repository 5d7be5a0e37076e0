"""Fixtures of the run folder's tests."""

import os

import pytest


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    """Nothing here tests a power failure, and a shared disk takes 10 ms to sync."""
    monkeypatch.setattr(os, "fsync", lambda file: None)
