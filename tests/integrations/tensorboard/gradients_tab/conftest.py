"""Both ways in which TensorBoard reads event files: its Python loader and its data server.

Without TensorBoard around them, as `tests.support.board` has: so whole arrays can be compared.
"""

import argparse
import subprocess
import time

import pytest
from tensorboard import context
from tensorboard.backend.event_processing import data_ingester
from tensorboard.data import provider, server_ingester
from tensorboard.util import grpc_util

from gradwatch_dashboard.wire import PLUGIN, Tag, is_readable

from . import logs

WAIT_S = 300
ALL = {PLUGIN: 0}  # no down-sampling: what the tab's own loader asks for


def _tensors(data, run):
    """Every tensor of the plugin: tag to the steps and arrays."""
    request = context.RequestContext()
    listed = data.list_tensors(request, experiment_id="", plugin_name=PLUGIN).get(run, {})
    tensors = {}
    for tag, series in listed.items():
        assert is_readable(series.plugin_content)
        chosen = provider.RunTagFilter(runs=[run], tags=[tag])
        read = data.read_tensors(
            request, experiment_id="", plugin_name=PLUGIN, downsample=10**6, run_tag_filter=chosen
        )
        parsed = Tag.parse(tag)
        assert parsed is not None
        tensors[parsed] = [(datum.step, datum.numpy) for datum in read.get(run, {}).get(tag, [])]
    return tensors


def _read_with_python_loader(folder):
    flags = argparse.Namespace(
        logdir=str(folder.parent), logdir_spec="", samples_per_plugin=ALL, reload_multifile=False,
        reload_multifile_inactive_secs=0, generic_data="true", reload_interval=0, event_file="",
        reload_task="blocking", max_reload_threads=1, purge_orphaned_data=True, window_title="",
        detect_file_replacement=None,
    )  # fmt: skip
    ingester = data_ingester.LocalDataIngester(flags)
    ingester.start()
    return _tensors(ingester.data_provider, folder.name)


def _newest_steps(folder):
    """The newest step of each tag, of what stands in the files."""
    newest = {}
    for event in logs.raw_events(folder):
        for value in logs.our_values(event):
            newest[Tag.parse(value.tag)] = event.step
    return newest


def _read_with_data_server(folder, tmp_path):
    binary = server_ingester.get_server_binary()
    port_file = tmp_path / f"port-{time.monotonic_ns()}"
    command = [binary.path, f"--logdir={folder.parent}", "--port=0", f"--port-file={port_file}",
               "--reload=once", f"--samples-per-plugin={PLUGIN}=all", "--die-after-stdin"]  # fmt: skip
    expected = _newest_steps(folder)
    with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
        try:
            port = _wait(
                lambda: port_file.exists() and port_file.read_text(encoding="utf-8").strip()
            )
            data = server_ingester.ExistingServerDataIngester(
                f"localhost:{port}", channel_creds_type=grpc_util.ChannelCredsType.LOCAL
            ).data_provider

            def loaded():
                tensors = _tensors(data, folder.name)
                newest = {tag: points[-1][0] for tag, points in tensors.items() if points}
                return tensors if newest == expected else None

            return _wait(loaded)
        finally:
            process.kill()


def _wait(answer):
    end = time.monotonic() + WAIT_S
    while time.monotonic() < end:
        if (value := answer()) is not None and value is not False and value != "":
            return value
        time.sleep(0.02)
    return pytest.fail(f"No answer within {WAIT_S} s.")


@pytest.fixture(params=["python_loader", "data_server"])
def load(request, tmp_path_factory):
    """Reads a run's folder as TensorBoard does: tag to the steps and arrays of its points."""
    if request.param == "python_loader":
        return _read_with_python_loader
    data_server = pytest.importorskip("tensorboard_data_server")
    if data_server.server_binary() is None:
        pytest.skip("there is no data server for this platform")
    scratch = tmp_path_factory.mktemp("ports")
    return lambda folder: _read_with_data_server(folder, scratch)
