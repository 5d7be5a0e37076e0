"""GradientMonitor: the column ``loss``, against what ``training_step`` returned."""

from __future__ import annotations

import math

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins import MixedPrecision

from gradwatch import AccumulateByNoiseScale
from gradwatch_lightning import GradientMonitor


def told(kit, *args):
    """Makes a module that keeps the losses that its training_step returns."""

    class Told(kit.Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.told.append(loss.item())
            return loss

    module = Told(*args)
    module.told = []
    return module


def mean_of(told, *sizes):
    """The means over windows of these sizes."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [sum(told[end - size : end]) / size for size, end in zip(sizes, ends, strict=True)]


def losses(monitor):
    """The column."""
    return monitor.history.steps().loss.tolist()


@pytest.mark.parametrize("clip", [None, 0.2])
def test_the_loss_of_a_step_is_the_mean_of_its_batches(kit, clip):
    """So it is in the short last window of an epoch, whose losses Lightning divides by 3 too."""
    monitor, module = GradientMonitor(clip=clip), told(kit)

    kit.trainer(monitor, accumulate_grad_batches=3, max_epochs=2).fit(module, kit.loader(8))

    assert losses(monitor) == pytest.approx(mean_of(module.told, 3, 3, 2, 3, 3, 2), rel=1e-6)


def test_without_accumulation_it_is_that_of_the_batch(kit):
    """Each step has the loss that training_step returned for it, bit for bit."""
    monitor, module = GradientMonitor(), told(kit)

    kit.trainer(monitor).fit(module, kit.loader(4))

    assert losses(monitor) == module.told


def test_a_number_of_batches_that_changes(kit):
    """With a GradientAccumulationScheduler each loss is divided by the number of its epoch."""
    monitor, module = GradientMonitor(), told(kit)
    scheduler = GradientAccumulationScheduler({0: 1, 1: 3})

    kit.trainer(monitor, scheduler, max_epochs=2).fit(module, kit.loader(4))

    assert losses(monitor) == pytest.approx(mean_of(module.told, 1, 1, 1, 1, 3, 1), rel=1e-6)


def test_the_monitors_own_number_of_batches(kit):
    """The same where a policy of the monitor sets the Trainer's number."""
    policy = AccumulateByNoiseScale(start=2, max=2)
    monitor, module = GradientMonitor(accumulate=policy), told(kit)

    kit.trainer(monitor).fit(module, kit.loader(4))

    assert losses(monitor) == pytest.approx(mean_of(module.told, 2, 2), rel=1e-6)


@pytest.mark.filterwarnings("ignore:.*returned `None`")
def test_a_dict_and_batches_that_are_left_out(kit):
    """A training_step may return a dict, and None to leave out a batch: the rest are the mean."""

    class Choosy(kit.Net):
        told = ()

        def training_step(self, batch, batch_idx):
            if batch_idx in (1, 3, 5):
                return None
            loss = super().training_step(batch, batch_idx)
            self.told = [*self.told, loss.item()]
            return {"loss": loss, "other": 3.0}

    monitor, module = GradientMonitor(), Choosy()
    kit.trainer(monitor, accumulate_grad_batches=4).fit(module, kit.loader(8))

    assert losses(monitor) == pytest.approx(mean_of(module.told, 2, 3), rel=1e-6)


def test_closures_that_are_called_several_times(kit):
    """LBFGS: the loss is that of the last evaluation, as is the gradient norm."""
    monitor = GradientMonitor()
    module = told(kit, lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=4))
    ends = []

    class Count(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            ends.append(len(pl_module.told))

    kit.trainer(monitor, Count()).fit(module, kit.loader(3))

    assert ends[0] > 1
    assert losses(monitor) == [module.told[end - 1] for end in ends]


def test_the_loss_scale_is_taken_out(kit):
    """Under 16-mixed the loss is that of training_step, also while the scale changes."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    monitor, module = GradientMonitor(), told(kit)

    trainer = kit.trainer(monitor, plugins=[plugin], accumulate_grad_batches=2)
    trainer.fit(module, kit.loader(9))

    assert len(set(monitor.history.steps().loss_scale)) > 1
    assert losses(monitor) == pytest.approx(mean_of(module.told, 2, 2, 2, 2, 1), rel=1e-6)


def test_a_batch_with_nan_is_in_the_loss_of_its_step_only(kit):
    """A step that the scaler leaves out has the NaN; the next one has its own loss."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    monitor, module = GradientMonitor(), told(kit)

    kit.trainer(monitor, plugins=[plugin]).fit(module, kit.loader(4, poison=1))

    assert [math.isnan(loss) for loss in losses(monitor)] == [False, True, False, False]
    assert losses(monitor)[2:] == pytest.approx(module.told[2:], rel=1e-6)


def test_manual_optimization_of_several_optimizers(kit):
    """Each step has the loss that was given to manual_backward() for it."""

    class Noted(kit.Gan):
        def __init__(self, *args):
            super().__init__(*args)
            self.told = {}

        def manual_backward(self, loss, *args, **kwargs):
            active = [p for p in self.generator.parameters() if p.requires_grad]
            self.told.setdefault("G" if active else "D", []).append(loss.item())
            super().manual_backward(loss, *args, **kwargs)

    monitor, module = GradientMonitor(), Noted()
    kit.trainer(monitor).fit(module, kit.loader(3))

    steps = monitor.history.steps()
    for label, told_of in zip(steps.optimizer.unique(), module.told.values(), strict=True):
        assert steps[steps.optimizer == label].loss.tolist() == told_of


@pytest.mark.parametrize("with_closure", [False, True])
@pytest.mark.parametrize("divide", [1, 2])
def test_manual_accumulation_has_no_loss(kit, divide, with_closure):
    """Whether the module has divided its losses is not known, so neither is their mean."""

    class Manual(kit.Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            def closure():
                loss = self.loss(batch) / divide
                self.manual_backward(loss)
                return loss

            optimizer, last = self.optimizers(), batch_idx in (1, 3, 4)
            if with_closure and last:
                optimizer.step(closure)
            else:
                closure()
            if last and not with_closure:
                optimizer.step()
            if last:
                optimizer.zero_grad()

    monitor = GradientMonitor()
    kit.trainer(monitor).fit(Manual(), kit.loader(5))

    assert monitor.history.steps().micro_batches.tolist() == [2, 2, 1]
    assert [math.isnan(loss) for loss in losses(monitor)] == [True, True, False]
