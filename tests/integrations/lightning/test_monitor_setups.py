"""GradientMonitor beside what else a Trainer may be set up with: every fit is what it is without."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
    StochasticWeightAveraging,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.tuner import Tuner
from torch.utils.data import DataLoader

from gradwatch_lightning import GradientMonitor
from tests.integrations.lightning.conftest import Net

pytestmark = pytest.mark.filterwarnings(
    r"ignore:Checkpoint directory .* exists and is not empty",
    r"ignore:You are trying to `self.log\(\)` but `Trainer\(barebones=True\)`",  # the module
)

SETUPS = {
    "no logger": {},
    "the default logger": {"logger": True},
    "several loggers": {"logger": lambda path: [TensorBoardLogger(path), CSVLogger(path)]},
    "fast_dev_run": {"fast_dev_run": True},
    "barebones": {"barebones": True, "log_every_n_steps": None, "logger": None},
    "validation in between": {
        "accumulate_grad_batches": 2,
        "max_epochs": 3,
        "val_check_interval": 2,
        "logger": CSVLogger,
    },
    "validation seldom": {"check_val_every_n_epoch": 2, "max_epochs": 2},
    "SWA": {
        "max_epochs": 4,
        "callbacks": lambda: [StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)],
    },
    "early stopping": {"callbacks": lambda: [EarlyStopping("train_loss")], "max_epochs": 3},
    "a number of batches that changes": {
        "callbacks": lambda: [GradientAccumulationScheduler({0: 1, 1: 2})],
        "max_epochs": 2,
    },
    "tqdm": {"callbacks": lambda: [TQDMProgressBar()], "enable_progress_bar": True},
    "rich": {"callbacks": lambda: [RichProgressBar()], "enable_progress_bar": True},
    "anomaly detection": {"detect_anomaly": True},
    "a profiler": {"profiler": "simple"},
    "overfitting": {"overfit_batches": 2},
    "a clip by value": {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"},
    "bf16": {"precision": "bf16-mixed"},
    "max_steps": {"max_steps": 3, "max_epochs": -1},
    "without inference mode": {"inference_mode": False},
}


def weights(module):
    """Returns all weights as one tensor."""
    return torch.cat([p.detach().reshape(-1) for p in module.parameters()])


@pytest.mark.parametrize("name", SETUPS)
def test_the_fit_is_what_it_is_without(kit, tmp_path, monkeypatch, name):
    """Weights are bit for bit the same, and every step of the Trainer is recorded."""
    monkeypatch.chdir(tmp_path)
    options = dict(SETUPS[name])
    callbacks, logger = options.pop("callbacks", list), options.pop("logger", False)
    found = []
    for monitors in ([], [GradientMonitor(log_blocks=True)]):
        made = logger(tmp_path / str(len(found))) if callable(logger) else logger
        module = kit.Net()
        torch.manual_seed(0)
        one = kit.trainer(*monitors, *callbacks(), logger=made, **options)
        one.fit(module, kit.loader(6), kit.loader(2))
        found.append(weights(module))

    assert torch.equal(*found)
    assert len(monitors[0].history) == one.global_step > 0


class Tunable(Net):
    """Has what the tuner looks for."""

    def __init__(self, data):
        super().__init__()
        self.lr, self.batch_size, self.data = 0.05, 2, data

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def train_dataloader(self):
        return DataLoader(self.data.dataset, batch_size=self.batch_size)

    def val_dataloader(self):
        return self.data


@pytest.mark.parametrize(
    "tune",
    [
        lambda tuner, module: tuner.lr_find(module, num_training=10),
        lambda tuner, module: tuner.scale_batch_size(module, max_trials=2, steps_per_trial=1),
    ],
    ids=["lr_find", "scale_batch_size"],
)
def test_the_tuner_finds_what_it_finds_without(kit, tmp_path, monkeypatch, tune):
    """The rate and the batch size are the same, and the fit that follows is recorded alone."""
    monkeypatch.chdir(tmp_path)
    found = []
    for monitors in ([], [GradientMonitor()]):
        module = Tunable(kit.loader(8))
        torch.manual_seed(0)
        one = kit.trainer(*monitors, enable_checkpointing=True)
        tune(Tuner(one), module)
        one.fit(module)
        found.append((module.lr, module.batch_size, weights(module)))

    assert found[0][:2] == found[1][:2]
    assert torch.equal(found[0][2], found[1][2])
    assert len(monitors[0].history) == one.global_step


def test_a_checkpoint_by_the_norm(kit, tmp_path):
    """ModelCheckpoint(monitor=) and LearningRateMonitor work beside it: the tag is a metric."""
    monitor, logger = GradientMonitor(), CSVLogger(tmp_path)
    best = ModelCheckpoint(
        dirpath=tmp_path / "best", monitor="gradwatch/grad_norm", every_n_train_steps=1
    )
    one = kit.trainer(
        monitor, LearningRateMonitor(), best, logger=logger, enable_checkpointing=True
    )
    one.fit(kit.Net(), kit.loader(6))

    lowest = monitor.history.steps().grad_norm.min()
    assert float(best.best_model_score) == pytest.approx(lowest, rel=1e-6)
