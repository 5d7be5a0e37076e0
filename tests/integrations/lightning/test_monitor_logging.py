"""GradientMonitor: what the Trainer's loggers get, and at which steps."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gradwatch_lightning import GradientMonitor

TAGS = {
    "gradwatch/grad_norm",
    "gradwatch/grad_norm_clipped",
    "gradwatch/clip_coef",
    "gradwatch/nonfinite_parameters",
}


def read_board(logger):
    """Loads every series of a TensorBoard run."""
    board = EventAccumulator(logger.log_dir, size_guidance={"scalars": 0, "tensors": 0})
    board.Reload()
    return board


class Look(Callback):
    """What the progress bar would show after each batch."""

    def __init__(self):
        self.shown = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.shown.append(dict(trainer.progress_bar_metrics))


def test_a_custom_logger_gets_a_handful_of_scalars(kit):
    """Each step gives its norms and its clip coefficient, at the steps of Lightning's own loss."""
    monitor, logger = GradientMonitor(clip=0.3), kit.CapturingLogger()

    kit.trainer(monitor, logger=logger).fit(kit.Net(), kit.loader(5))

    assert {tag for _, row in logger.rows for tag in row if tag.startswith("gradwatch")} == TAGS
    steps = monitor.history.steps()
    for tag in TAGS - {"gradwatch/nonfinite_parameters"}:
        column = steps[tag.removeprefix("gradwatch/")]
        assert [value for _, value in logger.of(tag)] == pytest.approx(column.tolist(), rel=1e-6)
    own = [step for step, _ in logger.of("train_loss")]
    assert [step for step, _ in logger.of("gradwatch/grad_norm")] == own == [0, 1, 2, 3, 4]


def test_the_progress_bar_shows_the_norm(kit):
    """It has the norm alone, by a short name, at every batch, whatever log_every_n_steps is."""
    monitor, look = GradientMonitor(clip=0.3), Look()

    trainer = kit.trainer(monitor, look, logger=kit.CapturingLogger(), log_every_n_steps=3)
    trainer.fit(kit.Net(), kit.loader(4))

    norms = monitor.history.steps().grad_norm.tolist()
    assert [list(shown) for shown in look.shown] == [["grad_norm"]] * 4
    assert [shown["grad_norm"] for shown in look.shown] == pytest.approx(norms, rel=1e-6)


@pytest.mark.parametrize("log", [True, False])
def test_the_progress_bar_can_do_without(kit, log):
    """prog_bar=False leaves the bar alone; what goes to the loggers does not depend on it."""
    look, logger = Look(), kit.CapturingLogger()

    monitor = GradientMonitor(prog_bar=False, log=log)
    kit.trainer(monitor, look, logger=logger).fit(kit.Net(), kit.loader(3))

    assert look.shown == [{}] * 3
    assert len(logger.of("gradwatch/grad_norm")) == 3 * log


def test_a_norm_of_the_users_own_in_the_bar_counts(kit):
    """Where the module shows a number of the same name, the bar has that one."""

    class Shows(kit.Net):
        def training_step(self, batch, batch_idx):
            self.log("grad_norm", 7.0, prog_bar=True)
            return self.loss(batch)

    look, logger = Look(), kit.CapturingLogger()
    trainer = kit.trainer(GradientMonitor(), look, logger=logger)
    trainer.fit(Shows(), kit.loader(3))

    assert look.shown == [{"grad_norm": 7.0}] * 3
    assert [value for _, value in logger.of("grad_norm")] == [7.0] * 3
    assert len(logger.of("gradwatch/grad_norm")) == 3


def test_accumulation_logs_when_the_optimizer_stepped(kit):
    """With accumulate_grad_batches there is one value per optimizer step, at Lightning's steps."""
    monitor, logger = GradientMonitor(), kit.CapturingLogger()

    kit.trainer(monitor, logger=logger, accumulate_grad_batches=2).fit(kit.Net(), kit.loader(5))

    logged = logger.of("gradwatch/grad_norm")
    assert [step for step, _ in logged] == [0, 1, 2]
    assert [value for _, value in logged] == pytest.approx(
        monitor.history.steps().grad_norm.tolist(), rel=1e-6
    )


def test_log_every_n_steps_is_kept(kit):
    """Trainer(log_every_n_steps=) thins our scalars as it thins Lightning's own."""
    monitor, logger = GradientMonitor(), kit.CapturingLogger()

    kit.trainer(monitor, logger=logger, log_every_n_steps=3).fit(kit.Net(), kit.loader(7))

    steps = [step for step, _ in logger.of("gradwatch/grad_norm")]
    assert steps == [step for step, _ in logger.of("train_loss")] == [2, 5]
    assert len(monitor.history) == 7


