"""The routes of a real TensorBoard, with its Python loader and with its data server."""

import math

import numpy as np
import pytest

from tests.support.board import LOADERS, PLUGIN, Board

from .logs import LogFile, event, write_run

NAN_STEPS = (7, 33)
RESUMED_AT = 71


@pytest.fixture(scope="module")
def logdir(tmp_path_factory):
    """Two runs: a whole one, and one that was resumed with other parameters."""
    folder = tmp_path_factory.mktemp("routes")
    write_run(folder / "whole", nan_steps=NAN_STEPS)
    write_run(
        folder / "nested" / "resumed", session="018000000001", parameters=("old", "both"), last=80
    )
    write_run(folder / "nested" / "resumed", session="018000000002", parameters=("both", "new"),
              first=RESUMED_AT, last=120, seed=1)  # fmt: skip
    with LogFile(folder / "whole") as log:
        log.add_events("018000000001", [event(step, message="<b>NaN</b>") for step in NAN_STEPS])
        log.add_events("018000000001", [event(90, "spike", value=math.inf)], step=90)
    with LogFile(folder / "nested" / "resumed") as log:
        log.add_events("018000000001", [event(3), event(75), event(75, optimizer="other")])
    with LogFile(folder / "nested" / "resumed") as log:
        log.add_events("018000000002", [event(76)])
    with LogFile(folder / "without ours") as log:
        log.add(1, {"loss": np.zeros(1, "f4")}, plugin="scalars", content=b"")
    return folder


@pytest.fixture(scope="module", params=[(True, ""), (False, ""), (True, "/some/where"), (False, "/x")],
                ids=["data_server", "python_loader", "data_server_prefix", "python_loader_prefix"])  # fmt: skip
def board(request, logdir):
    """A TensorBoard that has read everything."""
    fast, prefix = request.param
    if fast and LOADERS[1].marks[0].args[0]:
        pytest.skip("no data server here")
    # Several files of a run, as after a restart: the Python loader follows the newest only.
    arguments = () if fast else ("--reload_multifile", "true")
    with Board(
        logdir, "true" if fast else "false", path_prefix=prefix, arguments=arguments
    ) as board:
        board.wait(lambda: len(board.get_json("runs")["runs"]) == 2)
        board.wait(lambda: board.get_json("events", run="whole")["total"] == 3)
        board.wait(lambda: board.get_json("events", run="nested/resumed")["total"] == 3)
        assert board.base_url.endswith(f"{prefix}/")
        yield board


def test_lists_the_runs(board):
    """Runs are listed by name, with what there is of each; a run without our data is not."""
    resumed, whole = board.get_json("runs")["runs"]
    assert resumed.pop("newest") > 1e9
    assert whole.pop("newest") > 1e9
    adamw = {"optimizer": "AdamW", "parameters": 2, "first_step": 1}
    assert whole == {
        "run": "whole", "events": 3,
        "optimizers": [adamw | {"last_step": 100, "windows": 100, "bad_steps": 2}],
    }  # fmt: skip
    assert resumed == {
        "run": "nested/resumed", "events": 3,
        "optimizers": [adamw | {"parameters": 3, "last_step": 120, "windows": 120, "bad_steps": 0}],
    }  # fmt: skip


def test_gives_the_layout(board):
    """The newest session's parameters come first, then those that only an earlier one had."""
    assert board.get_json("layout", run="nested/resumed", optimizer="AdamW") == {
        "optimizer": "AdamW", "parameters": ["both", "new", "old"], "modules": ["", "", ""],
        "shapes": [[], [], []], "first_step": 1, "last_step": 120, "windows": 120,
        "columns": [],
    }  # fmt: skip


def test_gives_every_cell(board, logdir, tmp_path):
    """With a column for each step the heat map holds exactly what was written."""
    written = write_run(tmp_path, nan_steps=NAN_STEPS)
    found = board.heatmap("whole", "AdamW")
    assert (found["first_step"], found["last_step"], found["columns"]) == (1, 100, 100)
    np.testing.assert_array_equal(found["norms"], written.T)
    assert np.flatnonzero(found["bad"].any(0)).tolist() == [step - 1 for step in NAN_STEPS]
    assert found["bad_steps"].sum() == 2
    total = np.sqrt(np.square(written.astype("f8")).sum(1))
    np.testing.assert_allclose(found["grad_norm"], total, rtol=1e-6)
    np.testing.assert_allclose(found["clip_threshold"], 1.0)
    assert [entry["name"] for entry in found["arrays"]] == [
        "norms", "bad", "grad_norm", "grad_norm_clipped", "clip_threshold", "clip_coef",
        "bad_steps", "clipped_steps", "skipped_steps",
    ]  # fmt: skip


