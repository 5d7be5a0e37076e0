"""Curvature along a training: what is computed for it leaves no trace in the training."""

import random

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import gradwatch
from tests.support.launch import on_ranks
from tests.support.state import differences, state_of
from tests.support.zoo import MODELS

from .covering import covering_array
from .layouts import ddp
from .loop import Loop
from .params import every_row

STEPS = 8
EVERY = 3
REFUSED = ("complex",)
BENT_NOT = ("reentrant", "sparse", "all_sparse")  # torch cannot differentiate them twice
AXES = {
    "model": [name for name in MODELS if name not in REFUSED],
    "optimizer": ["SGD_bare", "SGD", "Adam", "AdamW_fused", "LBFGS", "SAM"],
    "precision": ["float32", "float64", "autocast_bf16", "autocast_fp16"],
    "micro_batches": ["1", "3"],
    "own_clip": ["no_clip", "clip"],
    "zeroing": ["to_none", "to_zero"],
    "watching": ["named", "found", "statistics"],
    "takes": ["nothing", "the_model"],
}
FORBIDDEN = [
    {"model": ["sparse", "all_sparse"], "optimizer": ["SGD", "Adam", "AdamW_fused"]},
    {"model": ["sparse", "all_sparse"], "own_clip": ["clip"]},
    {"model": ["lstm"], "precision": ["autocast_fp16"]},
    {"optimizer": ["LBFGS", "SAM"], "precision": ["autocast_fp16"]},
]
WRAPPED = {
    "model": ["mlp", "cnn", "transformer"],
    "micro_batches": ["1", "3"],
    "takes": ["nothing", "the_model"],
    "watched": ["wrapper", "module"],
    "option": ["none", "gradient_as_bucket_view", "static_graph", "find_unused_parameters"],
}
WRAPPED_FORBIDDEN = [{"option": ["static_graph"], "micro_batches": ["3"]}]  # torch refuses it


class Bending(Loop):
    """A loop whose watcher takes the curvature of a batch that stays the same."""

    def _watch(self, further):
        batch = tuple(self.precision.of(tensor) for tensor in self.case.batch(10_000))

        def of_model(model):
            random.random()
            np.random.random()
            with self.precision.forward("cpu"):
                return self.case.loss(model, batch)

        takes_model = self.setting.get("takes") == "the_model"
        loss = of_model if takes_model else lambda: of_model(self.model)
        asked = gradwatch.CurvatureEvery(EVERY, loss, iterations=4, probes=2)
        return super()._watch({"curvature": asked, **further})

    def taken(self):
        """How often it was taken."""
        return int(self.watcher.history.steps()["hessian_eigenvalue"].notna().sum())


def _make(setting, watched, **more):
    return (Bending if watched else Loop)(setting, watched=watched, **more)


@pytest.mark.parametrize("setting", every_row(covering_array(AXES, FORBIDDEN)))
def test_the_training_is_bit_identical(setting):
    """Weights, gradients, buffers, optimizer state and generators are those of the bare loop."""
    bare, watched = _make(setting, False), _make(setting, True)
    assert list(differences(bare.run(STEPS), watched.run(STEPS))) == []
    assert STEPS - bare.overflows <= watched.steps_seen() <= STEPS
    if setting["model"] in BENT_NOT:
        assert watched.taken() == 0
    else:
        assert watched.taken() >= (STEPS - bare.overflows) // EVERY


def _ranked(setting):
    option = setting["option"]
    layout = ddp(2, **({} if option == "none" else {option: True}))
    rank = dist.get_rank()
    bare, watched = (_make(setting, w, layout=layout, rank=rank) for w in (False, True))
    found = list(differences(bare.run(STEPS), watched.run(STEPS)))
    return found, watched.taken()


@pytest.mark.parametrize("setting", every_row(covering_array(WRAPPED, WRAPPED_FORBIDDEN)))
def test_a_ddp_training_is_bit_identical(setting):
    """Under DistributedDataParallel each rank's whole state is that of the bare loop."""
    for found, taken in on_ranks(_ranked, 2, setting=setting):
        assert found == []
        assert taken == 3


def _with_a_critic(bends):
    torch.manual_seed(0)
    model, critic = nn.Linear(3, 2), nn.parallel.DistributedDataParallel(nn.Linear(2, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(4, 3)

    def loss():
        return critic(model(x).tanh()).square().mean()

    asked = gradwatch.CurvatureEvery(2, loss) if bends else None
    named = dict(model.named_parameters())
    with gradwatch.watch(named, optimizer, curvature=asked) as watcher:
        for _ in range(5):
            optimizer.zero_grad()
            loss().backward()
            optimizer.step()
    return state_of(model, optimizer), watcher.history.steps()["hessian_trace"].notna().tolist()


def _both():
    (bare, _), (bent, taken) = _with_a_critic(False), _with_a_critic(True)
    return list(differences(bare, bent)), taken


def test_a_wrapper_beside_the_model_goes_on_too():
    """A loss that calls a wrapper which is no part of what is watched leaves that able to go on."""
    for found, taken in on_ranks(_both, 2):
        assert found == []
        assert taken == [True, False, True, False, True]
