"""The rank that a launcher announces in the environment, before there is a process group."""

import warnings

import pytest
import torch
import torch.distributed as dist

import gradwatch
from gradwatch.hooks.data_parallel import rank
from gradwatch.record.folder.writer import RunFolder
from gradwatch.testing import CapturingSink
from tests.support import launch, zoo

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE")


@pytest.fixture
def announce(monkeypatch):
    """A function that sets what a launcher sets, and nothing else."""

    def announce(**variables):
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return announce


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, 0),
        ({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}, 1),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, 0),
        ({"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1"}, 9),
        ({"RANK": "8", "WORLD_SIZE": "16", "LOCAL_RANK": "0"}, 8),
        ({"LOCAL_RANK": "1", "WORLD_SIZE": "2"}, 1),
        ({"RANK": "3"}, 0),
        ({"RANK": "3", "LOCAL_RANK": "3"}, 0),
        ({"RANK": "3", "WORLD_SIZE": "1"}, 0),
        ({"RANK": "3", "WORLD_SIZE": "2"}, 0),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, 0),
        ({"RANK": "first", "WORLD_SIZE": "2"}, 0),
        ({"RANK": "1", "WORLD_SIZE": "all"}, 0),
        ({"RANK": "", "WORLD_SIZE": ""}, 0),
    ],
    ids=str,
)
def test_rank_is_what_the_launcher_announced(announce, variables, expected):
    """RANK counts where WORLD_SIZE says that there are several; a job array that sets it has one."""
    announce(**variables)
    assert rank() == expected


def _train(folder, sink=None, model=None):
    model = zoo.small() if model is None else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.watch(
        model, optimizer, run_dir=folder, sinks=[] if sink is None else [sink]
    ) as watcher:
        for _ in range(3):
            model(torch.ones(2, 4)).sum().backward()
            optimizer.step()
    return watcher


def test_an_announced_rank_writes_nothing_and_says_so(announce, tmp_path):
    """Without a process group at its first step, a process that takes itself for rank 1 is told."""
    announce(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1")
    sink = CapturingSink()
    with pytest.warns(gradwatch.GradwatchWarning, match="Nothing of this run is written") as told:
        watcher = _train(tmp_path / "run", sink)
    assert len(told) == 1
    assert not (tmp_path / "run").exists()
    assert not sink.steps
    assert len(watcher.history.steps()) == 3


def test_a_loop_without_an_optimizer_is_told_at_its_end(announce, tmp_path):
    """No step shows that there is no process group, so the end of the run does."""
    announce(RANK="1", WORLD_SIZE="2")
    x = torch.ones(2, requires_grad=True)
    with (
        pytest.warns(gradwatch.GradwatchWarning, match="Nothing of this run is written"),
        gradwatch.watch({"x": x}, run_dir=tmp_path / "run"),
    ):
        x.sum().backward()


def test_a_run_that_writes_nothing_anyway_is_not_told(announce):
    """Without run_dir and sinks there is nothing to say."""
    announce(RANK="1", WORLD_SIZE="2")
    _train(None)


def test_a_job_array_writes(announce, tmp_path):
    """RANK without WORLD_SIZE is no rank of ours."""
    announce(RANK="5")
    _train(tmp_path / "run")
    assert len(gradwatch.load(tmp_path / "run").steps()) == 3


def test_a_folder_as_a_sink_is_locked_by_rank_0_alone(announce, tmp_path):
    """Every rank makes the sink; only that of rank 0 holds the folder."""
    first = RunFolder(tmp_path)
    assert (tmp_path / ".lock").exists()
    first.close()
    announce(RANK="1", WORLD_SIZE="2")
    RunFolder(tmp_path)
    assert not (tmp_path / ".lock").exists()


def test_a_group_of_one_wins(announce, tmp_path):
    """What the process group says counts, whatever the environment announced."""
    announce(RANK="1", WORLD_SIZE="2")
    with launch.mesh_of_one():
        assert rank() == 0
        _train(tmp_path / "run")
    assert (tmp_path / "run").exists()


def _before_the_group(folder):
    """Watch before there is a group, as a script does that torchrun has started."""
    import os

    mine, ranks = dist.get_rank(), dist.get_world_size()
    store = dist.distributed_c10d._get_default_store()
    dist.destroy_process_group()
    os.environ.update(RANK=str(mine), LOCAL_RANK=str(mine), WORLD_SIZE=str(ranks))
    sink = CapturingSink()
    model = zoo.small()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with gradwatch.watch(model, optimizer, run_dir=folder, sinks=[sink]) as watcher:
            again = dist.PrefixStore("again", store)
            dist.init_process_group("gloo", store=again, rank=mine, world_size=ranks)
            wrapper = torch.nn.parallel.DistributedDataParallel(model)
            for step in range(12):
                seed = torch.Generator().manual_seed(10 * step + mine)
                wrapper(torch.randn(4, 4, generator=seed)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        events = [(event.kind, event.rank) for event in watcher.events]
    return {"written": len(sink.steps), "events": events, "warnings": [str(w) for w in caught]}


def test_one_rank_writes_though_it_was_watched_before_the_group(tmp_path):
    """No rank dies, rank 0 writes, and events bear the rank of the group."""
    first, second = launch.on_ranks(_before_the_group, 2, folder=tmp_path / "run")
    assert first == {"written": 12, "events": [("changed", 0)], "warnings": []}
    assert second == {"written": 0, "events": [("changed", 1)], "warnings": []}
    assert len(gradwatch.load(tmp_path / "run").steps()) == 12
