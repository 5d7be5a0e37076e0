"""A real TensorBoard on loopback, with its Python loader and with its data server."""

import json
import math
import os
import re
import subprocess
import sys
import time
import urllib.parse
import urllib.request

import pytest

from gradwatch_tensorboard import TensorBoardWriter

START_S = 300
HOSTILE = '<img src=x onerror="alert(1)">.[a](javascript:b)'

ACCUMULATED = {"micro_batches": 2, "weight": 8.0, "noise_scale": 40.0, "noise_scale_stderr": 4.0}


class Server:
    """One TensorBoard process and the JSON that it answers."""

    def __init__(self, logdir, load_fast):
        self._log = (logdir.parent / "server.log").open("w+", encoding="utf-8")
        command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir),
                   "--host", "127.0.0.1", "--port", "0", "--load_fast", load_fast,
                   "--reload_interval", "1"]  # fmt: skip
        environment = {**os.environ, "NO_PROXY": "*", "no_proxy": "*"}
        self._process = subprocess.Popen(
            command, stdout=self._log, stderr=subprocess.STDOUT, env=environment
        )
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
        self.address = self.wait(self._address)

    def _address(self):
        self._log.seek(0)
        log = self._log.read()
        if self._process.poll() is not None:
            pytest.fail(f"TensorBoard ended: {log}")
        found = re.search(r"http://127\.0\.0\.1:\d+/", log)
        return found.group() if found else None

    def wait(self, answer):
        """Asks until there is an answer, for a bounded time."""
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            if value := answer():
                return value
            time.sleep(0.1)
        self._log.seek(0)
        return pytest.fail(f"No answer within {START_S} s. TensorBoard said: {self._log.read()}")

    def get(self, route, **query):
        address = f"{self.address}data/plugin/{route}?{urllib.parse.urlencode(query)}"
        with self._open(address, timeout=300) as reply:
            return json.loads(reply.read())

    def stop(self):
        self._process.terminate()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


def fill(folder, run, next_second):
    """Two optimizers, a NaN at step 40, and the second half of the run by a second writer."""
    for steps in (range(1, 31), range(21, 61)):
        writer = TensorBoardWriter(folder)
        for step in steps:
            if step == 40:
                batch = run.nan_step(40)
                events = [run.event(40, parameter=HOSTILE, message=HOSTILE)]
                writer.write(run.batch(batch.steps, events, batch.norms))
            else:
                writer.write(run.batch([run.record(step, **ACCUMULATED)]))
            writer.write(run.batch([run.record(step, optimizer="SGD-1", **ACCUMULATED)]))
        writer.close()
        next_second()


@pytest.fixture(scope="module", params=["false", "true"], ids=["python_loader", "data_server"])
def server(request, tmp_path_factory, make_run, next_second):
    """A TensorBoard that has read the whole run."""
    if request.param == "true":
        data_server = pytest.importorskip("tensorboard_data_server")
        if data_server.server_binary() is None:
            pytest.skip("there is no data server for this platform")
    logdir = tmp_path_factory.mktemp("server") / "runs"
    fill(logdir / "a", make_run(), next_second)
    server = Server(logdir, request.param)
    try:
        server.wait(lambda: server.get("scalars/tags").get("a"))
        server.wait(lambda: points(server, "gradwatch/grad_norm")[-1][0] == 60)
        yield server
    finally:
        server.stop()


def points(server, tag):
    """Step and value of each point of a scalar."""
    return [(step, value) for _, step, value in server.get("scalars/scalars", run="a", tag=tag)]


def test_lists_the_tags(server):
    """TensorBoard lists each optimizer's scalars, blocks and events in groups of their own."""
    tags = server.get("scalars/tags")["a"]
    groups = {tag.split("/")[0] for tag in tags}
    assert groups == {
        "gradwatch", "gradwatch_blocks", "gradwatch-SGD-1", "gradwatch-SGD-1_blocks",
    }  # fmt: skip
    assert {"gradwatch/clip_coef", "gradwatch/nonfinite_event"} <= set(tags)


def test_says_what_a_chart_means(server):
    """The meaning of a tag is shown with its chart, and its name is left as it is."""
    entry = server.get("scalars/tags")["a"]["gradwatch/grad_norm"]
    assert "Total L2 gradient norm before the clip" in entry["description"]
    assert entry["displayName"] in ("", "gradwatch/grad_norm")


def test_series_rise_across_the_resume(server):
    """Both loaders show each step once, although the first run had gone further."""
    for tag in server.get("scalars/tags")["a"]:
        steps = [step for step, _ in points(server, tag)]
        assert steps == sorted(set(steps))
    assert [step for step, _ in points(server, "gradwatch/grad_norm")] == list(range(1, 61))


def test_shows_the_nan(server):
    """The NaN step is a NaN in the norm, and a point of the series of such steps."""
    norm = dict(points(server, "gradwatch/grad_norm"))
    assert norm[40] == "NaN" or math.isnan(norm[40])
    assert points(server, "gradwatch/nonfinite_event") == [(40, 1.0)]


def test_text_is_harmless(server):
    """A hostile name is text on the page of the event."""
    (entry,) = server.get("text/text", run="a", tag="gradwatch/events/text_summary")
    assert entry["step"] == 40
    assert "<li>" in entry["text"]
    assert "<img" not in entry["text"]
    assert "<a" not in entry["text"]
    assert "&lt;img" in entry["text"]


def test_layout_finds_its_series(server):
    """Each chart of the Custom Scalars dashboard names tags that are there."""
    (category,) = server.get("custom_scalars/layout")["category"]
    assert len(category["chart"]) == 4
    tags = set(server.get("scalars/tags")["a"])
    for chart in category["chart"]:
        if "margin" in chart:
            (series,) = chart["margin"]["series"]
            assert set(series.values()) <= tags
            continue
        for regex in chart["multiline"]["tag"]:
            reply = server.get("custom_scalars/scalars", run="a", tag=regex)
            assert len(reply["tag_to_events"]) >= 2
