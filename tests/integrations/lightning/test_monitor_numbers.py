"""GradientMonitor: the numbers are those that Lightning itself sees."""

from __future__ import annotations

import math

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BaseFinetuning, GradientAccumulationScheduler

from gradwatch import ClipByNorm, ClipByValue
from gradwatch_lightning import GradientMonitor


def sgd(parameters):
    """Makes an SGD."""
    return torch.optim.SGD(parameters, lr=0.05)


def test_norm_is_that_of_on_before_optimizer_step(kit):
    """grad_norm is the float64 norm that on_before_optimizer_step sees, at each step."""
    monitor, reference = GradientMonitor(), kit.Reference()

    kit.trainer(monitor, reference).fit(kit.Net(), kit.loader(6))

    steps = monitor.history.steps()
    assert list(steps.index) == [1, 2, 3, 4, 5, 6]
    assert steps.grad_norm.tolist() == pytest.approx(reference.before, rel=1e-6)
    assert steps.grad_norm_clipped.tolist() == steps.grad_norm.tolist()
    assert set(steps.optimizer) == {"SGD"}
    assert set(steps.outcome) == {"applied"}
    assert set(steps.micro_batches) == {1}
    assert set(steps.lr) == {0.05}


def test_both_sides_of_the_trainers_clip_by_norm(kit):
    """With Trainer(gradient_clip_val=) both norms are Lightning's, and clip_coef is their ratio."""
    monitor, reference = GradientMonitor(), kit.Reference()

    kit.trainer(monitor, reference, gradient_clip_val=0.7).fit(kit.Net(), kit.loader(8))

    steps = monitor.history.steps()
    assert steps.grad_norm.tolist() == pytest.approx(reference.before, rel=1e-6)
    assert steps.grad_norm_clipped.tolist() == pytest.approx(reference.after, rel=1e-6)
    assert steps.clipped.tolist() == [norm > 0.7 for norm in reference.before]
    assert 0 < steps.clipped.sum() < 8
    ratio = [
        after / before for before, after in zip(reference.before, reference.after, strict=True)
    ]
    assert steps.clip_coef.tolist() == pytest.approx(ratio, rel=1e-6)


def test_both_sides_of_the_trainers_clip_by_value(kit):
    """Trainer(gradient_clip_algorithm="value") is seen on both sides too."""
    monitor, reference = GradientMonitor(), kit.Reference()
    options = {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"}

    kit.trainer(monitor, reference, **options).fit(kit.Net(), kit.loader(4))

    steps = monitor.history.steps()
    assert steps.grad_norm.tolist() == pytest.approx(reference.before, rel=1e-6)
    assert steps.grad_norm_clipped.tolist() == pytest.approx(reference.after, rel=1e-6)
    assert steps.clipped.all()


def test_own_clip_gives_the_weights_of_the_trainers_clip(kit):
    """GradientMonitor(clip=m) trains bit for bit what Trainer(gradient_clip_val=m) trains."""
    ours, theirs = kit.Net(), kit.Net()
    monitor, reference = GradientMonitor(clip=0.7), kit.Reference()

    kit.trainer(monitor, reference).fit(ours, kit.loader(8))
    kit.trainer(gradient_clip_val=0.7).fit(theirs, kit.loader(8))

    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)
    steps = monitor.history.steps()
    assert steps.grad_norm.tolist() == pytest.approx(reference.before, rel=1e-6)
    assert steps.grad_norm_clipped.tolist() == pytest.approx(reference.after, rel=1e-6)
    assert set(steps.clip_threshold) == {0.7}
    assert 0 < steps.clipped.sum() < 8


@pytest.mark.parametrize("policy", [ClipByNorm(0.3, norm_type=math.inf), ClipByValue(0.05)])
def test_clipping_policies_reach_the_watcher(kit, policy):
    """A policy object clips as it does in a plain loop."""
    monitor, reference = GradientMonitor(clip=policy), kit.Reference()

    kit.trainer(monitor, reference).fit(kit.Net(), kit.loader(4))

    assert monitor.history.steps().clipped.any()
    assert reference.largest <= 0.3 * (1 + 1e-6)


