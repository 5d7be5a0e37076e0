"""Names are a stranger's: of runs, optimizers, parameters and modules."""

import os
import sys

import numpy as np
import pytest

from tests.support.board import LOADERS, Board

from .logs import LogFile

NAMES = [
    "<b>xss & run", "<img src=x onerror=alert(1)>", "<script>alert(1)<%2fscript>", "';alert(1);'",
    '"><svg onload=alert(1)>', "javascript:alert(1)", "{{7*7}}", "${7*7}", "#{7*7}", "%s%n%d", "%2e%2e%2f",
    "%00", "%", "%%", "a&run=b", "a?b=c", "a#b", "a;b", "a=b", "a+b", "a b", " leading", "trailing ", "..",
    ".hidden", "...", "back\\slash", "new\nline", "tab\tbed", "carriage\rreturn", "bell\x07", "\x1b[31mred",
    "quote\"quote", "apostrophe'", "`tick`", "null", "NaN", "0", "-1", "__proto__", "constructor", "toString",
    "ünïcödé", "日本語", "עברית", "\u202eright to left", "zero\u200bwidth", "💩" * 20, "e\u0301", "\ufeffbom",
    "\U000e0001tag", "*", "[a-z]+", "(((((", "C:\\con", "|rm -rf ~", "--help", "A" * 200, "a,b\tc", "\x7f",
]  # fmt: skip
RUNS = [name if name != ".." else "dots" for name in NAMES]
SESSION = "018000000001"
assert len(NAMES) >= 50


def write(folder, optimizer, parameters):
    """A run of three steps."""
    norms = np.arange(3 * len(parameters), dtype="f4").reshape(3, -1)
    with LogFile(folder) as log:
        log.add_layout(SESSION, optimizer, parameters)
        log.add_windows(SESSION, norms, ([1, 2, 3], [1, 2, 3]))
        log.add_events(SESSION, [{"step": 1, "message": optimizer, "parameter": parameters[0]}])


@pytest.fixture(scope="module", params=LOADERS)
def board(request, tmp_path_factory):
    """A TensorBoard with a run, an optimizer and many parameters for each name."""
    logdir = tmp_path_factory.mktemp("names")
    for run, name in zip(RUNS, NAMES, strict=True):
        write(logdir / run, name, NAMES)
    with Board(logdir, request.param) as board:
        board.wait(lambda: len(board.get_json("runs")["runs"]) == len(RUNS))
        yield board
        assert "The Gradients tab has failed" not in board.log


def test_lists_every_run(board):
    """Every name of a run and of an optimizer comes back as it is."""
    runs = board.get_json("runs")["runs"]
    assert [run["run"] for run in runs] == sorted(RUNS)
    found = {run["run"]: run["optimizers"][0]["optimizer"] for run in runs}
    assert found == dict(zip(RUNS, NAMES, strict=True))


@pytest.mark.parametrize("number", range(len(NAMES)), ids=lambda number: ascii(NAMES[number])[:30])
def test_every_route_takes_the_name(board, number):
    """A name that was listed leads to its data, and comes back in no other type than said."""
    query = {"run": RUNS[number], "optimizer": NAMES[number]}
    assert board.get_json("layout", **query)["parameters"] == NAMES
    heatmap = board.heatmap(**query)
    assert (heatmap["run"], heatmap["optimizer"]) == (RUNS[number], NAMES[number])
    assert heatmap["norms"][number].tolist() == [
        number,
        number + len(NAMES),
        number + 2 * len(NAMES),
    ]
    curve = board.get_json("curve", parameter=number, **query)
    assert curve["parameter"] == NAMES[number]
    (event,) = board.get_json("events", run=RUNS[number])["events"]
    assert event["message"] == NAMES[number]
    unknown = board.get("layout", run=RUNS[number], optimizer=f"no {NAMES[number]}")
    assert unknown.status == 404
    assert unknown.headers["Content-Type"].startswith("text/plain")


@pytest.mark.parametrize("load_fast", LOADERS)
def test_names_that_no_address_can_hold(load_fast, tmp_path):
    """Half a surrogate, a name of a million characters, a folder that is no UTF-8: all are listed."""
    write(tmp_path / "a", "half \ud800", ["half \udfff", "x" * 10**6])
    write(tmp_path / "b", "y" * 10**6, ["p"])
    if sys.platform == "linux" and load_fast == "true":  # the Python loader itself ends at it
        write(os.fsdecode(os.fsencode(tmp_path) + b"/c\xff\xfe"), "AdamW", ["p"])
    with Board(tmp_path, load_fast) as board:
        board.wait(lambda: len(board.get_json("runs")["runs"]) >= 2)
        names = {run["run"]: run["optimizers"][0]["optimizer"] for run in board.get_json("runs")["runs"]}  # fmt: skip
        assert names["a"] == "half ?"
        assert names["b"] == "y" * 1000 + "..."
        layout = board.get_json("layout", run="a", optimizer="half ?")
        assert layout["parameters"] == ["half ?", "x" * 1000 + "..."]
        assert board.heatmap("b", names["b"])["parameters"] == 1
        assert "The Gradients tab has failed" not in board.log