def test_each_optimizer_has_its_own_tags(kit):
    """The second optimizer of a GAN is logged under a group of its own, at the same steps."""
    monitor, logger = GradientMonitor(), kit.CapturingLogger()

    kit.trainer(monitor, logger=logger).fit(kit.Gan(), kit.loader(3))

    steps = monitor.history.steps()
    for label, tag in [("Adam", "gradwatch"), ("Adam-1", "gradwatch-Adam-1")]:
        logged = logger.of(f"{tag}/grad_norm")
        assert [step for step, _ in logged] == [0, 1, 2]
        expected = steps[steps.optimizer == label].grad_norm.tolist()
        assert [value for _, value in logged] == pytest.approx(expected, rel=1e-6)


def test_an_optimizer_that_rests_is_not_logged(kit):
    """A discriminator stepped every second batch has a value for those batches only."""
    monitor, logger = GradientMonitor(), kit.CapturingLogger()

    kit.trainer(monitor, logger=logger).fit(kit.Gan(discriminator_every=2), kit.loader(5))

    assert [step for step, _ in logger.of("gradwatch/grad_norm")] == [0, 1, 2, 3, 4]
    assert [step for step, _ in logger.of("gradwatch-Adam-1/grad_norm")] == [0, 2, 4]


def test_an_optimizer_that_rests_at_the_logged_batches_is_logged(kit):
    """Where no step falls on a logged batch, the newest one before it is logged there."""
    monitor, logger = GradientMonitor(), kit.CapturingLogger()
    module = kit.Gan(discriminator_every=2)

    kit.trainer(monitor, logger=logger, log_every_n_steps=2).fit(module, kit.loader(6))

    steps = monitor.history.steps()
    expected = steps[steps.optimizer == "Adam-1"].grad_norm.tolist()
    logged = logger.of("gradwatch-Adam-1/grad_norm")
    assert [step for step, _ in logged] == [1, 3, 5]
    assert [value for _, value in logged] == pytest.approx(expected, rel=1e-6)


def test_a_poisoned_step_is_logged_as_nan(kit):
    """The norm of a step with a NaN is logged as NaN, with the number of bad parameters."""
    monitor, logger = GradientMonitor(on_nonfinite="skip"), kit.CapturingLogger()

    kit.trainer(monitor, logger=logger).fit(kit.Net(), kit.loader(4, poison=1))

    norms = dict(logger.of("gradwatch/grad_norm"))
    assert norms[1] != norms[1]
    assert all(norms[step] == norms[step] for step in (0, 2, 3))
    assert dict(logger.of("gradwatch/nonfinite_parameters"))[1] == 4


def test_log_false_gives_the_loggers_nothing(kit, tmp_path):
    """log=False leaves the loggers alone, TensorBoard's too; the history is there all the same."""
    monitor, logger = GradientMonitor(log=False), TensorBoardLogger(tmp_path)

    kit.trainer(monitor, logger=logger).fit(kit.Net(), kit.loader(3))

    board = read_board(logger)
    tags = board.Tags()
    assert not [tag for tag in tags["scalars"] + tags["tensors"] if "gradwatch" in tag]
    assert len(monitor.history) == 3


