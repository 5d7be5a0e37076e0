"""What holds for all tests."""

import gc
import importlib
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.support import stand_ins
from tests.support.places import HOST, LATE, Place

# How long an example takes says how busy the machine is, and nothing about the code.
settings.register_profile(
    "any machine", settings(), deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("any machine")

DEVICE_TESTS = Path(__file__).parent / "device"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds --device, which runs tests/device and nothing else."""
    parser.addoption(
        "--device",
        metavar="NAME",
        help="run tests/device, and only that, on the stand-in 'fake' or 'mini', or on 'cuda'",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Makes the device known to torch, before anything runs a backward; the C++ one is compiled."""
    name = config.getoption("--device")
    if not name or stand_ins.missing(name):
        return
    os.environ[stand_ins.VARIABLE] = name
    # Without a cache of pytest's (-p no:cacheprovider) it is torch's folder for extensions.
    if cache := getattr(config, "cache", None):
        folder = cache.mkdir("extensions")
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(folder))
    importlib.import_module("tests.support.device")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Keeps the device's tests, which are about the whole process, apart from the others."""
    name = config.getoption("--device")
    path = collection_path.resolve()
    is_device_test = path == DEVICE_TESTS or DEVICE_TESTS in path.parents
    if not name:
        return True if is_device_test else None
    leads_there = path in DEVICE_TESTS.parents
    wanted = (is_device_test or leads_there) and not stand_ins.missing(name)
    return None if wanted else True


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Lets a session pass whose device this machine cannot have; the summary says so."""
    name = session.config.getoption("--device")
    if (
        session.exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED
        and name
        and stand_ins.missing(name)
    ):
        session.exitstatus = pytest.ExitCode.OK


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Says in red that the tests of a device were not run."""
    name = config.getoption("--device")
    if name and (reason := stand_ins.missing(name)):
        terminalreporter.write_sep("=", "NOT TESTED", red=True, bold=True)
        terminalreporter.write_line(f"tests/device was not run on {name}: {reason}", red=True)


def pytest_collection_finish() -> None:
    """Takes what is there for good, a million objects, from the garbage collector.

    A watcher that was given no scaler looks through the collector's objects for one, in its first
    backward. Without this, that and the collector itself would take a third of the suite's time.
    """
    gc.collect()
    gc.freeze()


# The tests that take one of these places run in `tests/device` as well, on the device.


@pytest.fixture(scope="session", params=[HOST, LATE], ids=str)
def place(request: pytest.FixtureRequest) -> Place:
    """Gives each place in turn: the host, and the host treated like a device."""
    return request.param


@pytest.fixture(scope="session")
def away() -> Place:
    """Gives a place whose numbers come late: the host treated like a device."""
    return LATE


@pytest.fixture(scope="session")
def machine() -> Place:
    """Gives what a session runs with: the host."""
    return HOST
