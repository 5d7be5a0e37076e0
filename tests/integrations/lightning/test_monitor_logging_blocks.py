"""GradientMonitor(log_blocks=True): norms and statistics of the parts of a model, in every logger."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gradwatch_lightning import GradientMonitor


class Blocks(Callback):
    """The norms of the two linear layers of the module before the clip, in float64."""

    def __init__(self):
        self.norms = {"body.0": [], "body.2": []}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        for name, norms in self.norms.items():
            gradients = [p.grad.double() for p in pl_module.get_submodule(name).parameters()]
            norms.append(math.sqrt(sum(float(one.square().sum()) for one in gradients)))


def values(logger, tag):
    """Lists the values of a tag."""
    return [value for _, value in logger.of(tag)]


def test_the_norms_of_blocks_are_those_before_the_clip(kit):
    """They equal norms in float64, and stand in the row of the total norm and of the loss."""
    monitor, blocks = GradientMonitor(log_blocks=True), Blocks()
    logger = kit.CapturingLogger()

    kit.trainer(monitor, blocks, logger=logger, gradient_clip_val=0.1).fit(kit.Net(), kit.loader(5))

    for name, norms in blocks.norms.items():
        assert values(logger, f"gradwatch_blocks/{name}") == pytest.approx(norms, rel=1e-6)
    rows = [row for _, row in logger.rows]
    tags = {"gradwatch/grad_norm", "gradwatch_blocks/body.0", "gradwatch_blocks/body.2"}
    assert len(rows) == 5
    assert all({*tags, "train_loss"} <= row.keys() for row in rows)
    assert [step for step, _ in logger.of("gradwatch_blocks/body.0")] == [0, 1, 2, 3, 4]


def test_without_it_other_loggers_get_no_blocks(kit):
    """The default is a handful of scalars, whatever statistics are measured."""
    logger = kit.CapturingLogger()

    kit.trainer(GradientMonitor(statistics=("norm", "max")), logger=logger).fit(
        kit.Net(), kit.loader(2)
    )

    assert not [tag for _, row in logger.rows for tag in row if tag.startswith("gradwatch_")]


def test_log_every_n_steps_is_kept(kit):
    """Blocks are logged where Lightning logs, with the values of the newest step."""
    monitor, blocks = GradientMonitor(log_blocks=True), Blocks()
    logger = kit.CapturingLogger()

    kit.trainer(monitor, blocks, logger=logger, log_every_n_steps=3).fit(kit.Net(), kit.loader(7))

    logged = logger.of("gradwatch_blocks/body.0")
    assert [step for step, _ in logged] == [2, 5]
    assert [value for _, value in logged] == pytest.approx(
        [blocks.norms["body.0"][2], blocks.norms["body.0"][5]], rel=1e-6
    )


def test_the_newest_sample_of_a_statistic_is_logged(kit):
    """Statistics of every second step are there at every third, as they were sampled last."""
    monitor = GradientMonitor(log_blocks=True, statistics=("norm", "max"), every=2)
    logger = kit.CapturingLogger()

    kit.trainer(monitor, logger=logger, log_every_n_steps=3).fit(kit.Net(), kit.loader(6))

    parameters = monitor.history.parameters()
    sampled = parameters.dropna(subset="max")
    steps = sorted(set(sampled.step))
    logged = logger.of("gradwatch_max/body.0")
    assert [step for step, _ in logged] == [2, 5]
    for step, value in logged:
        newest = max(one for one in steps if one <= step + 1)
        of_block = sampled[(sampled.step == newest) & sampled.parameter.str.startswith("body.0.")]
        assert value == pytest.approx(of_block["max"].max(), rel=1e-6)


def test_each_optimizer_has_its_own_blocks(kit):
    """The blocks of the second optimizer of a GAN are in a group of its own."""
    logger = kit.CapturingLogger()

    kit.trainer(GradientMonitor(log_blocks=True), logger=logger).fit(kit.Gan(), kit.loader(3))

    assert len(values(logger, "gradwatch_blocks/generator")) == 3
    assert len(values(logger, "gradwatch-Adam-1_blocks/discriminator")) == 3


def test_under_accumulation(kit):
    """With accumulate_grad_batches there is one value per optimizer step."""
    monitor, blocks = GradientMonitor(log_blocks=True), Blocks()
    logger = kit.CapturingLogger()

    kit.trainer(monitor, blocks, logger=logger, accumulate_grad_batches=2).fit(
        kit.Net(), kit.loader(5)
    )

    logged = logger.of("gradwatch_blocks/body.2")
    assert [step for step, _ in logged] == [0, 1, 2]
    assert [value for _, value in logged] == pytest.approx(blocks.norms["body.2"], rel=1e-6)


def test_csv(kit, tmp_path):
    """The CSV file has one row per step, with a column for each block; it takes new columns."""

    class Late(kit.Net):
        """Has a further column from the third batch on."""

        def training_step(self, batch, batch_idx):
            if batch_idx > 1:
                self.log("late", 1.0)
            return super().training_step(batch, batch_idx)

    monitor, logger = GradientMonitor(log_blocks=True), CSVLogger(tmp_path)

    kit.trainer(monitor, logger=logger).fit(Late(), kit.loader(4))

    with Path(logger.log_dir, "metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["0", "1", "2", "3"]
    assert all(row["gradwatch_blocks/body.0"] and row["train_loss"] for row in rows)


def test_tensorboard_gets_each_value_once(kit, tmp_path):
    """A TensorBoardLogger has one point per step and block: not also those of its own sink."""
    monitor = GradientMonitor(log_blocks=True, statistics=("norm", "max"))
    kept, logger = kit.CapturingLogger(), TensorBoardLogger(tmp_path)

    kit.trainer(monitor, logger=[logger, kept]).fit(kit.Net(), kit.loader(25))

    board = EventAccumulator(logger.log_dir, size_guidance={"scalars": 0, "tensors": 0}).Reload()
    for tag in ("gradwatch_blocks/body.0", "gradwatch_max/body.2", "gradwatch/grad_norm"):
        points = board.Scalars(tag)
        assert [point.step for point in points] == list(range(25))
        assert [point.value for point in points] == pytest.approx(values(kept, tag))
    assert "custom_scalars__config__" in board.Tags()["tensors"]


def test_the_training_is_the_same(kit):
    """Weights are bit for bit those of a fit without a monitor."""
    weights = []
    for monitors in ([], [GradientMonitor(log_blocks=True, statistics=("norm", "max", "std"))]):
        module = kit.Net()
        kit.trainer(*monitors, logger=kit.CapturingLogger()).fit(module, kit.loader(6))
        weights.append(torch.cat([p.detach().reshape(-1) for p in module.parameters()]))
    assert torch.equal(*weights)