def test_csv(kit, tmp_path):
    """The CSV file has a row per step with the loss and the norm side by side."""
    monitor, logger = GradientMonitor(clip=0.3), CSVLogger(tmp_path)

    kit.trainer(monitor, logger=logger).fit(kit.Net(), kit.loader(4))

    with Path(logger.log_dir, "metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["0", "1", "2", "3"]
    assert all(row["train_loss"] for row in rows)
    norms = [float(row["gradwatch/grad_norm"]) for row in rows]
    assert norms == pytest.approx(monitor.history.steps().grad_norm.tolist(), rel=1e-6)


def test_tensorboard(kit, tmp_path):
    """Scalars, blocks and the non-finite series stand at the steps of Lightning's own loss."""
    monitor, logger = GradientMonitor(on_nonfinite="skip"), TensorBoardLogger(tmp_path)

    kit.trainer(monitor, logger=logger).fit(kit.Net(), kit.loader(6, poison=3))

    board = read_board(logger)
    loss = [event.step for event in board.Scalars("train_loss")]
    assert loss == [0, 1, 2, 3, 4, 5]
    assert [event.step for event in board.Scalars("gradwatch/grad_norm")] == loss
    assert [event.step for event in board.Scalars("gradwatch/nonfinite_event")] == [3]
    blocks = [tag for tag in board.Tags()["scalars"] if tag.startswith("gradwatch_blocks/")]
    assert len(blocks) == 2
    for tag in blocks:
        assert {event.step for event in board.Scalars(tag)} <= set(loss)
    text = board.Tensors("gradwatch/events/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert "step 3" in text
    assert "custom_scalars__config__" in board.Tags()["tensors"]
    assert len(list((tmp_path / "lightning_logs" / "version_0").glob("events*"))) == 1


def test_tensorboard_under_accumulation(kit, tmp_path):
    """The blocks' steps are Lightning's steps under accumulate_grad_batches too."""
    monitor, logger = GradientMonitor(exploding_norm=1e-9), TensorBoardLogger(tmp_path)

    kit.trainer(monitor, logger=logger, accumulate_grad_batches=2).fit(kit.Net(), kit.loader(5))

    board = read_board(logger)
    tag = next(tag for tag in board.Tags()["scalars"] if tag.startswith("gradwatch_blocks/"))
    assert [event.step for event in board.Scalars(tag)] == [0, 1, 2]
    assert [event.step for event in board.Scalars("gradwatch/grad_norm")] == [0, 1, 2]


def test_tensorboard_with_two_optimizers(kit, tmp_path):
    """Both optimizers of a GAN have strictly rising steps in series of their own."""
    monitor, logger = GradientMonitor(), TensorBoardLogger(tmp_path)

    kit.trainer(monitor, logger=logger).fit(kit.Gan(), kit.loader(4))

    board = read_board(logger)
    for tag in ("gradwatch/grad_norm", "gradwatch-Adam-1/grad_norm"):
        assert [event.step for event in board.Scalars(tag)] == [0, 1, 2, 3]


def test_tensorboard_after_an_exception_holds_what_came_before(kit, tmp_path):
    """The events of a fit that on_nonfinite="raise" stops are in the log, in the one file."""
    monitor, logger = GradientMonitor(on_nonfinite="raise"), TensorBoardLogger(tmp_path)

    with pytest.raises(RuntimeError, match="NaN in the gradient"):
        kit.trainer(monitor, logger=logger).fit(kit.Net(), kit.loader(4, poison=2))

    board = read_board(logger)
    assert "gradwatch/events/text_summary" in board.Tags()["tensors"]
    assert len(list((tmp_path / "lightning_logs" / "version_0").glob("events*"))) == 1


def test_several_loggers_at_once(kit, tmp_path):
    """Every logger of the Trainer gets the scalars; the TensorBoard one alone gets the blocks."""
    csv_logger, board_logger = CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "tb")
    kept = kit.CapturingLogger()

    loggers = [csv_logger, board_logger, kept]
    kit.trainer(GradientMonitor(), logger=loggers).fit(kit.Net(), kit.loader(3))

    assert len(kept.of("gradwatch/grad_norm")) == 3
    assert len(read_board(board_logger).Scalars("gradwatch/grad_norm")) == 3
    assert not [tag for _, row in kept.rows for tag in row if "blocks" in tag]


def test_without_a_logger(kit):
    """A Trainer without a logger is watched, and the scalars are in its callback_metrics."""
    monitor = GradientMonitor()
    trainer = kit.trainer(monitor)
    trainer.fit(kit.Net(), kit.loader(3))

    value = float(trainer.callback_metrics["gradwatch/grad_norm"])
    assert value == pytest.approx(monitor.history.steps().grad_norm.iloc[-1], rel=1e-6)


def test_a_module_with_a_log_dict_of_its_own(kit, caplog):
    """If it takes none of Lightning's arguments, nothing is logged, and the fit goes on."""

    class Own(kit.Net):
        def log_dict(self, metrics):
            raise AssertionError("never reached")

    monitor = GradientMonitor()
    kit.trainer(monitor, logger=kit.CapturingLogger()).fit(Own(), kit.loader(3))

    assert len(monitor.history) == 3
    assert caplog.text.count("logs nothing any more in this fit") == 1


def test_a_tensorboard_logger_that_cannot_write(kit, tmp_path, caplog, monkeypatch):
    """The monitor does without it, and the fit goes on."""

    def fail(*args, **kwargs):
        raise OSError("no space left")

    monkeypatch.setattr("gradwatch_tensorboard.TensorBoardWriter", fail)
    monitor = GradientMonitor()
    kit.trainer(monitor, logger=TensorBoardLogger(tmp_path)).fit(kit.Net(), kit.loader(2))

    assert len(monitor.history) == 2
    assert "writes nothing to a TensorBoardLogger" in caplog.text


@pytest.mark.filterwarnings("ignore:.*dataloader_iter")
def test_a_training_step_that_takes_the_iterator(kit):
    """It has no batch whose size Lightning could look for: the norms are logged all the same."""

    class Iterates(kit.Net):
        def training_step(self, dataloader_iter):
            batch, _, _ = next(dataloader_iter)
            return self.loss(batch)

    monitor, logger = GradientMonitor(), kit.CapturingLogger()
    kit.trainer(monitor, logger=logger).fit(Iterates(), kit.loader(3))

    assert len(logger.of("gradwatch/grad_norm")) == len(monitor.history) == 3
