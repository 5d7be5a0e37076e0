"""watch_all() on several ranks, under DDP and FSDP2."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import gradwatch
from gradwatch.hooks import exchange
from tests.support import zoo
from tests.support.launch import on_ranks

STEPS = 4
KEPT = []  # what a job goes on using


def _model(kind):
    if kind == "fsdp":
        model = zoo.small_sharded()
        return model, model
    model = zoo.small()
    return model, DistributedDataParallel(model)


def _train(kind, bad_rank=None):
    """Trains for some steps; returns the norms in float64 and the weights."""
    rank = dist.get_rank()
    model, wrapped = _model(kind)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    norms = []
    for step in range(STEPS):
        torch.manual_seed(100 * rank + step)
        x = torch.randn(6, 4)
        if step == 2 and rank == bad_rank:
            x[1, 1] = torch.nan
        wrapped(x).square().mean().backward()
        gradients = [_whole(parameter.grad).double() for parameter in model.parameters()]
        norms.append(float(torch.cat([one.flatten() for one in gradients]).norm()))
        optimizer.step()
        optimizer.zero_grad()
    weights = [_whole(parameter.detach()) for parameter in model.parameters()]
    return norms, torch.cat([one.flatten() for one in weights]).tolist()


def _whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _watched(kind, options, bad_rank=None):
    with gradwatch.watch_all(**options) as watching:
        norms, weights = _train(kind, bad_rank)
    (watcher,) = watching.watchers
    steps = watcher.history.steps()
    names = list(dict.fromkeys(watcher.history.parameters()["parameter"]))
    return norms, weights, steps["grad_norm"].tolist(), steps["outcome"].tolist(), names


needs_fsdp = pytest.mark.skipif(
    torch.__version__ < "2.9", reason="FSDP2 on CPUs needs torch 2.9 or newer"
)


@pytest.mark.parametrize("kind", ["ddp", pytest.param("fsdp", marks=needs_fsdp)])
def test_norms(kind):
    """Both ranks record the norms of the reduced gradients, and train as unwatched ones do."""
    plain = on_ranks(_train, 2, kind=kind)
    watched = on_ranks(_watched, 2, kind=kind, options={})
    for (norms, weights), (_, same, recorded, _, names) in zip(plain, watched, strict=True):
        assert same == weights
        assert names == ["0.weight", "0.bias", "2.weight", "2.bias"]
        assert recorded == pytest.approx(norms, rel=1e-5)


def test_all_ranks_act():
    """A step is skipped on all ranks, which stay alike."""
    options = {"on_nonfinite": "skip", "clip": 0.5}
    first, second = on_ranks(_watched, 2, kind="ddp", options=options, bad_rank=1)
    assert first[3] == second[3] == ["applied", "applied", "skipped_nonfinite", "applied"]
    assert first[1] == second[1]


def _one_acts():
    loss = _forward()
    if dist.get_rank():
        return ""  # its backward would wait for the other rank, which does not get that far
    with mock.patch.object(exchange, "START_WAIT_S", 2.0):
        return _refusal(loss, on_nonfinite="skip")


def _both_act():
    return _refusal(_forward(), clip=1.0 + dist.get_rank())


def _forward():
    model = DistributedDataParallel(zoo.small())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = model(torch.ones(2, 4)).sum()
    KEPT.extend((model, optimizer))
    return loss


def _refusal(loss, **options):
    with gradwatch.watch_all(**options), pytest.raises(RuntimeError) as refused:
        loss.backward()
    return str(refused.value)


def test_one_rank_acts():
    """A rank that would act alone is refused, with what to do."""
    texts = on_ranks(_one_acts, 2)
    assert 'on_nonfinite="skip" cannot be had on some ranks only' in texts[0]
    assert "rank 1 did not begin to watch" in texts[0]
    assert "torchrun" in texts[0]


def test_ranks_act_differently():
    """Ranks that would clip to different limits are refused."""
    texts = on_ranks(_both_act, 2)
    assert all("rank 1 has clip=" in text or "rank 0 has clip=" in text for text in texts)
