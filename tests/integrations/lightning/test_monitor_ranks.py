"""GradientMonitor on several ranks: all of them accumulate as many batches, and change at the same step."""

from __future__ import annotations

import itertools
import math
import os
import warnings

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, TensorDataset

from gradwatch import AccumulateByNoiseScale
from gradwatch_lightning import GradientMonitor
from tests.integrations.lightning.conftest import Net, trainer
from tests.support.launch import on_ranks

NOISE_SCALE = 96.0  # examples: 12 micro-batches of 4 on each of 2 ranks


class Watch(Callback):
    """The number of each batch, and which of them communicate their gradients."""

    def __init__(self):
        self.numbers, self.communicating = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.numbers.append(trainer.accumulate_grad_batches)

    def on_after_backward(self, trainer, pl_module):
        self.communicating.append(trainer.model.require_backward_grad_sync)


class Known(Net):
    """A module whose gradient is the mean of its batch."""

    def __init__(self):
        super().__init__()
        self.body = torch.nn.Linear(64, 1, bias=False)
        self.told = []

    def training_step(self, batch, batch_idx):
        loss = self.body(batch[0]).mean()
        self.told.append(loss.item())
        return loss


def draws(batches):
    """Makes batches of draws around a known gradient."""
    generator = torch.Generator().manual_seed(5)
    gradient = torch.randn(64, generator=generator)
    noise = torch.randn(batches * 8, 64, generator=generator) * math.sqrt(NOISE_SCALE / 64)
    return DataLoader(TensorDataset(gradient / gradient.norm() + noise), batch_size=4)


def fit(accumulate, batches, trainer_accumulates=1):
    """Trains, and returns what the rank saw."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "1", "LOCAL_WORLD_SIZE": str(ranks)}
    warnings.simplefilter("ignore")
    seed_everything(1)
    monitor, watch = GradientMonitor(accumulate=accumulate, buffer_size=4096), Watch()
    strategy = DDPStrategy(cluster_environment=TorchElasticEnvironment())
    options = {"devices": ranks, "accumulate_grad_batches": trainer_accumulates}
    one = trainer(monitor, watch, strategy=strategy, **options)
    module = Known()
    one.fit(module, draws(batches))
    steps = monitor.history.steps()
    return {
        "numbers": watch.numbers,
        "communicating": watch.communicating,
        "windows": steps.micro_batches.tolist(),
        "told": module.told,
        "loss": steps.loss.tolist(),
        "noise_scale": steps.noise_scale.tolist(),
        "noise": float(monitor.noise_scale),
        "events": [(event.kind, event.step, event.value) for event in monitor.events],
        "weights": module.body.weight.detach().clone(),
        "world": one.world_size,
    }


def fits():
    """What one rank does: three trainings, one after the other."""
    policy = AccumulateByNoiseScale(min=1, max=16, every=5, min_updates=20)
    return {
        "auto": fit(policy, batches=300),
        "schedule": fit({0: 2, 2: 4, 3: 1}, batches=10),
        "trainer": fit(None, batches=200, trainer_accumulates=4),
    }


@pytest.fixture(scope="module")
def ranks():
    """What each of two ranks has seen; they take seconds to import Lightning."""
    return on_ranks(fits, 2)


def test_all_ranks_follow_the_noise_scale_together(ranks):
    """With a policy by the noise scale two ranks have the same estimate at each step, and switch at the same one."""
    first, second = (rank["auto"] for rank in ranks)

    assert first["world"] == 2
    assert len(first["numbers"]) == 300
    for key in ("numbers", "windows", "noise_scale", "events", "noise"):
        assert str(first[key]) == str(second[key])  # NaN is not equal to itself
    assert torch.equal(first["weights"], second["weights"])
    assert first["numbers"][0] == 1
    assert first["numbers"][-1] in (8, 16)
    assert first["noise"] == pytest.approx(NOISE_SCALE / 4, rel=0.2)  # in micro-batches


def test_the_flags_of_the_wrapper_are_lightnings(ranks):
    """Only the last batch of a window communicates, as Lightning has it, with a changing number too."""
    first = ranks[0]["schedule"]

    assert first["windows"] == [2, 2, 4, 1, 1]
    assert [i + 1 for i, on in enumerate(first["communicating"]) if on] == [2, 4, 8, 9, 10]


def test_the_loss_of_a_step(ranks):
    """It is the mean over this rank's batches; over those of all ranks where these communicate."""
    for one in (rank["trainer"] for rank in ranks):
        wanted = [sum(one["told"][i : i + 4]) / 4 for i in range(0, 200, 4)]
        assert one["loss"] == pytest.approx(wanted, rel=1e-4, abs=1e-6)

    both = [rank["auto"] for rank in ranks]
    told = [(a + b) / 2 for a, b in zip(*(one["told"] for one in both), strict=True)]
    ends = itertools.accumulate(both[0]["windows"])
    wanted = [
        sum(told[end - size : end]) / size
        for size, end in zip(both[0]["windows"], ends, strict=True)
    ]
    for one in both:
        assert one["loss"] == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_what_the_trainer_accumulates_has_a_noise_scale_too(ranks):
    """Without accumulate= each rank compares its own gradient with the reduced one."""
    first, second = (rank["trainer"] for rank in ranks)

    assert first["windows"] == second["windows"] == [4] * 50
    for one in (first, second):
        assert one["noise"] == pytest.approx(NOISE_SCALE / 4, rel=0.5)
