"""Damaged and foreign data: it is left out and said once in the log, what is whole is shown."""

import json

import numpy as np
import pytest
from tensorboard.compat.proto import tensor_pb2, types_pb2

from gradwatch_dashboard.wire import Tag
from tests.support.board import LOADERS, Board

from .logs import LogFile, event

GOOD, BAD = "018000000001", "018000000002"
DEEP = "[" * 100_000
DIGITS = "9" * 5000


def layout(**changes):
    """A layout as JSON, with changes."""
    whole = {
        "optimizer": "Bad",
        "parameters": ["p", "q"],
        "modules": ["", ""],
        "shapes": [[2], [3]],
    }
    return json.dumps(whole | changes)


def broken_tensor(size):
    """A tensor whose bytes are too few for its shape."""
    tensor = tensor_pb2.TensorProto(dtype=types_pb2.DT_FLOAT, tensor_content=b"\0" * 7)
    tensor.tensor_shape.dim.add(size=size)
    tensor.tensor_shape.dim.add(size=2)
    return tensor


def windows(**arrays):
    """A chunk of two windows, with other arrays in place of its own."""
    table = np.zeros((2, 11))
    table[:, 0] = table[:, 1] = [1, 2]
    whole = {"norms": np.ones((2, 2), "f4"), "bad": np.zeros((0, 2), "u2"), "steps": table}
    chosen = {kind: array for kind, array in (whole | arrays).items() if array is not None}
    return {Tag(kind, BAD): array for kind, array in chosen.items()}


def table(*rows):
    """A steps table with these first columns."""
    found = np.zeros((len(rows), 11))
    for place, row in enumerate(rows):
        found[place, : len(row)] = row
    return found


def chunk_with(layout_text=None, content=None, **arrays):
    """Writes a layout and a chunk."""

    def write(log):
        log.add(1, {Tag("layout", BAD): layout() if layout_text is None else layout_text}, content)
        log.add(1, windows(**arrays), content)

    return write


def tags(values, content=None):
    """Writes tags of any name."""
    return lambda log: log.add(1, values, content)


def events(*texts):
    """Writes events."""
    return lambda log: log.add_events(BAD, list(texts))


NAN = float("nan")
DAMAGES = {
    "norms too wide": chunk_with(norms=np.ones((2, 3), "f4")),
    "norms too long": chunk_with(norms=np.ones((5, 2), "f4")),
    "norms of one dimension": chunk_with(norms=np.ones(2, "f4")),
    "norms of integers": chunk_with(norms=np.ones((2, 2), "i4")),
    "norms of doubles": chunk_with(norms=np.ones((2, 2), "f8")),
    "norms of text": chunk_with(norms=["a", "b"]),
    "norms below zero": chunk_with(norms=np.full((2, 2), -7, "f4")),
    "norms missing": chunk_with(norms=None),
    "bad too wide": chunk_with(bad=np.ones((2, 3), "u2")),
    "bad of floats": chunk_with(bad=np.ones((2, 2), "f4")),
    "bad missing": chunk_with(bad=None),
    "steps missing": chunk_with(steps=None),
    "steps NaN": chunk_with(steps=table((NAN, NAN), (NAN, 2))),
    "steps infinite": chunk_with(steps=table((1, np.inf), (np.inf, np.inf))),
    "steps huge": chunk_with(steps=table((1, 1), (2, 1e300))),
    "steps negative": chunk_with(steps=table((-9, -3), (-2, 1))),
    "steps backwards": chunk_with(steps=table((5, 5), (3, 3))),
    "steps in halves": chunk_with(steps=table((0.5, 0.5), (1.5, 2))),
    "steps too narrow": chunk_with(steps=np.ones((2, 5))),
    "all of a table NaN but the steps": chunk_with(steps=np.hstack([table((1, 1), (2, 2))[:, :2], np.full((2, 9), NAN)])),
    "counts infinite": chunk_with(steps=np.hstack([table((1, 1), (2, 2))[:, :2], np.full((2, 9), np.inf)])),
    "no windows": chunk_with(norms=np.ones((0, 2), "f4"), steps=np.ones((0, 11))),
    "tensor broken": chunk_with(norms=broken_tensor(2)),
    "tensor of steps broken": chunk_with(steps=broken_tensor(2)),
    "tensor of negative size": chunk_with(norms=broken_tensor(-3)),
    "tensor without type": chunk_with(norms=tensor_pb2.TensorProto()),
    "layout broken": chunk_with("{"),
    "layout empty": chunk_with(""),
    "layout of bytes": chunk_with(b"\xff\xfe\x00"),
    "layout a list": chunk_with("[1, 2]"),
    "layout null": chunk_with("null"),
    "layout deep": chunk_with(DEEP),
    "layout of two texts": chunk_with([layout(), layout()]),
    "layout a number": chunk_with(np.ones(3, "f4")),
    "layout with endless shapes": chunk_with('{"optimizer": "Bad", "parameters": ["p"], "modules": [""], "shapes": [[1e999]]}'),
    "layout with long digits": chunk_with(layout(shapes=[["DIGITS"], [1]]).replace('"DIGITS"', DIGITS)),
    "layout with negative shapes": chunk_with(layout(shapes=[[-1], [1]])),
    "layout with parameters twice": chunk_with(layout(parameters=["p", "p"])),
    "layout with few modules": chunk_with(layout(modules=[])),
    "layout with many shapes": chunk_with(layout(shapes=[[1]] * 9)),
    "layout with numbers as names": chunk_with(layout(parameters=[1, 2])),
    "layout without parameters": chunk_with(layout(parameters=[], modules=[], shapes=[])),
    "version newer": chunk_with(content=b'{"version": 3}'),
    "version missing": chunk_with(content=b"{}"),
    "version broken": chunk_with(content=b"\xff"),
    "version deep": chunk_with(content=DEEP.encode()),
    "version text": chunk_with(content=b'{"version": "1"}'),
    "tags foreign": tags({"loss": np.ones((2, 2), "f4"), "gradwatch/other/x": np.ones(1, "f4"), "gradwatch/": "x",
                          "": "x", "gradwatch/norms": "x", "gradwatch/norms/s/-1/0": "x", "gradwatch/norms/s/²/0000": "x"}),
    "tags with long digits": tags({f"gradwatch/norms/{BAD}/0/{DIGITS}": np.ones((2, 2), "f4")}),
    "tag of a million characters": tags({"gradwatch/events/" + "s" * 10**6: ["{}"]}),
    "events broken": events("{", "", "null", "[]", "7", '"text"', DEEP, "{}", '{"step": "one"}', '{"step": 1e999}',
                            '{"step": NaN}', '{"step": 1.5}', '{"step": 1, "kind": 7}', '{"step": null}',
                            '{"step": 1, "value": []}', '{"step": 1, "nan_count": 1e300}', f'{{"step": {DIGITS}}}'),
    "events a number": lambda log: log.add(1, {Tag("events", BAD): np.ones((2, 3), "f4")}),
}  # fmt: skip
SHOWN = {"norms below zero", "norms missing", "bad missing", "bad too wide", "bad of floats"}


