"""GradientMonitor: fits that follow each other, and fits with nothing to watch at their start."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.tuner import Tuner
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gradwatch_lightning import GradientMonitor

# What Lightning says of a second fit, and of a fit in a folder of an earlier one.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Experiment logs directory"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory"),
]


def written(logger, tag):
    """Lists the steps of a tag in TensorBoard, in order: its files are read in that of their names."""
    run = EventAccumulator(logger.log_dir, purge_orphaned_data=False)
    run.Reload()
    return sorted(event.step for event in run.Scalars(tag))


def sessions(logger):
    """Counts the sessions of the Gradients tab."""
    run = EventAccumulator(logger.log_dir)
    run.Reload()
    return sum(tag.startswith("gradwatch/layout/") for tag in run.Tags()["tensors"])


class Tuned:
    """A module whose learning rate and batch size Lightning can find."""

    @staticmethod
    def of(kit):
        class Module(kit.Net):
            lr, batch_size = 0.05, 2

            def val_dataloader(self):
                return self.train_dataloader()

            def train_dataloader(self):
                data = TensorDataset(torch.randn(12, 4), torch.randn(12, 1))
                return DataLoader(data, batch_size=self.batch_size)

            def configure_optimizers(self):
                return torch.optim.SGD(self.parameters(), lr=self.lr)

        return Module()


def test_a_second_fit_goes_on_in_tensorboard(kit, tmp_path):
    """The logger closes its file after the first fit; scalars and the Gradients tab go on."""
    logger, monitor, module = TensorBoardLogger(tmp_path), GradientMonitor(), kit.Net()
    trainer = kit.trainer(monitor, logger=logger)
    trainer.fit(module, kit.loader(3))
    trainer.fit_loop.max_epochs = 2

    trainer.fit(module, kit.loader(3))

    assert written(logger, "gradwatch/grad_norm") == [0, 1, 2, 3, 4, 5]
    assert sessions(logger) == 2
    assert monitor.history.steps().index.tolist() == [4, 5, 6]


def test_folds_with_one_logger(kit, tmp_path):
    """A Trainer and a monitor for each fold: each begins at Lightning's first step."""
    logger = TensorBoardLogger(tmp_path)
    for _ in range(3):
        kit.trainer(GradientMonitor(), logger=logger).fit(kit.Net(), kit.loader(2))

    assert written(logger, "gradwatch/grad_norm") == [0, 0, 0, 1, 1, 1]
    assert sessions(logger) == 3


def test_one_monitor_with_several_loggers(kit, tmp_path):
    """Validation, test and prediction between the fits close the file as well."""
    loggers = [TensorBoardLogger(tmp_path, name) for name in ("a", "b")]
    monitor, module = GradientMonitor(), kit.Net()
    trainer = kit.trainer(monitor, logger=[loggers[0], kit.CapturingLogger(), loggers[1]])
    trainer.validate(module, kit.loader(1), verbose=False)
    trainer.fit(module, kit.loader(2))
    trainer.test(module, kit.loader(1), verbose=False)
    trainer.predict(module, kit.loader(1))
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, kit.loader(2))

    for logger in loggers:
        assert written(logger, "gradwatch/grad_norm") == [0, 1, 2, 3]
        assert sessions(logger) == 2


