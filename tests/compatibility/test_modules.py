"""After the move: pickles that are made now name no module inside of gradwatch.

Meant for `tests/compatibility/test_modules.py`.
"""

import inspect
import pickle
import pickletools

import pytest

import gradwatch
import gradwatch.testing

from .answers import DATA
from .pickles import in_folder

OF_THE_ADAPTERS = ("gradwatch_lightning", "gradwatch_tensorboard")
PUBLIC = [name for name in gradwatch.__all__ if inspect.isclass(getattr(gradwatch, name))]
NOT_PUBLIC = ("CommandError", "TooManySkipsError", "classes")
"""Files of what only gradwatch itself catches, and of classes and functions by name."""

FILES = sorted(
    file.stem for file in (DATA / "pickles").glob("*.pickle") if file.stem not in NOT_PUBLIC
)


@pytest.fixture(autouse=True)
def _folder():
    """Works where the run is whose history was pickled."""
    with in_folder(DATA / "folders"):
        yield


def modules_in(raw):
    """The modules of all globals that a pickle names."""
    modules, strings, memo, top = set(), [], [], None
    for code, argument, _ in pickletools.genops(raw):
        if code.name == "GLOBAL":
            modules.add(argument.split(" ")[0])
        elif code.name == "STACK_GLOBAL":
            modules.add(strings[-2])
        if code.name == "MEMOIZE":
            memo.append(top)
            continue
        top = argument if "UNICODE" in code.name else None
        if code.name in ("BINGET", "LONG_BINGET"):
            top = memo[argument]
        if isinstance(top, str):
            strings.append(top)
    return modules


def inner(modules):
    """Those that are inside of the package; `gradwatch.testing` is a public module."""
    ours = {module for module in modules if module.startswith("gradwatch.")}
    return sorted(ours - {"gradwatch.testing"})


@pytest.mark.parametrize("name", PUBLIC)
def test_a_public_class_is_of_the_package_itself(name):
    """A public class says that it is of `gradwatch`, and is pickled by that name."""
    kind = getattr(gradwatch, name)
    assert kind.__module__ == "gradwatch"
    assert modules_in(pickle.dumps(kind, protocol=4)) == {"gradwatch"}


@pytest.mark.parametrize("name", [name for name in gradwatch.__all__ if name not in PUBLIC])
def test_a_public_function_is_of_the_package_itself(name):
    """A public function says that it is of `gradwatch`, and is pickled by that name."""
    function = getattr(gradwatch, name)
    assert function.__module__ == "gradwatch"
    assert modules_in(pickle.dumps(function, protocol=4)) == {"gradwatch"}


@pytest.mark.parametrize("name", FILES)
def test_a_fresh_pickle_names_no_inner_module(name):
    """What was loaded from an old pickle is pickled by public names, all that it holds included."""
    value = pickle.loads((DATA / "pickles" / f"{name}.pickle").read_bytes())
    assert inner(modules_in(pickle.dumps(value, protocol=4))) == []


def test_a_fresh_pickle_of_an_adapter_names_the_package():
    """The adapters' classes may name the modules of their packages, but none inside of gradwatch."""
    for name in ("GradientMonitor", "TensorBoardWriter"):
        value = pickle.loads((DATA / "pickles" / f"{name}.pickle").read_bytes())
        modules = modules_in(pickle.dumps(value, protocol=4))
        assert any(module.startswith(OF_THE_ADAPTERS) for module in modules)
        assert inner(modules) == []
