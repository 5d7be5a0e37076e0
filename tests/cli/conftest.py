"""Fixtures of the command line's tests."""

import os
import shutil
from typing import NamedTuple

import pytest

from gradwatch.cli import main

from .runs import HOSTILE, train


class Ran(NamedTuple):
    """What a command did."""

    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    """Nothing here tests a power failure."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture
def command(capsys):
    """Runs a command in this process."""

    def run(*arguments):
        capsys.readouterr()
        code = main([str(one) for one in arguments])
        return Ran(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def _runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    train(folder / "good")
    train(folder / "sick", 120, lr=0.2, clip=2.0, nan=77)
    train(folder / "hostile", 30, names=HOSTILE, nan=10)
    return folder


@pytest.fixture
def runs(_runs, tmp_path, monkeypatch):
    """A folder with the runs `good`, `sick` (NaN in step 77) and `hostile`; we are in it."""
    shutil.copytree(_runs, tmp_path / "runs")
    monkeypatch.chdir(tmp_path / "runs")
    return tmp_path / "runs"
