"""The script for a real GPU runs here, dry: on a CPU that is treated like a device."""

import json

import pytest

import tests.gpu.checks  # noqa: F401 - registers them
from tests.gpu import check
from tests.gpu.place import Place
from tests.gpu.registry import CHECKS, Skipped, require
from tests.support import processes

pytestmark = pytest.mark.slow

NEEDS_A_DEVICE = {
    "streams",
    "two_devices_accumulate",
    "two_devices_clip",
    "two_devices_skip",
    "two_devices_watched",
}
"""What says only when it runs that a CPU alone will not do."""


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """One dry run of everything: the process, and what it wrote."""
    found = tmp_path_factory.mktemp("gpu") / "found.json"
    done = processes.run(check.__file__, "--dry", "--json", found, "--budget", 1e9)
    assert found.exists(), done.stderr
    return done, json.loads(found.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", CHECKS)
def test_every_check_passes_dry(dry, name):
    """What a CPU can settle holds on it; what it cannot is skipped with a reason."""
    needs = CHECKS[name].cuda or CHECKS[name].devices > 1 or name in NEEDS_A_DEVICE
    result = dry[1]["checks"][name]
    assert result["status"] == ("SKIP" if needs else "PASS"), result["detail"]


def test_the_run_ends_well(dry):
    """Its last line counts the checks, and the exit code is 0."""
    done, found = dry
    assert done.returncode == 0, done.stdout
    assert sum(found["counts"].values()) == len(CHECKS)
    assert done.stdout.splitlines()[-1].startswith(str(found["counts"]))


def _with(monkeypatch, run):
    """Registers a check for the length of a test; returns what becomes of it."""
    monkeypatch.setitem(CHECKS, "mine", type(CHECKS["waits"])("mine", run))
    return check.run("mine", Place("cpu", dry=True))


def test_a_check_can_fail(monkeypatch):
    """What does not hold is a failure, with the reason."""

    def mine(place):
        """Fails."""
        require(False, "3 waits")

    assert _with(monkeypatch, mine)[:2] == ("FAIL", "3 waits")


def test_a_check_can_break_off(monkeypatch):
    """An error is told apart from a failure, with its traceback."""

    def mine(place):
        """Breaks off."""
        raise RuntimeError("no kernel image")

    status, detail, _ = _with(monkeypatch, mine)
    assert status == "ERROR"
    assert "no kernel image" in detail


def test_a_check_can_say_that_it_cannot_run(monkeypatch):
    """It is skipped, with the reason."""

    def mine(place):
        """Skips."""
        raise Skipped("needs two hands")

    assert _with(monkeypatch, mine)[:2] == ("SKIP", "needs two hands")


def test_the_list_says_what_is_checked(capsys):
    """--list names every check with a sentence."""
    assert check.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(CHECKS)
    assert all(line.endswith(".") for line in lines)


def test_an_unknown_check_is_refused(capsys):
    """A name that is no check ends the script before anything runs."""
    assert check.main(["--dry", "--only", "wait"]) == 2
    assert "no such check: wait" in capsys.readouterr().err


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    """Without --dry it needs the device, and says how to run without one."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert check.main([]) == 2
    assert "--dry" in capsys.readouterr().err
