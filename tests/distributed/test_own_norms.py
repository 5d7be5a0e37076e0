"""Engines whose gradients are one rank's own: one sentence says so, or they are refused."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gradwatch
from tests.support import zoo
from tests.support.launch import on_ranks

RANKS, STEPS = 2, 4


def _told(model, step, optimizer):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with gradwatch.watch(model, optimizer) as watcher:
            for _ in range(STEPS):
                optimizer.zero_grad()
                step()
                optimizer.step()
    events = watcher.history.events()
    told = [one for one in caught if issubclass(one.category, gradwatch.GradwatchWarning)]
    return {
        "events": events[["kind", "message"]].to_numpy().tolist(),
        "warnings": len(told),
        "clip_coef": watcher.history.steps()["clip_coef"].tolist(),
    }


def _pipeline():
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    stage = PipelineStage(model, dist.get_rank(), RANKS, torch.device("cpu"))
    schedule = ScheduleGPipe(stage, 2, loss_fn=lambda out, target: (out - target).square().mean())

    def step():
        if dist.get_rank() == 0:
            schedule.step(torch.randn(4, 4))
        else:
            schedule.step(target=torch.randn(4, 4), losses=[])

    return _told(model, step, torch.optim.SGD(model.parameters(), lr=0.1))


def _ignoring(averages):
    """DDP leaves the first layer alone; a hook of the user's may average it."""
    model = zoo.small()
    names = [name for name, _ in model.named_parameters() if name.startswith("0.")]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
    wrapper = DistributedDataParallel(model)
    for parameter in model[0].parameters():
        if averages:
            parameter.register_post_accumulate_grad_hook(lambda one: dist.all_reduce(one.grad))

    def step():
        wrapper(torch.randn(8, 4)).square().mean().backward()

    return _told(wrapper, step, torch.optim.SGD(wrapper.parameters(), lr=0.1))


def _unsharded():
    from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = FullyShardedDataParallel(
            zoo.small(),
            sharding_strategy=ShardingStrategy.NO_SHARD,
            device_id=torch.device("cpu"),
        )
    with pytest.raises(ValueError, match=r"fully_shard\(\).* or use DistributedDataParallel"):
        gradwatch.watch(model)


def _all():
    torch.manual_seed(dist.get_rank())
    _unsharded()
    return {
        "ignoring": _ignoring(False),
        "averaging": _ignoring(True),
        "pipeline": _pipeline(),  # last: a stage that is still in memory is found
    }


@pytest.fixture(scope="module")
def ranks():
    """What each rank was told; NO_SHARD of FSDP1 is refused there."""
    return on_ranks(_all, RANKS)


@pytest.mark.parametrize(
    ("engine", "words"),
    [("pipeline", "stage of a pipeline"), ("ignoring", "was told to ignore them")],
)
def test_it_is_said_once_that_the_norms_are_those_of_one_rank(ranks, engine, words):
    """In an event and a warning, on every rank."""
    for seen in ranks:
        ((kind, message),) = seen[engine]["events"]
        assert kind == "changed"
        assert words in message
        assert seen[engine]["warnings"] == 1


def test_what_a_hook_averages_is_not_one_ranks_own(ranks):
    """Nothing is told then."""
    for seen in ranks:
        assert seen["averaging"]["events"] == []
        assert seen["averaging"]["warnings"] == 0


def test_a_mean_over_micro_batches_is_no_clip(ranks):
    """A schedule divides the gradients by their number after the last backward."""
    for seen in ranks:
        assert seen["pipeline"]["clip_coef"] == [1.0] * STEPS
