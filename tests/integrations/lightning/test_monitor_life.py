"""GradientMonitor: when it watches, when it does not, and what it leaves behind."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

import gradwatch
from gradwatch_lightning import GradientMonitor


class Probe(Callback):
    """Counts the hooks at moments of a fit."""

    def __init__(self, count):
        self.count = count
        self.hooks = {}

    def on_sanity_check_start(self, trainer, pl_module):
        self.hooks["sanity"] = self.count(pl_module, trainer.optimizers)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.hooks["training"] = self.count(pl_module, trainer.optimizers)

    def on_train_end(self, trainer, pl_module):
        self.hooks["end"] = self.count(pl_module, trainer.optimizers)


class Stop(Callback):
    """Raises in the middle of a fit."""

    def __init__(self, error):
        self.error = error

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx == 1:
            raise self.error


def test_hooks_are_there_in_training_only(kit):
    """No hook before the training, some during it, none after it."""
    monitor, probe = GradientMonitor(), Probe(kit.hooks_on)
    trainer, module = kit.trainer(monitor, probe), kit.Net()

    trainer.fit(module, kit.loader(2), kit.loader(2))

    assert probe.hooks["sanity"] == 0
    assert probe.hooks["training"] > 0
    assert kit.hooks_on(module, trainer.optimizers) == 0


def test_hooks_are_gone_after_an_exception(kit):
    """An exception in the training leaves no hook; what came before it is readable."""
    monitor, module = GradientMonitor(), kit.Net()
    trainer = kit.trainer(monitor, Stop(RuntimeError("stop here")))

    with pytest.raises(RuntimeError, match="stop here"):
        trainer.fit(module, kit.loader(4))

    assert kit.hooks_on(module, trainer.optimizers) == 0
    assert len(monitor.history) == 2
    with gradwatch.watch(module):
        pass


def test_hooks_are_gone_after_ctrl_c(kit):
    """A KeyboardInterrupt, which Lightning turns into an exit, leaves no hook."""
    monitor, module = GradientMonitor(), kit.Net()
    trainer = kit.trainer(monitor, Stop(KeyboardInterrupt()))

    with pytest.raises(SystemExit):
        trainer.fit(module, kit.loader(4))

    assert kit.hooks_on(module, trainer.optimizers) == 0
    assert len(monitor.history) == 2


def test_hooks_are_gone_after_an_error_inside_the_backward(kit):
    """A loss that cannot be differentiated stops the fit, and leaves no hook."""

    class Broken(kit.Net):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return loss.detach() if batch_idx == 1 else loss

    monitor, module = GradientMonitor(), Broken()
    trainer = kit.trainer(monitor)

    with pytest.raises(RuntimeError, match="does not require grad"):
        trainer.fit(module, kit.loader(3))

    assert kit.hooks_on(module, trainer.optimizers) == 0


def test_no_effect_outside_training(kit):
    """validate, test and predict leave no hook, no record and no log."""
    monitor, logger, module = GradientMonitor(clip=1.0), kit.CapturingLogger(), kit.Net()
    trainer = kit.trainer(monitor, logger=logger)

    trainer.validate(module, kit.loader(2), verbose=False)
    trainer.test(module, kit.loader(2), verbose=False)
    trainer.predict(module, kit.loader(2))

    assert kit.hooks_on(module, trainer.optimizers) == 0
    assert monitor.watcher is None
    assert not [tag for _, row in logger.rows for tag in row if tag.startswith("gradwatch")]


def test_records_outlive_a_validation_after_the_fit(kit):
    """trainer.validate after a fit neither adds to the history nor clears it."""
    monitor, module = GradientMonitor(), kit.Net()
    trainer = kit.trainer(monitor)
    trainer.fit(module, kit.loader(3))

    trainer.validate(module, kit.loader(2), verbose=False)

    assert list(monitor.history.steps().index) == [1, 2, 3]


def test_sanity_check_and_validation_leave_no_record(kit):
    """Validation before and between training batches adds nothing to the history."""
    monitor = GradientMonitor()
    options = {"num_sanity_val_steps": 2, "val_check_interval": 2, "max_epochs": 2}

    kit.trainer(monitor, **options).fit(kit.Net(), kit.loader(4), kit.loader(3))

    steps = monitor.history.steps()
    assert list(steps.index) == list(range(1, 9))
    assert set(steps.micro_batches) == {1}


def test_a_backward_in_validation_belongs_to_no_step(kit):
    """Gradients that a validation_step takes are thrown away with the next zero_grad."""

    class Saliency(kit.Net):
        def validation_step(self, batch, batch_idx):
            with torch.inference_mode(False), torch.enable_grad():
                x, y = (t.clone() for t in batch)
                self.loss((x, y)).backward()

    monitor, reference = GradientMonitor(), kit.Reference()
    options = {"val_check_interval": 1, "num_sanity_val_steps": 0, "inference_mode": False}
    kit.trainer(monitor, reference, **options).fit(Saliency(), kit.loader(3), kit.loader(2))

    steps = monitor.history.steps()
    assert set(steps.micro_batches) == {1}
    assert steps.grad_norm.tolist() == pytest.approx(reference.before, rel=1e-6)


def test_nothing_to_read_before_a_fit():
    """The history and the events say that nothing has been watched yet."""
    monitor = GradientMonitor()

    assert monitor.watcher is None
    for name in ("history", "events", "noise_scale"):
        with pytest.raises(RuntimeError, match=rf"GradientMonitor\.{name} was read.*callbacks="):
            getattr(monitor, name)


def test_a_second_fit_with_a_new_trainer_starts_anew(kit):
    """A monitor that is used again counts from 1 and shows the newest fit."""
    monitor = GradientMonitor(clip=0.3)
    kit.trainer(monitor).fit(kit.Net(), kit.loader(3))
    module = kit.Net()
    trainer = kit.trainer(monitor)
    trainer.fit(module, kit.loader(2))

    assert list(monitor.history.steps().index) == [1, 2]
    assert kit.hooks_on(module, trainer.optimizers) == 0


def test_a_trainer_that_goes_on_goes_on_counting(kit):
    """A second fit of the same Trainer, for more epochs, counts on where the first stopped."""
    monitor, module = GradientMonitor(), kit.Net()
    trainer = kit.trainer(monitor)
    trainer.fit(module, kit.loader(3))
    trainer.fit_loop.max_epochs = 2

    trainer.fit(module, kit.loader(3))

    assert list(monitor.history.steps().index) == [4, 5, 6]


def test_resume_from_a_checkpoint_counts_on(kit, tmp_path):
    """A fit resumed with ckpt_path has the steps and the norms of an uninterrupted one."""
    whole = GradientMonitor(clip=0.3)
    kit.trainer(whole, max_epochs=3).fit(kit.Net(), kit.loader(4))

    first = GradientMonitor(clip=0.3)
    trainer = kit.trainer(first, max_epochs=1)
    trainer.fit(kit.Net(), kit.loader(4))
    trainer.save_checkpoint(tmp_path / "epoch.ckpt")

    resumed, logger = GradientMonitor(clip=0.3), kit.CapturingLogger()
    trainer = kit.trainer(resumed, max_epochs=3, logger=logger)
    trainer.fit(kit.Net(), kit.loader(4), ckpt_path=tmp_path / "epoch.ckpt")

    expected, steps = whole.history.steps().iloc[4:], resumed.history.steps()
    assert list(steps.index) == list(range(5, 13))
    assert steps.grad_norm.tolist() == expected.grad_norm.tolist()
    assert [step for step, _ in logger.of("gradwatch/grad_norm")] == list(range(4, 12))


def test_checkpoints_in_the_middle_of_an_epoch_hold_the_state(kit, tmp_path):
    """ModelCheckpoint saves the monitor's state, as plain data, at the step of the checkpoint."""
    saver = ModelCheckpoint(
        dirpath=tmp_path, every_n_train_steps=2, save_top_k=-1, filename="{step}"
    )
    monitor = GradientMonitor()
    kit.trainer(monitor, saver, enable_checkpointing=True).fit(kit.Net(), kit.loader(5))

    state = torch.load(tmp_path / "step=4.ckpt", weights_only=True)["callbacks"]["GradientMonitor"]
    assert state["steps"] == {"SGD": 4}
    assert monitor.state_dict()["steps"] == {"SGD": 5}


