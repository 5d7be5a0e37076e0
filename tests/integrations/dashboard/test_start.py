"""TensorBoard's start: fast, without torch, and whatever is missing of the tab."""

import shutil
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest

import gradwatch_dashboard
from gradwatch_dashboard import GradientsLoader
from tests.support import processes
from tests.support.board import LOADERS, Board

from .logs import LogFile, write_run

PACKAGE = Path(gradwatch_dashboard.__file__).parent
MODULES = sorted(path.name for path in PACKAGE.glob("*.py") if path.name != "__init__.py")
LEFT_OUT = "TensorBoard starts without the Gradients tab"

BLOCKER = """
import os, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in os.environ["BLOCKED"].split(","):
            with open(os.environ["ATTEMPTS"], "a") as file:
                print(name, file=file)
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
"""

AS_TENSORBOARD_DOES = """
import sys
from types import SimpleNamespace
from tensorboard.backend.application import make_plugin_loader
from gradwatch_dashboard import GradientsLoader  # what the entry point names
loader = make_plugin_loader(GradientsLoader)
loader.fix_flags(SimpleNamespace(samples_per_plugin={}))
plugin = loader.load(SimpleNamespace(data_provider=SimpleNamespace(list_tensors=None)))
print("plugin", plugin is not None and len(plugin.get_plugin_apps()))
"""


@pytest.fixture
def blocked(tmp_path, monkeypatch):
    """Makes imports fail in the processes that are started, and tells which were tried."""

    def block(*names):
        folder = tmp_path / "blocker"
        folder.mkdir()
        (folder / "sitecustomize.py").write_text(BLOCKER, encoding="utf-8")
        attempts = tmp_path / "attempts"
        attempts.touch()
        monkeypatch.setenv("BLOCKED", ",".join(names))
        monkeypatch.setenv("ATTEMPTS", str(attempts))
        return folder, attempts

    return block


def python(code, *pythonpath):
    """Runs code in a fresh process; what it printed, errors included."""
    done = processes.run(code=code, env=processes.environment(pythonpath))
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.fixture
def copy(tmp_path):
    """A copy of the package from which something can be taken."""
    target = tmp_path / "copy" / PACKAGE.name
    shutil.copytree(PACKAGE, target, ignore=shutil.ignore_patterns("__pycache__"))
    return target


def test_the_entry_point_brings_nothing_heavy():
    """Importing what the entry point names brings no torch, no numpy and nothing of our own core."""
    loaded = python(
        """
        import sys
        from tensorboard.plugins import base_plugin
        before = set(sys.modules)
        import gradwatch_dashboard
        print(*sorted(set(sys.modules) - before))
        """
    ).split()
    ours = [name for name in loaded if name.partition(".")[0] not in sys.stdlib_module_names]
    assert ours == ["gradwatch_dashboard", "gradwatch_dashboard.loader"]


def test_the_plugin_is_loaded_as_tensorboard_does_it():
    """The whole package gives a plugin with its routes and its files."""
    assert int(python(AS_TENSORBOARD_DOES).split()[-1]) > 6


@pytest.mark.parametrize("load_fast", LOADERS)
def test_works_without_torch(load_fast, tmp_path, blocked):
    """TensorBoard with the tab never tries to import torch, pandas or the core."""
    folder, attempts = blocked("torch", "gradwatch", "pandas", "lightning")
    write_run(tmp_path / "runs" / "a")
    with Board(tmp_path / "runs", load_fast, pythonpath=[folder]) as board:
        for route in ("runs", "layout", "heatmap", "curve", "events"):
            assert board.get(route, run="a", optimizer="AdamW", parameter=0).status == 200
        assert board.fetch("data/plugin_entry.html?name=gradwatch").status == 200
    assert attempts.read_text(encoding="utf-8") == ""


@pytest.mark.parametrize("missing", [*MODULES, "static", "static/index.js"])
def test_half_uninstalled(copy, missing):
    """Without any one of its files, or with it broken, TensorBoard starts with one line in its log."""
    gone = copy / missing
    if gone.is_dir():
        shutil.rmtree(gone)
    else:
        gone.unlink()
    printed = python(AS_TENSORBOARD_DOES, copy.parent)
    assert "plugin False" in printed
    assert printed.count(LEFT_OUT) == 1
    assert "Traceback" not in printed


@pytest.mark.parametrize("broken", ["loader.py", "wire.py", "plugin.py"])
def test_a_broken_file(copy, broken):
    """A file that is no Python stops nothing but the tab."""
    (copy / broken).write_bytes(b"\xff\x00 def (")
    printed = python(AS_TENSORBOARD_DOES, copy.parent)
    assert "plugin False" in printed
    assert printed.count(LEFT_OUT) == 1


def test_without_numpy(blocked):
    """Where numpy is missing the entry point still imports, and gives no plugin."""
    folder, attempts = blocked("numpy")
    code = """
    from types import SimpleNamespace
    from gradwatch_dashboard import GradientsLoader
    print("plugin", GradientsLoader().load(SimpleNamespace(data_provider=None)))
    """
    printed = python(code, folder)
    assert "plugin None" in printed
    assert printed.count(LEFT_OUT) == 1
    assert "numpy" in attempts.read_text(encoding="utf-8")


