"""A spike on several ranks: each names its own examples, and nobody waits for anybody."""

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import gradwatch
from tests.support import zoo
from tests.support.launch import on_ranks

STEPS = 40


def _train(sharded):
    rank = dist.get_rank()
    torch.manual_seed(0)
    model = zoo.small_sharded() if sharded else DistributedDataParallel(zoo.small())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    torch.manual_seed(1 + rank)
    with gradwatch.watch(model, optimizer, skip_spikes="auto", explain=True) as watcher:
        for step in range(STEPS):
            x = torch.randn(16, 4)
            target = x.sum(1, keepdim=True)
            if step == STEPS - 1 and rank == 1:
                target[5] = 1e4
            (model(x) - target).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    (found,) = watcher.explanations
    outcome = watcher.history.steps()["outcome"].iloc[-1]
    return found.as_dict(), outcome


def test_each_rank_names_its_own_examples():
    """With DDP the parameters are those of all ranks, the examples those of each rank."""
    found = on_ranks(_train, 2, sharded=False)
    for (explanation, outcome), name in zip(found, ("0", "1"), strict=True):
        assert outcome == "skipped_policy"
        assert len(explanation["largest_parameters"]) == 3
        assert f"those of rank {name}" in explanation["notes"][-1]
    first, second = (explanation for explanation, _ in found)
    assert second["largest_examples"][0]["name"] == "5"
    assert second["largest_examples"][0]["share"] > 0.99
    assert first["largest_examples"][0]["share"] < 0.9
    assert first["largest_parameters"] == second["largest_parameters"]


def test_sharded_parameters():
    """With FSDP2 the parameters are named from the norms of all ranks, and no examples."""
    found = on_ranks(_train, 2, sharded=True)
    for explanation, outcome in found:
        assert outcome == "skipped_policy"
        assert len(explanation["largest_parameters"]) == 3
        assert explanation["largest_examples"] == []
        assert "sharded" in explanation["notes"][-1]
    assert found[0][0]["largest_parameters"] == found[1][0]["largest_parameters"]
