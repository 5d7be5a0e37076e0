"""What happens when a program imports the module that is waited for."""

import importlib
import sys
import threading
import traceback

import pytest

from gradwatch.cli.on_import import after_import

NAME = "waited_for_in_this_test"


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that nobody has imported, and the list of what was called."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    (tmp_path / NAME).mkdir()
    (tmp_path / NAME / "__init__.py").write_text("loader = __spec__.loader\nX = 1\n")
    (tmp_path / NAME / "part.py").write_text("Y = 2\n")
    yield tmp_path / NAME / "__init__.py"
    for name in [one for one in sys.modules if one.partition(".")[0] == NAME]:
        del sys.modules[name]


def test_it_is_called_once_when_the_module_is_complete(package):
    """Also where a module inside it is imported first, and again after a reload."""
    seen, finders = [], list(sys.meta_path)
    after_import(NAME, lambda: seen.append(sys.modules[NAME].X))
    assert importlib.import_module(f"{NAME}.part").Y == 2
    importlib.reload(sys.modules[NAME])
    assert seen == [1]
    assert sys.meta_path == finders


def test_the_module_does_not_see_it(package):
    """Its loader is the real one, while it is executed and afterwards."""
    after_import(NAME, lambda: None)
    module = importlib.import_module(NAME)
    assert module.loader is module.__spec__.loader is module.__loader__
    assert type(module.loader).__name__ == "SourceFileLoader"
    assert "exec_module" not in vars(module.loader)


def test_an_import_that_fails_does_not_count(package):
    """The next one does; and the traceback shows nothing in between."""
    good = package.read_text()
    package.write_text("1 / 0\n")
    seen = []
    after_import(NAME, lambda: seen.append(1))
    for _ in range(2):
        with pytest.raises(ZeroDivisionError) as caught:
            exec(f"import {NAME}")
        files = [entry.filename for entry in traceback.extract_tb(caught.value.__traceback__)]
        assert files == [__file__, "<string>", str(package)]
    assert seen == []
    package.write_text(good)  # of another size, so that the compiled file does not fit
    importlib.import_module(NAME)
    assert seen == [1]


def test_one_that_is_there_already_counts_at_once():
    """As where something imports it before any program."""
    seen, finders = [], list(sys.meta_path)
    after_import("json", lambda: seen.append(1))
    assert (seen, sys.meta_path) == ([1], finders)


def test_no_thread_gets_the_module_before(package):
    """A second thread that imports it waits until the call is over."""
    entered, seen = threading.Event(), []

    def second():
        entered.wait()
        importlib.import_module(NAME)
        seen.append("second")

    thread = threading.Thread(target=second)
    thread.start()

    def act():
        entered.set()
        thread.join(0.05)
        seen.append("act")

    after_import(NAME, act)
    importlib.import_module(NAME)
    thread.join()
    assert seen == ["act", "second"]
