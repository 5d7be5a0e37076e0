"""A real TensorBoard on loopback.

with Board(logdir, load_fast="true") as board:
runs = board.get_json("runs")
board.base_url  # http://127.0.0.1:6006/ or, with a prefix, http://127.0.0.1:6006/foo/
"""

import json
import re
import struct
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from typing import NamedTuple

import numpy as np
import pytest

from tests.support import processes
from tests.support.memory import resident_bytes

PLUGIN = "data/plugin/gradwatch/"
START_S = 300


def has_data_server():
    """Whether TensorBoard has its fast loader on this platform."""
    try:
        import tensorboard_data_server
    except ImportError:
        return False
    return tensorboard_data_server.server_binary() is not None


LOADERS = [
    pytest.param("false", id="python_loader"),
    pytest.param(
        "true",
        id="data_server",
        marks=pytest.mark.skipif(not has_data_server(), reason="no data server here"),
    ),
]


class Reply(NamedTuple):
    """What came back."""

    status: int
    headers: dict
    body: bytes

    @property
    def text(self):
        return self.body.decode()

    def json(self):
        return json.loads(self.body)


class Board:
    """One TensorBoard process.

    Args:
        logdir: The folder that it shows.
        load_fast: "true" (data server), "false" (Python loader) or "auto".
        path_prefix: As TensorBoard's flag: "/foo".
        reload_interval: Seconds between two looks at the files.
        arguments: Further arguments.
        pythonpath: Folders that come first on its path.
        wait: Whether entering waits until `runs` has an entry.
        program: What `python` runs; TensorBoard's own entry by default.
    """

    def __init__(
        self,
        logdir,
        load_fast="auto",
        path_prefix="",
        reload_interval=1,
        arguments=(),
        pythonpath=(),
        wait=True,
        program=("-m", "tensorboard.main"),
    ):
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115  # until stop()
        self._wait_for_data = wait
        command = [*program, "--logdir", str(logdir), "--host", "127.0.0.1",
                   "--port", "0", "--load_fast", load_fast,
                   "--reload_interval", str(reload_interval), *arguments]  # fmt: skip
        if path_prefix:
            command += ["--path_prefix", path_prefix]
        environment = processes.environment(pythonpath, NO_PROXY="*", no_proxy="*")
        self._prefix = path_prefix
        self.process = processes.start(
            *command, stdout=self._log, stderr=subprocess.STDOUT, env=environment
        )
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
        self.base_url = ""

    def __enter__(self):
        try:
            self.base_url = self.wait(self._address)
            if self._wait_for_data:
                self.wait(lambda: self.get_json("runs")["runs"])
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *error):
        self.stop()

    @property
    def log(self):
        """All that it has printed."""
        self._log.seek(0)
        return self._log.read()

    def _address(self):
        log = self.log
        if self.process.poll() is not None:
            pytest.fail(f"TensorBoard ended: {log}")
        found = re.search(r"http://127\.0\.0\.1:\d+/\S*", log)
        if found is None:
            return None
        base = found.group()
        return base if base.endswith("/") else f"{base}/"

    def wait(self, answer, seconds=START_S):
        """Asks until the answer is true, for a bounded time."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if value := answer():
                return value
            time.sleep(0.05)
        return pytest.fail(f"No answer within {seconds} s. TensorBoard said: {self.log}")

    def fetch(self, address, method="GET", headers=None, data=None):
        """Asks for an address below the base URL, whatever the status."""
        request = urllib.request.Request(
            self.base_url + address, method=method, headers=headers or {}, data=data
        )
        try:
            with self._open(request, timeout=300) as reply:
                return Reply(reply.status, dict(reply.headers), reply.read())
        except urllib.error.HTTPError as error:
            with error:
                return Reply(error.code, dict(error.headers), error.read())

    def get(self, route, **query):
        """Asks for a route of the plugin."""
        return self.fetch(f"{PLUGIN}{route}?{urllib.parse.urlencode(query, doseq=True)}")

    def get_json(self, route, **query):
        """Asks for a route that has to answer with JSON."""
        reply = self.get(route, **query)
        assert reply.status == 200, f"{reply.status} {reply.text[:500]}\n{self.log[-9000:]}"
        return reply.json()

    def ask(self, route, **query):
        """Asks for a route of whichever plugin, "scalars/tags", that has to answer with JSON."""
        reply = self.fetch(f"data/plugin/{route}?{urllib.parse.urlencode(query)}")
        assert reply.status == 200, f"{reply.status} {reply.text[:500]}\n{self.log[-9000:]}"
        return reply.json()

    def heatmap(self, run, optimizer, **query):
        """Asks for a heat map: its header with the arrays by name."""
        reply = self.get("heatmap", run=run, optimizer=optimizer, **query)
        assert reply.status == 200, f"{reply.status} {reply.text[:500]}\n{self.log[-9000:]}"
        return unpack(reply.body)

    def rss_bytes(self):
        """Resident memory of the process and of those below it, bytes; Linux only."""
        return resident_bytes(self.process.pid)

    def stop(self):
        """Ends it."""
        self.process.terminate()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._log.close()


def unpack(body):
    """Reads a binary answer: its header with the arrays by name."""
    (size,) = struct.unpack_from("<I", body)
    header = json.loads(body[4 : 4 + size])
    arrays, position = {}, 4 + size
    for entry in header["arrays"]:
        assert position % 8 == 0
        dtype = np.dtype(entry["dtype"]).newbyteorder("<")
        count = int(np.prod(entry["shape"], dtype=np.int64))
        arrays[entry["name"]] = np.frombuffer(body, dtype, count, position).reshape(entry["shape"])
        position = -(-(position + count * dtype.itemsize) // 8) * 8
    return header | arrays