def test_joins_sessions(board, tmp_path):
    """The later session shows its steps, the earlier one those before; what was not there is -2."""
    old = write_run(tmp_path / "old", parameters=("old", "both"), last=80)
    new = write_run(
        tmp_path / "new", parameters=("both", "new"), first=RESUMED_AT, last=120, seed=1
    )
    both, fresh, gone = board.heatmap("nested/resumed", "AdamW")["norms"]
    kept = RESUMED_AT - 1
    np.testing.assert_array_equal(both, np.concatenate([old[:kept, 1], new[:, 0]]))
    np.testing.assert_array_equal(fresh, np.concatenate([np.full(kept, -2), new[:, 1]]))
    np.testing.assert_array_equal(gone, np.concatenate([old[:kept, 0], np.full(50, -2)]))


def test_zooms(board):
    """A range is binned to the columns that are asked for, and clamped to what there is."""
    whole = board.heatmap("whole", "AdamW")["norms"]
    found = board.heatmap("whole", "AdamW", first=21, last=60, columns=10)
    expected = np.nanmax(whole[:, 20:60].reshape(2, 10, 4), axis=2)
    np.testing.assert_array_equal(found["norms"], expected)
    clamped = board.heatmap("whole", "AdamW", first=-5, last=10**15, columns=0)
    assert [clamped[key] for key in ("first_step", "last_step", "columns")] == [1, 100, 1]
    assert board.heatmap("whole", "AdamW", columns=10**9)["columns"] == 100
    assert "bad" not in board.heatmap("whole", "AdamW", first=40)


def test_gives_a_curve(board):
    """A curve is one row of the heat map, with the NaN said in a word."""
    norms = board.heatmap("whole", "AdamW")["norms"][1]
    found = board.get_json("curve", run="whole", optimizer="AdamW", parameter=1, first=5, last=40)
    assert found["parameter"] == "b.bias"
    assert found["first"] == found["last"] == list(range(5, 41))
    assert [found[key][step - 5] for key in ("norm", "grad_norm") for step in NAN_STEPS] == [
        "NaN"
    ] * 4
    assert [found["bad"][step - 5] for step in NAN_STEPS] == [1, 1]
    finite = [i for i, norm in enumerate(found["norm"]) if norm != "NaN"]
    np.testing.assert_allclose([found["norm"][i] for i in finite], norms[4:40][finite], rtol=1e-6)


def test_a_curve_over_sessions_says_where_there_was_nothing(board):
    """A parameter that an earlier session had not is -2 there."""
    found = board.get_json("curve", run="nested/resumed", optimizer="AdamW", parameter=1)
    assert [norm == -2 for norm in found["norm"]] == [step < RESUMED_AT for step in range(1, 121)]


def test_lists_the_events(board):
    """Events come oldest first, in a range, as many as asked for; Inf is a word."""
    everything = board.get_json("events", run="whole")
    assert [one["step"] for one in everything["events"]] == [7, 33, 90]
    look = {"color": "#ff33ff", "shape": "triangle"}
    assert everything["events"][0] == event(7, message="<b>NaN</b>") | look
    assert everything["events"][2]["value"] == "Infinity"
    part = board.get_json("events", run="whole", first=8, last=95, limit=1)
    assert (part["total"], [one["step"] for one in part["events"]]) == (2, [33])
    assert board.get_json("events", run="whole", limit=0) == {"total": 3, "events": []}


def test_a_later_session_replaces_events_too(board):
    """Events of steps that came again are those of the later session, of its optimizers."""
    events = board.get_json("events", run="nested/resumed")["events"]
    assert [(one["step"], one["optimizer"]) for one in events] == [
        (3, "AdamW"), (75, "other"), (76, "AdamW"),
    ]  # fmt: skip


def test_tensorboard_shows_the_tab(board):
    """TensorBoard lists the plugin as active, with its name and its module."""
    listing = board.fetch("data/plugins_listing").json()["gradwatch"]
    assert listing["enabled"] is True
    assert listing["tab_name"] == "Gradients"
    assert listing["loading_mechanism"]["type"] == "IFRAME"
    page = board.fetch("data/plugin_entry.html?name=gradwatch")
    assert page.status == 200
    assert "index.js" in page.text


def test_serves_the_front_end(board):
    """Scripts and styles come with their types, revalidated, and nothing else is served."""
    for name, kind in (("index.js", "text/javascript"), ("style.css", "text/css")):
        reply = board.fetch(PLUGIN + name)
        assert reply.status == 200
        assert reply.headers["Content-Type"].startswith(kind)
        assert reply.headers["X-Content-Type-Options"] == "nosniff"
        assert "no-cache" in reply.headers["Cache-Control"]
    for name in ("plugin.py", "__init__.py", "..%2f__init__.py", "static/index.js", "../plugin.py"):
        assert board.fetch(PLUGIN + name).status == 404


@pytest.mark.parametrize("route", ["runs", "layout", "heatmap", "curve", "events"])
def test_answers_are_never_stale(board, route):
    """No answer is kept by the browser, and none is taken for another type than its own."""
    reply = board.get(route, run="whole", optimizer="AdamW", parameter=0)
    assert reply.status == 200
    assert reply.headers["Cache-Control"] == "no-cache, must-revalidate"
    assert reply.headers["X-Content-Type-Options"] == "nosniff"
    binary = route == "heatmap"
    assert reply.headers["Content-Type"] == ("application/octet-stream" if binary else "application/json")  # fmt: skip