@pytest.mark.parametrize("missing", ["loader.py", "plugin.py", "static"])
def test_tensorboard_starts_without_the_tab(copy, missing, tmp_path):
    """A real TensorBoard with a damaged copy serves everything but the tab."""
    gone = copy / missing
    shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
    write_run(tmp_path / "runs" / "a")
    with Board(tmp_path / "runs", "false", pythonpath=[copy.parent], wait=False) as board:
        assert "gradwatch" not in board.fetch("data/plugins_listing").json()
        assert board.get("runs").status == 404
        assert board.fetch("data/runs").status == 200
        assert board.log.count(LEFT_OUT) == 1


@pytest.mark.parametrize("context", [Namespace(), Namespace(data_provider=None), Namespace(data_provider=object())],
                         ids=["nothing", "none", "other"])  # fmt: skip
def test_an_old_tensorboard(context, caplog):
    """A TensorBoard whose data provider is none of today's gets no tab, and one line says why."""
    assert GradientsLoader().load(context) is None
    assert [LEFT_OUT in record.message for record in caplog.records] == [True]


@pytest.mark.parametrize(
    ("flags", "after"),
    [(Namespace(samples_per_plugin={}), {"gradwatch": 0}),
     (Namespace(samples_per_plugin={"gradwatch": 7}), {"gradwatch": 7}),
     (Namespace(samples_per_plugin={"images": 5}), {"images": 5, "gradwatch": 0}),
     (Namespace(samples_per_plugin=None), None), (Namespace(), "missing")],
    ids=["none", "own", "other", "no_dict", "no_flag"],
)  # fmt: skip
def test_flags(flags, after):
    """Our data is not down-sampled unless the user says so; a flag that is missing is none."""
    GradientsLoader().fix_flags(flags)
    assert getattr(flags, "samples_per_plugin", "missing") == after


@pytest.mark.parametrize("load_fast", LOADERS)
def test_the_users_own_sampling_wins(load_fast, tmp_path):
    """With seven samples asked for, seven chunks are shown, and the last is among them."""
    write_run(tmp_path / "a", last=40, chunk=1)
    arguments = ["--samples_per_plugin", "gradwatch=7"]
    with Board(tmp_path, load_fast, arguments=arguments) as board:
        board.wait(lambda: board.get_json("runs")["runs"][0]["optimizers"][0]["last_step"] == 40)
        found = board.heatmap("a", "AdamW")
        assert found["last_step"] == 40
        shown = found["norms"] >= 0
        assert shown[0].sum() == 7
        assert (shown[0] == shown[1]).all()
        assert (np.isfinite(found["grad_norm"]) == shown[0]).all()


def folder_missing(path):
    """There is nothing."""


def folder_empty(path):
    """There is a folder without a run."""
    path.mkdir()


def folder_dangling(path):
    """There is a link that leads nowhere."""
    path.symlink_to(path.parent / "nowhere")


def folder_is_a_file(path):
    """There is a file instead of a folder."""
    path.write_text("no folder", encoding="utf-8")


def folder_with_rubbish(path):
    """Runs that are links to nowhere, folders in place of files, and files of rubbish."""
    (path / "rubbish").mkdir(parents=True)
    (path / "dangling").symlink_to(path / "nowhere")
    (path / "rubbish" / "events.out.tfevents.1.x").write_bytes(b"\xff" * 1000)
    (path / "rubbish" / "events.out.tfevents.2.dangling").symlink_to(path / "nowhere")
    (path / "folder" / "events.out.tfevents.1.x").mkdir(parents=True)
    with LogFile(path / "empty"):
        pass


@pytest.mark.parametrize(
    "make",
    [
        folder_missing,
        folder_is_a_file,
        folder_with_rubbish,
        *(pytest.param(make, marks=pytest.mark.slow) for make in (folder_empty, folder_dangling)),
    ],
    ids=lambda make: make.__name__,
)
@pytest.mark.parametrize("load_fast", LOADERS)
def test_log_folders_that_cannot_be_read(load_fast, make, tmp_path):
    """A log folder without anything to read gives an empty list of runs, until there is one."""
    make(tmp_path / "runs")
    with Board(tmp_path / "runs", load_fast, wait=False) as board:
        assert board.get_json("runs") == {"runs": []}
        assert board.get("heatmap", run="a", optimizer="AdamW").status == 404
        if make is folder_is_a_file and load_fast == "false":  # that loader itself ends at it
            board.wait(lambda: "exists and is not a directory" in board.log)
            assert board.get_json("runs") == {"runs": []}
        else:
            if not (tmp_path / "runs").is_dir():
                (tmp_path / "runs").unlink(missing_ok=True)
            write_run(tmp_path / "runs" / "a")
            board.wait(lambda: board.get_json("runs")["runs"])
            assert board.get("heatmap", run="a", optimizer="AdamW").status == 200
        assert "The Gradients tab has failed" not in board.log