@pytest.fixture(scope="module", params=LOADERS)
def board(request, tmp_path_factory):
    """A TensorBoard in which each run has a whole session and something damaged."""
    logdir = tmp_path_factory.mktemp("damaged")
    for name, write in DAMAGES.items():
        with LogFile(logdir / name) as log:
            log.add_layout(GOOD, "Good", ["a"])
            log.add_windows(GOOD, [[1.0], [np.nan], [3.0]], ([1, 2, 3], [1, 2, 3]))
            log.add_events(GOOD, [event(2, optimizer="Good")])
            write(log)
    with Board(logdir, request.param) as board:
        board.wait(lambda: len(board.get_json("runs")["runs"]) == len(DAMAGES))
        yield board


@pytest.mark.parametrize("name", DAMAGES)
def test_what_is_whole_is_shown(board, name):
    """Damage costs at most the tensor that is damaged, and nobody a 500."""
    heatmap = board.heatmap(name, "Good")
    np.testing.assert_array_equal(heatmap["norms"], [[1, np.nan, 3]])
    assert heatmap["bad"].tolist() == [[0, 1, 0]]
    assert board.get_json("events", run=name)["total"] == 1
    assert board.get_json("curve", run=name, optimizer="Good", parameter=0)["norm"] == [1, "NaN", 3]
    for route in ("layout", "heatmap", "curve"):
        reply = board.get(route, run=name, optimizer="Bad", parameter=0)
        assert reply.status in ((200,) if name in SHOWN else (200, 404)), reply
        if reply.status == 200 and route != "heatmap":
            json.loads(reply.body, parse_constant=pytest.fail)


def test_windows_without_cells_are_there(board):
    """Where norms are missing the totals of the steps are shown, over cells that say nothing."""
    heatmap = board.heatmap("norms missing", "Bad")
    assert heatmap["norms"].tolist() == [[-2, -2], [-2, -2]]
    assert np.isnan(board.heatmap("norms below zero", "Bad")["norms"]).all()
    assert board.heatmap("steps backwards", "Bad")["first_step"] == 5


def test_says_it_once(board):
    """Each damage is one line of the log, however often the tab asks, and no traceback."""
    lines = [line for line in board.log.splitlines() if "The Gradients tab leaves out" in line]
    assert len(lines) > 20
    assert len({line.split("] ", 1)[1] for line in lines}) == len(lines)
    assert max(map(len, lines)) < 600
    for name in DAMAGES:
        board.heatmap(name, "Good")
    again = [line for line in board.log.splitlines() if "The Gradients tab leaves out" in line]
    assert again == lines
    assert "The Gradients tab has failed" not in board.log