@pytest.mark.parametrize("clip", [None, 0.2])
def test_accumulation_is_observed(kit, clip):
    """accumulate_grad_batches=3 over 8 batches gives windows of 3, 3 and a short last one of 2."""
    monitor, reference = GradientMonitor(clip=clip), kit.Reference()

    kit.trainer(monitor, reference, accumulate_grad_batches=3).fit(kit.Net(), kit.loader(8))

    steps = monitor.history.steps()
    assert steps.micro_batches.tolist() == [3, 3, 2]
    assert steps.grad_norm.tolist() == pytest.approx(reference.before, rel=1e-6)
    after = [reference.after[i] for i in (2, 5, 7)]
    assert steps.grad_norm_clipped.tolist() == pytest.approx(after, rel=1e-6)


def test_accumulation_goes_over_epochs(kit):
    """Each epoch ends with a window of its own: 5 batches by 2 are windows of 2, 2 and 1, twice."""
    monitor = GradientMonitor()

    kit.trainer(monitor, accumulate_grad_batches=2, max_epochs=2).fit(kit.Net(), kit.loader(5))

    assert monitor.history.steps().micro_batches.tolist() == [2, 2, 1, 2, 2, 1]


def test_accumulation_that_changes_over_epochs(kit):
    """GradientAccumulationScheduler's windows are recorded as they are."""
    monitor, scheduler = GradientMonitor(), GradientAccumulationScheduler({0: 1, 1: 3})

    kit.trainer(monitor, scheduler, max_epochs=2).fit(kit.Net(), kit.loader(4))

    assert monitor.history.steps().micro_batches.tolist() == [1, 1, 1, 1, 3, 1]


@pytest.mark.parametrize("same_class", [True, False])
def test_two_optimizers_by_manual_optimization(kit, same_class):
    """Each optimizer of a GAN has its own steps, with the norms that Lightning sees of it."""
    monitor, reference = GradientMonitor(), kit.Reference()

    kit.trainer(monitor, reference).fit(kit.Gan(same_class=same_class), kit.loader(5))

    steps = monitor.history.steps()
    second = "Adam-1" if same_class else "SGD"
    assert steps.optimizer.tolist() == ["Adam", second] * 5
    assert list(steps.index) == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert steps.grad_norm.tolist() == pytest.approx(reference.before, rel=1e-6)
    assert set(steps.micro_batches) == {1}
    assert monitor.events == []


def test_own_clip_takes_each_optimizer_by_itself(kit):
    """In manual optimization the norm that is clipped is that of the stepping optimizer alone."""
    monitor, reference = GradientMonitor(clip=0.1), kit.Reference()

    kit.trainer(monitor, reference).fit(kit.Gan(), kit.loader(4))

    steps = monitor.history.steps()
    assert steps.grad_norm.tolist() == pytest.approx(reference.before, rel=1e-6)
    assert steps.grad_norm_clipped.max() <= 0.1 * (1 + 1e-6)


def test_optimizers_that_lightning_does_not_know_are_found(kit):
    """A module that keeps its optimizer to itself is watched all the same."""

    class Private(kit.Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.own = torch.optim.SGD(self.parameters(), lr=0.1)

        def training_step(self, batch, batch_idx):
            self.own.zero_grad()
            self.manual_backward(self.loss(batch))
            self.own.step()

        def configure_optimizers(self):
            return None

    monitor, module = GradientMonitor(), Private()
    with pytest.warns(UserWarning, match="will run with no optimizer"):
        kit.trainer(monitor).fit(module, kit.loader(3))

    steps = monitor.history.steps()
    assert steps.optimizer.tolist() == ["SGD"] * 3
    assert steps.grad_norm.iloc[-1] == pytest.approx(kit.norm_of(module.own), rel=1e-6)


def test_lbfgs_under_automatic_optimization(kit):
    """LBFGS evaluates its closure several times; the record is that of the last evaluation."""
    monitor, reference = GradientMonitor(), kit.Reference()
    module = kit.Net(lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=4))

    kit.trainer(monitor, reference).fit(module, kit.loader(3))

    steps = monitor.history.steps()
    assert steps.optimizer.tolist() == ["LBFGS"] * 3
    assert len(reference.before) > 3
    assert steps.grad_norm.tolist() == pytest.approx(reference.after, rel=1e-6)


