"""Explanations where there are several ranks: each writes its own, and waits for no other."""

import math

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import gradwatch
from gradwatch.history import load
from tests.support import zoo
from tests.support.explanations import explanation
from tests.support.launch import on_ranks


def _train(folder):
    model = DistributedDataParallel(zoo.small())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.watch(model, optimizer, run_dir=folder) as watcher:
        for step in range(1, 4):
            model(torch.ones(2, 4)).square().mean().backward()
            if step == 2 and dist.get_rank() == 1:
                watcher._run.explain(explanation(step, rank=1))
            optimizer.step()
            optimizer.zero_grad()
    return watcher.history.explanations()["rank"].tolist()


def test_that_of_another_rank_is_in_the_folder(tmp_path):
    """Only the second rank has something to tell; the run folder and its report have it."""
    assert on_ranks(_train, 2, folder=tmp_path) == [[], [1]]
    assert [one.name for one in (tmp_path / "nonfinite").iterdir()] == ["step-000002-rank-1"]
    history = load(tmp_path)
    assert history.explanations()[["step", "rank"]].to_dict("list") == {"step": [2], "rank": [1]}
    assert history.report().kinds[0] == "nan"


def _train_on_bad_data(folder):
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Sequential(torch.nn.Linear(4, 4), zoo.small()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.watch(
        model, optimizer, run_dir=folder, on_nonfinite="explain", keep_batches=True
    ) as watcher:
        for step in range(1, 4):
            x = torch.ones(2, 4)
            if step == 2 and dist.get_rank() == 1:
                x[1] = math.nan
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return watcher.history.explanations()["origin"].tolist()


def test_the_rank_with_bad_data_says_which(tmp_path):
    """The report names the input and the example, although the first rank never saw them."""
    origins = on_ranks(_train_on_bad_data, 2, folder=tmp_path)
    assert origins == [["not_found"], ["input"]]
    finding = load(tmp_path).report().findings[0]
    assert finding.kind == "nan"
    assert (finding.explanation.rank, finding.explanation.examples) == (1, (1,))
    (path,) = (tmp_path / "nonfinite").glob("*/batch.pt")
    (kept,) = torch.load(path, weights_only=True)["calls"]
    assert path.parent.name == "step-000002-rank-1"
    assert kept["args"][0].isnan().any(1).tolist() == [False, True]
