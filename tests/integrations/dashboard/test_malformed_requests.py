"""Malformed requests: each gets its status, in plain text, and none gets a 500."""

import pytest

from tests.support.board import LOADERS, PLUGIN, Board

from .logs import LogFile, event, write_run

GOOD = "run=a&optimizer=AdamW"
LONG = "x" * 20_000
REQUESTS = [
    (400, "layout"),
    (400, "layout?run=a"),
    (400, "layout?optimizer=AdamW"),
    (400, "layout?run=&optimizer=AdamW"),
    (400, "layout?run=a&optimizer="),
    (400, "layout?run=a&run=a&optimizer=AdamW"),
    (400, "layout?run=a&optimizer=AdamW&optimizer=b"),
    (400, "layout?run&optimizer"),
    (404, "layout?run=b&optimizer=AdamW"),
    (404, "layout?run=a&optimizer=SGD"),
    (404, "layout?run=a&optimizer=adamw"),
    (404, "layout?run=A&optimizer=AdamW"),
    (404, "layout?run=a%00&optimizer=AdamW"),
    (404, "layout?run=%ff%fe&optimizer=AdamW"),
    (404, "layout?run=../a&optimizer=AdamW"),
    (404, "layout?run=%3Cscript%3Ealert(1)%3C/script%3E&optimizer=AdamW"),
    (404, f"layout?run={LONG}&optimizer=AdamW"),
    (404, f"layout?run=a&optimizer={LONG}"),
    (400, "heatmap"),
    (400, "heatmap?run=a"),
    (404, "heatmap?run=a&optimizer=%F0%9F%92%A9"),
    (400, f"heatmap?{GOOD}&first=abc"),
    (400, f"heatmap?{GOOD}&first="),
    (400, f"heatmap?{GOOD}&first=NaN"),
    (400, f"heatmap?{GOOD}&last=Infinity"),
    (400, f"heatmap?{GOOD}&last=-Infinity"),
    (400, f"heatmap?{GOOD}&first=1.5"),
    (400, f"heatmap?{GOOD}&first=1e3"),
    (400, f"heatmap?{GOOD}&first=%201"),
    (400, f"heatmap?{GOOD}&first=0x10"),
    (400, f"heatmap?{GOOD}&first=1&first=2"),
    (400, f"heatmap?{GOOD}&first=9&last=3"),
    (400, f"heatmap?{GOOD}&first={'9' * 400}"),
    (400, f"heatmap?{GOOD}&columns=ten"),
    (400, f"heatmap?{GOOD}&columns=1&columns=2"),
    (400, f"heatmap?{GOOD}&columns=%D9%A3"),
    (400, f"heatmap?{GOOD}&columns=1%3B2"),
    (400, f"heatmap?{GOOD}&columns=1%0A"),
    (400, f"curve?{GOOD}"),
    (400, f"curve?{GOOD}&parameter="),
    (400, f"curve?{GOOD}&parameter=a.weight"),
    (400, f"curve?{GOOD}&parameter=0&parameter=1"),
    (404, f"curve?{GOOD}&parameter=2"),
    (404, f"curve?{GOOD}&parameter=-1"),
    (404, f"curve?{GOOD}&parameter=999999999999999999"),
    (400, f"curve?{GOOD}&parameter=0&first=x"),
    (400, "events"),
    (400, "events?run="),
    (404, "events?run=nobody"),
    (400, "events?run=a&limit=all"),
    (400, "events?run=a&limit=1&limit=1"),
    (400, "events?run=a&first=5&last=4"),
    (404, "nothing"),
    (404, "index.jsx"),
    (404, "%2e%2e/%2e%2e/etc/passwd"),
]
SURVIVED = [
    "runs?run=x", "heatmap?" + GOOD + "&first=-5&last=999999999999999999&columns=-7",
    "heatmap?" + GOOD + "&columns=999999999", "heatmap?" + GOOD + "&other=%3Cb%3E&other=2",
    "events?run=a&limit=-4", "events?run=a&limit=999999999&first=-1", "curve?" + GOOD + "&parameter=1&last=1",
]  # fmt: skip


@pytest.fixture(scope="module", params=LOADERS)
def board(request, tmp_path_factory):
    """A TensorBoard with one run."""
    logdir = tmp_path_factory.mktemp("requests")
    write_run(logdir / "a")
    with LogFile(logdir / "b" / "events only") as log:
        log.add_events("018000000001", [event(1)])
    with Board(logdir, request.param) as board:
        board.wait(lambda: len(board.get_json("runs")["runs"]) == 2)
        yield board
        assert "The Gradients tab has failed" not in board.log


@pytest.mark.parametrize(("status", "address"), REQUESTS, ids=lambda value: str(value)[:60])
def test_gets_its_status(board, status, address):
    """A mistake of the client is a 400 or a 404 that says what is wrong, in plain text."""
    reply = board.fetch(PLUGIN + address)
    assert reply.status == status
    assert reply.headers["Content-Type"].startswith("text/plain")
    assert reply.headers["X-Content-Type-Options"] == "nosniff"
    assert len(reply.body) < 500


@pytest.mark.parametrize("address", SURVIVED)
def test_is_clamped(board, address):
    """Numbers out of range are clamped, and what nobody asked for is ignored."""
    assert board.fetch(PLUGIN + address).status == 200


@pytest.mark.parametrize("route", ["runs", f"heatmap?{GOOD}", "index.js"])
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_only_reads(board, method, route):
    """Whoever wants to write is told that only GET is answered."""
    data = b"run=a&optimizer=AdamW" if method in ("POST", "PUT", "PATCH") else None
    reply = board.fetch(PLUGIN + route, method=method, data=data)
    assert reply.status == 405
    assert reply.headers["Allow"] == "GET, HEAD"
    assert reply.headers["Content-Type"].startswith("text/plain")


def test_heads_are_answered_without_a_body(board):
    """HEAD says what GET would."""
    reply = board.fetch(f"{PLUGIN}heatmap?{GOOD}", method="HEAD")
    assert (reply.status, reply.body) == (200, b"")
    assert int(reply.headers["Content-Length"]) > 800


def test_a_run_of_events_only_has_no_optimizer(board):
    """Events without windows are listed, and every optimizer of that run is unknown."""
    runs = {run["run"]: run for run in board.get_json("runs")["runs"]}
    assert runs["b/events only"]["optimizers"] == []
    assert board.get_json("events", run="b/events only")["total"] == 1
    assert board.get("heatmap", run="b/events only", optimizer="AdamW").status == 404