def test_model_checkpoint_can_monitor_a_logged_norm(kit, tmp_path):
    """The logged scalars are metrics that a ModelCheckpoint may choose by."""
    saver = ModelCheckpoint(
        dirpath=tmp_path, monitor="gradwatch/grad_norm", every_n_train_steps=1, save_top_k=1
    )
    monitor = GradientMonitor()
    kit.trainer(monitor, saver, enable_checkpointing=True).fit(kit.Net(), kit.loader(5))

    assert float(saver.best_model_score) == pytest.approx(monitor.history.steps().grad_norm.min())


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_monitors_can_be_copied(kit, copier):
    """A deepcopy or a pickle gives a monitor with the same options, before and after a fit."""
    monitor = GradientMonitor(clip=0.01, statistics=("norm", "max"))
    before = copier(monitor)
    kit.trainer(monitor).fit(kit.Net(), kit.loader(2))
    after = copier(monitor)

    assert after.watcher is None
    for twin in (before, after):
        kit.trainer(twin).fit(kit.Net(), kit.loader(2))
        assert list(twin.history.steps().index) == [1, 2]
        assert twin.history.steps().clipped.all()
        assert "max" in twin.history.parameters()


def test_the_module_can_be_copied_and_saved_while_it_is_watched(kit, tmp_path):
    """Both deepcopy and torch.save of the module work in the middle of a fit."""

    class Copier(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            self.twin = copy.deepcopy(pl_module.body)
            torch.save(pl_module.body, tmp_path / "body.pt")

    copier = Copier()
    kit.trainer(GradientMonitor(), copier).fit(kit.Net(), kit.loader(2))

    loaded = torch.load(tmp_path / "body.pt", weights_only=False)
    for module in (copier.twin, loaded):
        module(torch.ones(1, 4)).sum().backward()
    assert all(p.grad is not None for p in copier.twin.parameters())


def test_a_fit_without_an_epoch_watches_nothing(kit):
    """max_epochs=0 trains nothing and attaches nothing."""
    monitor, module = GradientMonitor(), kit.Net()
    kit.trainer(monitor, max_epochs=0).fit(module, kit.loader(2))

    assert monitor.watcher is None


def test_fast_dev_run_and_barebones(kit):
    """The Trainer's modes without loggers are watched too."""
    for options in ({"fast_dev_run": 2}, {"barebones": True, "limit_train_batches": 2}):
        monitor = GradientMonitor()
        if "barebones" in options:
            options |= {"log_every_n_steps": 0, "enable_progress_bar": None, "logger": None}
            options |= {"enable_checkpointing": None, "enable_model_summary": None}
        kit.trainer(monitor, **options).fit(kit.Net(), kit.loader(4))
        assert len(monitor.history) == 2