def test_parameters_that_are_unfrozen_later(kit):
    """Parameters that BaseFinetuning unfreezes in epoch 1 are in the norm from then on."""

    class Unfreeze(BaseFinetuning):
        def freeze_before_training(self, pl_module):
            self.freeze(pl_module.body[0])

        def finetune_function(self, pl_module, epoch, optimizer):
            if epoch == 1:
                self.unfreeze_and_add_param_group(pl_module.body[0], optimizer, lr=0.05)

    monitor, reference = GradientMonitor(), kit.Reference()
    module = kit.Net(lambda p: torch.optim.SGD([q for q in p if q.requires_grad], lr=0.05))

    kit.trainer(monitor, Unfreeze(), reference, max_epochs=2).fit(module, kit.loader(3))

    steps = monitor.history.steps()
    assert steps.grad_norm.tolist() == pytest.approx(reference.before, rel=1e-6)
    parameters = monitor.history.parameters()
    late = parameters[parameters.parameter == "body.0.weight"]
    assert late.step.tolist() == [4, 5, 6]


@pytest.mark.filterwarnings("ignore:.*returned `None`")  # Lightning says it once per process
def test_a_batch_without_a_loss_counts_as_no_backward(kit):
    """training_step may return None: its step has no micro-batch, and the others stay right."""

    class Picky(kit.Net):
        def training_step(self, batch, batch_idx):
            return None if batch_idx == 1 else super().training_step(batch, batch_idx)

    monitor = GradientMonitor()
    kit.trainer(monitor).fit(Picky(), kit.loader(3))

    steps = monitor.history.steps()
    assert steps.micro_batches.sum() == 2
    assert (steps.grad_norm[steps.micro_batches > 0] > 0).all()
    assert monitor.events == []


def test_names_are_those_of_the_module(kit):
    """Parameters are named as LightningModule.named_parameters() names them."""
    monitor, module = GradientMonitor(), kit.Net()

    kit.trainer(monitor).fit(module, kit.loader(1))

    names = monitor.history.parameters().parameter.tolist()
    assert names == [name for name, _ in module.named_parameters()]


@pytest.mark.parametrize(
    "make_optimizer",
    [
        sgd,
        lambda p: torch.optim.AdamW(p, lr=0.01),
        lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
        lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
    ],
    ids=["SGD", "AdamW", "AdamW fused", "LBFGS"],
)
@pytest.mark.parametrize(
    "options", [{}, {"gradient_clip_val": 0.3}, {"accumulate_grad_batches": 2}]
)
def test_watching_changes_no_bit_of_the_weights(kit, make_optimizer, options):
    """Weights are bit-identical with and without a monitor that only watches."""
    watched, bare = kit.Net(make_optimizer), kit.Net(make_optimizer)
    monitor = GradientMonitor(statistics=("norm", "max", "update_ratio"))

    kit.trainer(monitor, **options).fit(watched, kit.loader(6))
    kit.trainer(**options).fit(bare, kit.loader(6))

    assert len(monitor.history) > 0
    for mine, other in zip(watched.parameters(), bare.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_gradients_that_a_user_hook_changes_count_as_changed_after_the_backward(kit):
    """What a callback does in on_before_optimizer_step lies between both sides of the clip."""

    class Halve(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            for parameter in pl_module.parameters():
                parameter.grad.mul_(0.5)

    monitor = GradientMonitor()
    kit.trainer(monitor, Halve()).fit(kit.Net(), kit.loader(3))

    assert monitor.history.steps().clip_coef.tolist() == pytest.approx([0.5] * 3, rel=1e-6)