def test_another_trainer_closes_the_file_in_the_middle_of_a_fit(kit, tmp_path):
    """It validates with the same logger, and the same monitor: the fit stays watched."""
    logger, monitor = TensorBoardLogger(tmp_path), GradientMonitor()

    class Validate(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            other = kit.trainer(monitor, logger=logger)
            other.validate(kit.Net(), kit.loader(1), verbose=False)

    kit.trainer(monitor, Validate(), logger=logger, max_epochs=2).fit(kit.Net(), kit.loader(2))

    assert written(logger, "gradwatch/grad_norm") == [0, 1, 2, 3]
    assert monitor.history.steps().index.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("find", ["lr_find", "scale_batch_size"])
@pytest.mark.filterwarnings("ignore:The number of training batches", "ignore:.*weights_only")
def test_a_tuner_before_the_fit(kit, tmp_path, find):
    """The tuner runs its own short fits; only the steps of the fit after it are recorded."""
    logger, monitor, module = TensorBoardLogger(tmp_path), GradientMonitor(), Tuned.of(kit)
    options = {"default_root_dir": tmp_path, "limit_train_batches": 3, "limit_val_batches": 1}
    trainer = kit.trainer(monitor, logger=logger, **options)
    how = {"num_training": 4} if find == "lr_find" else {"max_trials": 1, "steps_per_trial": 1}
    getattr(Tuner(trainer), find)(module, **how)

    trainer.fit(module)

    assert monitor.history.steps().index.tolist() == [1, 2, 3]
    assert written(logger, "gradwatch/grad_norm") == [0, 1, 2]


def test_a_fit_that_failed_can_be_tried_again(kit, tmp_path):
    """With the same Trainer, and with another one and another monitor."""

    class Fails(kit.Net):
        fails = True

        def training_step(self, batch, batch_idx):
            if self.fails and batch_idx == 1:
                raise RuntimeError("a bad batch")
            return super().training_step(batch, batch_idx)

    logger, monitor, module = TensorBoardLogger(tmp_path), GradientMonitor(), Fails()
    trainer = kit.trainer(monitor, logger=logger)
    with pytest.raises(RuntimeError, match="a bad batch"):
        trainer.fit(module, kit.loader(3))
    module.fails = False
    trainer.fit(module, kit.loader(3))
    kit.trainer(GradientMonitor(), logger=logger).fit(module, kit.loader(3))

    assert monitor.history.steps().index.tolist() == [2, 3, 4]
    assert written(logger, "gradwatch/grad_norm") == [0, 0, 1, 1, 2, 2, 3]


def test_an_end_that_failed_in_another_callback(kit):
    """Its error keeps Lightning from telling the monitor; the next fit is watched all the same."""

    class Fails(Callback):
        fails = True

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if self.fails:
                raise RuntimeError("a bad callback")

        def on_exception(self, trainer, pl_module, exception):
            raise OSError("no space left")

    fails, monitor, module = Fails(), GradientMonitor(clip=1.0), kit.Net()
    trainer = kit.trainer(fails, monitor)
    with pytest.raises(OSError, match="no space left"):
        trainer.fit(module, kit.loader(2))
    fails.fails = False
    kit.trainer(monitor).fit(module, kit.loader(2))

    assert monitor.history.steps().index.tolist() == [1, 2]
    assert kit.hooks_on(module, []) == 0


class Finetune(BaseFinetuning):
    """Freezes everything, and unfreezes it at the start of an epoch."""

    def __init__(self, at):
        super().__init__()
        self.at = at

    def freeze_before_training(self, pl_module):
        self.freeze(pl_module)

    def finetune_function(self, pl_module, epoch, optimizer):
        if epoch == self.at:
            self.make_trainable(pl_module)


@pytest.mark.filterwarnings("ignore:.*returned `None`")
@pytest.mark.parametrize("options", [{}, {"clip": 0.01}, {"accumulate": {0: 2}}])
@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("monitor_first", [False, True])
def test_everything_is_frozen_at_the_start(kit, options, at, monitor_first):
    """It is watched, and clipped, from the first step with a gradient on."""

    class Patient(kit.Net):
        def training_step(self, batch, batch_idx):
            loss = self.loss(batch)
            return loss if loss.requires_grad else None

    monitor, module = GradientMonitor(**options), Patient()
    callbacks = [monitor, Finetune(at)] if monitor_first else [Finetune(at), monitor]
    trainer = kit.trainer(*callbacks, max_epochs=2)
    trainer.fit(module, kit.loader(4))

    steps = monitor.history.steps()
    per_step = 2 if "accumulate" in options else 1
    assert steps.micro_batches.tolist() == [per_step] * (4 * (2 - at) // per_step)
    assert (steps.grad_norm > 0).all()
    assert steps.clipped.all() == ("clip" in options)


def test_backbone_finetuning(kit):
    """The backbone is in the norms from the epoch on at which it is unfrozen."""

    class Backbone(kit.Net):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Linear(4, 4)

        def loss(self, batch):
            return super().loss((self.backbone(batch[0]), batch[1]))

        def configure_optimizers(self):
            return torch.optim.SGD(self.body.parameters(), lr=0.05)

    monitor, reference = GradientMonitor(), kit.Reference()
    finetune = BackboneFinetuning(unfreeze_backbone_at_epoch=1)
    kit.trainer(finetune, monitor, reference, max_epochs=2).fit(Backbone(), kit.loader(3))

    assert monitor.history.steps().grad_norm.tolist() == pytest.approx(reference.before, rel=1e-6)


class Late:
    """Ways in which a module gets its parameters after it was made."""

    def configure_model(self, kit):
        class Module(kit.Net):
            def configure_model(self):
                if not hasattr(self, "head"):
                    self.head = nn.Linear(1, 1)

            def loss(self, batch):
                return (self.head(self.body(batch[0])) - batch[1]).square().mean()

        return Module()

    def setup(self, kit):
        class Module(kit.Net):
            def setup(self, stage):
                self.head = nn.Linear(1, 1)

            def loss(self, batch):
                return (self.head(self.body(batch[0])) - batch[1]).square().mean()

        return Module()

    def lazy(self, kit):
        class Module(kit.Net):
            def __init__(self):
                super().__init__()
                self.head = nn.LazyLinear(1)

            def loss(self, batch):
                return (self.head(self.body(batch[0])) - batch[1]).square().mean()

        return Module()


@pytest.mark.filterwarnings("ignore:Lazy modules", "ignore:The total number of parameters")
@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("when", ["configure_model", "setup", "lazy"])
def test_parameters_that_come_late(kit, when, batches):
    """All of them are in the norms of every step, the first one too."""
    monitor, reference, module = GradientMonitor(), kit.Reference(), getattr(Late(), when)(kit)

    trainer = kit.trainer(monitor, reference, accumulate_grad_batches=batches)
    trainer.fit(module, kit.loader(4))

    steps = monitor.history.steps()
    assert steps.micro_batches.tolist() == [batches] * (4 // batches)
    assert steps.grad_norm.tolist() == pytest.approx(reference.before, rel=1e-6)
    assert "head.weight" in set(monitor.history.parameters()["parameter"])


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_lazy_parameters_cannot_be_clipped_in_the_first_step(kit):
    """A monitor that acts says so before the training."""
    with pytest.raises(ValueError, match="a lazy parameter that has no shape yet"):
        kit.trainer(GradientMonitor(clip=1.0)).fit(Late().lazy(kit), kit.loader(1))


@pytest.mark.filterwarnings("ignore:.*will run with no optimizer", "ignore:.*returned `None`")
@pytest.mark.parametrize("options", [{}, {"clip": 1.0}])
def test_nothing_to_watch(kit, options):
    """A module without parameters, or one that stays frozen, is fitted without a word."""

    class Frozen(kit.Net):
        def training_step(self, batch, batch_idx):
            return None

        def configure_optimizers(self):
            return None

    class Empty(Frozen):
        def __init__(self):
            super().__init__()
            del self.body

    frozen = Frozen()
    frozen.requires_grad_(False)
    for module in (frozen, Empty()):
        monitor = GradientMonitor(**options)
        trainer = kit.trainer(monitor)
        trainer.fit(module, kit.loader(3))

        assert trainer.fit_loop.epoch_loop.batch_progress.total.completed == 3
        assert monitor.watcher is None
        with pytest.raises(RuntimeError, match="there was nothing to watch"):
            _ = monitor.history


def test_an_optimizer_with_a_tensor_of_its_own(kit):
    """A parameter that is not one of the module's is neither watched nor clipped."""

    class Hidden(kit.Net):
        def __init__(self):
            super().__init__()
            self.hidden = [nn.Parameter(torch.ones(()))]

        def loss(self, batch):
            return super().loss(batch) * self.hidden[0]

        def configure_optimizers(self):
            return torch.optim.SGD([*self.parameters(), *self.hidden], lr=0.05)

    monitor, module = GradientMonitor(clip=0.01), Hidden()
    kit.trainer(monitor).fit(module, kit.loader(3))

    steps = monitor.history.steps()
    assert steps.optimizer.tolist() == ["SGD"] * 3
    assert steps.grad_norm_clipped.tolist() == pytest.approx([0.01] * 3, rel=1e-4)


def test_an_optimizer_that_is_named_twice(kit):
    """It is one optimizer."""

    class Twice(kit.Net):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                optimizer.step()

        def configure_optimizers(self):
            one = torch.optim.SGD(self.parameters(), lr=0.05)
            return [one, one]

    monitor = GradientMonitor()
    kit.trainer(monitor).fit(Twice(), kit.loader(2))

    assert monitor.history.steps().optimizer.tolist() == ["SGD"] * 4


class Plain:
    """An optimizer that is not torch's, of which Lightning asks no more than this."""

    def __init__(self, parameters):
        self.param_groups = [{"params": list(parameters), "lr": 0.05}]
        self.defaults, self.state = {}, {}

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass

    def zero_grad(self, set_to_none=True):
        for parameter in self.param_groups[0]["params"]:
            parameter.grad = None

    def step(self, closure):
        loss = closure()
        with torch.no_grad():
            for parameter in self.param_groups[0]["params"]:
                parameter.sub_(parameter.grad, alpha=0.05)
        return loss


def test_an_optimizer_that_is_not_torchs(kit):
    """Its backwards are recorded; it cannot be made to clip, which is said before the training."""
    monitor, reference = GradientMonitor(), kit.Reference()
    kit.trainer(monitor, reference).fit(kit.Net(Plain), kit.loader(3))

    assert monitor.history.steps().grad_norm.tolist() == pytest.approx(reference.before, rel=1e-6)
    with pytest.raises(TypeError, match=r"must be a torch\.optim\.Optimizer"):
        kit.trainer(GradientMonitor(clip=1.0)).fit(kit.Net(Plain), kit.loader(1))
