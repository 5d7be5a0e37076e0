"""Small modules, data and a Trainer without noise, shared by the tests of the Lightning adapter."""

from __future__ import annotations

import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import Logger
from torch.nn import functional
from torch.optim.optimizer import _global_optimizer_pre_hooks
from torch.utils.data import DataLoader, TensorDataset

from tests.support import zoo
from tests.support.float64 import gradient_norms, total

# What Lightning itself warns about in a short fit on a CPU. Everything else is an error.
LIGHTNING_WARNINGS = (
    r"ignore:.*does not have many workers",
    r"ignore:You defined a `validation_step` but have no `val_dataloader`",
    r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated",
)


def pytest_collection_modifyitems(items):
    """Lets those warnings pass in the tests of this folder."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent):
            for warning in LIGHTNING_WARNINGS:
                item.add_marker(pytest.mark.filterwarnings(warning))


class Net(LightningModule):
    """A regression by a small MLP, trained by automatic optimization."""

    def __init__(self, make_optimizer=None):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            self.body = zoo.small(seed=1)
        self.make_optimizer = make_optimizer or (lambda p: torch.optim.SGD(p, lr=0.05))

    def loss(self, batch):
        x, y = batch
        return functional.mse_loss(self.body(x), y)

    def training_step(self, batch, batch_idx):
        loss = self.loss(batch)
        if not self.trainer.barebones:
            self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch, batch_idx):
        return self.body(batch[0])

    def configure_optimizers(self):
        return self.make_optimizer(self.parameters())


class Gan(LightningModule):
    """Two networks against each other, each with an optimizer, by manual optimization."""

    def __init__(self, same_class=True, discriminator_every=1):
        super().__init__()
        self.automatic_optimization = False
        self.same_class = same_class
        self.discriminator_every = discriminator_every
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            self.generator = torch.nn.Linear(4, 3)
            self.discriminator = torch.nn.Linear(3, 1)

    def training_step(self, batch, batch_idx):
        x, _ = batch
        of_generator, of_discriminator = self.optimizers()

        self.toggle_optimizer(of_generator)
        loss = functional.softplus(-self.discriminator(self.generator(x))).mean()
        self.log("generator_loss", loss)
        of_generator.zero_grad()
        self.manual_backward(loss)
        of_generator.step()
        self.untoggle_optimizer(of_generator)

        if batch_idx % self.discriminator_every == 0:
            self.toggle_optimizer(of_discriminator)
            fake = self.discriminator(self.generator(x).detach())
            real = self.discriminator(x[:, :3])
            loss = functional.softplus(fake).mean() + functional.softplus(-real).mean()
            of_discriminator.zero_grad()
            self.manual_backward(loss)
            of_discriminator.step()
            self.untoggle_optimizer(of_discriminator)

    def configure_optimizers(self):
        other = torch.optim.Adam if self.same_class else torch.optim.SGD
        return [
            torch.optim.Adam(self.generator.parameters(), lr=0.01),
            other(self.discriminator.parameters(), lr=0.02),
        ]


class Reference(Callback):
    """What Lightning itself sees of the gradients: norms taken apart, in float64."""

    def __init__(self):
        self.before = []
        self.after = []
        self.largest = 0.0

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.before.append(norm_of(optimizer))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.after.append(norm_of(trainer.optimizers[0]))
        self.largest = max(
            float(p.grad.abs().max()) for p in pl_module.parameters() if p.grad is not None
        )


class CapturingLogger(Logger):
    """A logger of the user's own: keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.rows = []

    @property
    def name(self):
        return "capturing"

    @property
    def version(self):
        return 0

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, dict(metrics)))

    def of(self, tag):
        """Lists ``(step, value)`` of one tag."""
        return [(step, row[tag]) for step, row in self.rows if tag in row]


def norm_of(optimizer):
    """Takes the L2 norm over the gradients of an optimizer in float64."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return total(gradient_norms(dict(enumerate(parameters))))


def loader(batches=6, poison=None, scale=1.0):
    """Makes batches of four samples, one of them full of NaN where ``poison`` says so."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(batches * 4, 4, generator=generator) * scale
    y = torch.randn(batches * 4, 1, generator=generator)
    if poison is not None:
        x[poison * 4 : poison * 4 + 4] = torch.nan
    return DataLoader(TensorDataset(x, y), batch_size=4)


def trainer(*callbacks, **options):
    """Makes a Trainer that trains on the CPU, writes nothing and prints nothing."""
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "log_every_n_steps": 1,
    }
    return Trainer(callbacks=list(callbacks), **{**defaults, **options})


def hooks_on(module, optimizers):
    """Counts every hook on parameters, modules and optimizers."""
    on_parameters = sum(
        len(p._post_accumulate_grad_hooks or {}) + len(p._backward_hooks or {})
        for p in module.parameters()
    )
    on_modules = sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
        for m in module.modules()
    )
    on_optimizers = sum(
        len(o._optimizer_step_pre_hooks) + len(o._optimizer_step_post_hooks) for o in optimizers
    )
    return on_parameters + on_modules + on_optimizers + len(_global_optimizer_pre_hooks)


@pytest.fixture
def kit():
    """Gives the modules, the data and the Trainer of this file."""
    return SimpleNamespace(
        Net=Net,
        Gan=Gan,
        Reference=Reference,
        CapturingLogger=CapturingLogger,
        loader=loader,
        trainer=trainer,
        hooks_on=hooks_on,
        norm_of=norm_of,
    )


@pytest.fixture(autouse=True)
def _signals_as_before():
    """Gives Ctrl+C back: Lightning switches it off when it shuts down."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)
