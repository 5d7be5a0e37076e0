"""Fixtures of the command line's tests."""

import json
import os
import shutil
from typing import NamedTuple

import pytest

from gradwatch.cli.main import TRACEBACK, main

from .runs import HOSTILE, train

UNPRIVILEGED = 65534


class Ran(NamedTuple):
    """What a command did."""

    code: int
    out: str
    err: str


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    """Nothing here tests a power failure."""
    monkeypatch.setattr(os, "fsync", lambda file: None)


@pytest.fixture(autouse=True)
def _a_shell_like_any_other(monkeypatch):
    """The help is as wide as the terminal; here that has 80 columns, and no colours are forced."""
    monkeypatch.setenv("COLUMNS", "80")
    for name in ("FORCE_COLOR", TRACEBACK):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def command(capsys):
    """Runs a command in this process."""

    def run(*arguments):
        capsys.readouterr()
        code = main([str(one) for one in arguments])
        return Ran(code, *capsys.readouterr())

    return run


@pytest.fixture
def unprivileged(tmp_path):
    """Runs something without root's rights, in a fork of this process where we are root."""
    if os.geteuid() != 0:
        return lambda act: act()
    for path in tmp_path.rglob("*"):  # pytest makes them for its own user only; we are in there
        path.chmod(path.stat().st_mode | (0o055 if path.is_dir() else 0o044))

    def run(act):
        act()  # what is imported when used may lie out of reach below
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            try:
                os.setgroups([])
                os.setgid(UNPRIVILEGED)
                os.setuid(UNPRIVILEGED)
                os.write(writing, json.dumps(act()).encode())
            finally:
                os._exit(0)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            told = pipe.read()
        os.waitpid(child, 0)
        return Ran(*json.loads(told))

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
