"""FabricSink: what the loggers of a Fabric get of each step."""

from __future__ import annotations

import csv
import math
import sys
from pathlib import Path

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.loggers import CSVLogger, Logger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import gradwatch
from gradwatch_lightning import FabricSink
from tests.support import zoo

STEPS = 200
NORMS = ("grad_norm", "grad_norm_clipped", "clip_coef")


class Rows(Logger):
    """Keeps what it is given; fails at the steps of ``fails``."""

    def __init__(self, fails=()):
        self.rows, self.fails = [], set(fails)

    name, version = "rows", 0

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        if step in self.fails and any("gradwatch" in tag for tag in metrics):
            raise OSError("no space left")
        self.rows.append((step, dict(metrics)))

    def of(self, tag):
        return [(step, row[tag]) for step, row in self.rows if tag in row]


def train(loggers, steps=STEPS, first=0, watched=True, sink=None, step_of=None, **options):
    """Trains in a loop of Fabric that logs its loss at every step; returns watcher and weights."""
    sink = sink or {}
    fabric = Fabric(accelerator="cpu", devices=1, loggers=loggers)
    bare = zoo.small(seed=1)
    model, optimizer = fabric.setup(bare, torch.optim.SGD(bare.parameters(), lr=0.1))
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(steps, 16, 4, generator=generator)
    options = {"sinks": [FabricSink(fabric, **sink)] * watched, "clip": 0.1, **options}
    with gradwatch.watch(model, optimizer, **options) as watcher:
        for number, x in enumerate(inputs):
            if step_of is not None:
                watcher.global_step = lambda number=number: step_of(number)
            loss = model(x).square().mean()
            fabric.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            fabric.log("loss", loss, step=first + number)
    for logger in loggers:
        logger.finalize("success")
    return watcher, torch.cat([p.detach().reshape(-1) for p in bare.parameters()])


def expected(watcher, name):
    """Lists the steps and values of a column."""
    steps = watcher.history.steps()
    return list(zip(steps.index.tolist(), steps[name].tolist(), strict=True))


def board_of(logger):
    """Loads every series of a TensorBoard run."""
    size = {"scalars": 0, "tensors": 0}
    return EventAccumulator(logger.log_dir, size_guidance=size).Reload()


def test_every_row_of_both_sides_arrives(tmp_path):
    """CSV, TensorBoard and a logger of one's own have all 200 losses and all 200 steps."""
    table, board, rows = CSVLogger(tmp_path / "csv"), TensorBoardLogger(tmp_path / "tb"), Rows()

    watcher, _ = train([table, board, rows])

    assert [step for step, _ in rows.of("loss")] == list(range(STEPS))
    series = board_of(board)
    assert len(series.Scalars("loss")) == STEPS
    with Path(table.log_dir, "metrics.csv").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert sum(bool(line["loss"]) for line in lines) == STEPS
    for name in NORMS:
        tag, wanted = f"gradwatch/{name}", expected(watcher, name)
        assert rows.of(tag) == wanted
        points = [(event.step, event.value) for event in series.Scalars(tag)]
        assert [step for step, _ in points] == [step for step, _ in wanted]
        assert [one for _, one in points] == pytest.approx([one for _, one in wanted], rel=1e-6)
        ours = [(int(line["step"]), float(line[tag])) for line in lines if line[tag]]
        assert ours == wanted


def test_a_row_comes_with_its_step():
    """Each row of ours is there before the loop logs that step, not 64 steps later."""
    rows = Rows()
    train([rows], steps=5)
    assert ["loss" in row for _, row in rows.rows] == [False, True] * 5


def test_the_x_axis_can_be_that_of_the_loop():
    """watcher.global_step says under which step rows are logged."""
    rows = Rows()
    train([rows], steps=3, step_of=lambda number: 10 * number)
    assert [step for step, _ in rows.of("gradwatch/grad_norm")] == [0, 10, 20]


def test_blocks_and_statistics():
    """On request a row has norms of the parts of the model, and what was measured of them."""
    rows = Rows()
    watcher, _ = train(
        [rows],
        steps=4,
        sink={"blocks": True, "statistics": True},
        statistics=("norm", "max"),
        every=2,
    )

    norms = watcher.history.parameters().set_index(["step", "parameter"]).grad_norm
    for step, value in rows.of("gradwatch_blocks/0"):
        assert value == pytest.approx(math.hypot(norms[step, "0.weight"], norms[step, "0.bias"]))
    assert len(rows.of("gradwatch_blocks/2")) == 4
    sampled = watcher.history.parameters().dropna(subset="max").step.unique().tolist()
    assert [step for step, _ in rows.of("gradwatch_max/2")] == sampled


def test_without_a_request_there_are_no_blocks():
    """The default is a handful of scalars."""
    rows = Rows()
    train([rows], steps=2, statistics=("norm", "max"))
    assert not [tag for _, row in rows.rows for tag in row if tag.startswith("gradwatch_")]


@pytest.mark.parametrize("blocks", [False, True])
def test_tensorboard_gets_the_gradients_tab(tmp_path, blocks):
    """Its file has blocks once per step at most, and the data of the tab, in the logger's run."""
    logger = TensorBoardLogger(tmp_path)
    train([logger], steps=12, sink={"blocks": blocks})

    series = board_of(logger)
    steps = [event.step for event in series.Scalars("gradwatch_blocks/0")]
    assert steps == (list(range(1, 13)) if blocks else sorted(set(steps)))
    assert "custom_scalars__config__" in series.Tags()["tensors"]
    assert [event.step for event in series.Scalars("gradwatch/grad_norm")] == list(range(1, 13))


def test_a_logger_that_fails_costs_the_others_nothing(caplog):
    """It is told of once, tried again with what it has missed, and the weights stay the same."""
    broken, rows = Rows(fails={3}), Rows()
    broken.fails = _Once({3})
    watcher, weights = train([broken, rows], steps=12)
    _, without = train([Rows()], steps=12, watched=False)

    assert torch.equal(weights, without)
    assert rows.of("gradwatch/grad_norm") == expected(watcher, "grad_norm")
    assert broken.of("gradwatch/grad_norm") == expected(watcher, "grad_norm")
    assert len(broken.of("loss")) == 12
    assert caplog.text.count("the Rows of FabricSink") == 2  # that it fails, and that it works


def test_a_logger_that_never_works(caplog):
    """It costs its own records, which are counted at the end, and no step."""
    broken, rows = Rows(fails=range(100)), Rows()
    watcher, _ = train([broken, rows], steps=12)

    assert rows.of("gradwatch/grad_norm") == expected(watcher, "grad_norm")
    assert broken.of("gradwatch/grad_norm") == []
    assert "Lost: steps 12" in caplog.text


class _Once:
    """Holds each of its members once."""

    def __init__(self, members):
        self.members = set(members)

    def __contains__(self, one):
        found = one in self.members
        self.members.discard(one)
        return found


def test_several_watchers_have_tags_of_their_own():
    """The second watcher of a Fabric is called 2 if it has no name; a name comes first in its tags."""
    rows = Rows()
    fabric = Fabric(accelerator="cpu", devices=1, loggers=rows)
    watchers = []
    for name in ("", "", "third"):
        bare = zoo.small(seed=1)
        model, optimizer = fabric.setup(bare, torch.optim.SGD(bare.parameters(), lr=0.1))
        watchers.append(
            gradwatch.watch(model, optimizer, sinks=[FabricSink(fabric, name=name)]).attach()
        )
        fabric.backward(model(torch.ones(2, 4)).square().mean())
        optimizer.step()
    for watcher in watchers:
        watcher.close()

    tags = [tag for _, row in rows.rows for tag in row if tag.endswith("/grad_norm")]
    assert tags == ["gradwatch/grad_norm", "2/gradwatch/grad_norm", "third/gradwatch/grad_norm"]


def test_watchers_that_follow_each_other_have_the_same_tags():
    """A watcher that is closed takes no number."""
    rows = Rows()
    for _ in range(2):
        train([rows], steps=1)
    assert [step for step, _ in rows.of("gradwatch/grad_norm")] == [1, 1]


def test_a_fabric_without_loggers():
    """There is nothing to log to, and that is no error: fabric.log() is silent, too."""
    watcher, _ = train([], steps=3)
    assert len(watcher.history) == 3


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((None,), TypeError, r"must be a lightning\.fabric\.Fabric, got None"),
        ((Fabric,), TypeError, r"must be a lightning\.fabric\.Fabric"),
        (("fabric", {"blocks": 1}), TypeError, r"FabricSink\(blocks=\) must be True or False"),
        (("fabric", {"statistics": "max"}), TypeError, r"FabricSink\(statistics=\) must be True"),
        (("fabric", {"name": 1}), TypeError, r"FabricSink\(name=\) must be a string"),
        (("fabric", {"name": "a/"}), ValueError, r"neither begins nor ends with a slash, got 'a/'"),
    ],
)
def test_mistakes_in_arguments(arguments, error, text):
    """The error has the argument, what it may be, and the value."""
    given, *options = arguments
    fabric = Fabric(accelerator="cpu", devices=1) if given == "fabric" else given
    with pytest.raises(error, match=text):
        FabricSink(fabric, **(options[0] if options else {}))


# -- W&B and MLflow --------------------------------------------------------------------------------


@pytest.fixture
def wandb(monkeypatch):
    """Gives wandb, offline and silent."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    module = pytest.importorskip("wandb", reason="NOT TESTED: wandb is not installed.")
    yield module
    module.teardown()


BOARDS = (
    "ignore:.*anonymous.*",
    "ignore::ResourceWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",
    "ignore:The ``noload`` loader strategy is deprecated",  # MLflow's own, of SQLAlchemy
)


def rows_of_wandb(folder):
    """Reads the run below a folder."""
    from tests.support import wandb_runs  # imports wandb

    return wandb_runs.rows(folder)


@pytest.mark.slow
@pytest.mark.filterwarnings(*BOARDS)
@pytest.mark.parametrize("first", [0, 1000])
def test_wandb_has_every_row_of_both_sides(wandb, tmp_path, first):
    """Read back from its own file it has 200 losses and 200 norms, whatever the loop counts."""
    from lightning.pytorch.loggers import WandbLogger

    logger = WandbLogger(save_dir=str(tmp_path), offline=True)
    watcher, _ = train([logger], first=first)
    wandb.finish()

    rows = rows_of_wandb(tmp_path)
    losses = [row["trainer/global_step"] for row in rows if "loss" in row]
    assert losses == list(range(first, first + STEPS))
    for name in NORMS:
        wanted = [value for _, value in expected(watcher, name)]
        values = [row[f"gradwatch/{name}"] for row in rows if f"gradwatch/{name}" in row]
        assert values == pytest.approx(wanted)


@pytest.mark.slow
@pytest.mark.filterwarnings(*BOARDS)
def test_wandb_without_its_sink(wandb, tmp_path, monkeypatch, caplog):
    """Where that cannot be had, rows go through the logger, and a warning says so."""
    from lightning.pytorch.loggers import WandbLogger

    monkeypatch.setitem(sys.modules, "gradwatch_loggers.wandb_sink", None)
    sys.modules.pop("gradwatch_loggers", None)
    train([WandbLogger(save_dir=str(tmp_path), offline=True)], steps=20)
    wandb.finish()

    rows = rows_of_wandb(tmp_path)
    assert sum("loss" in row for row in rows) == 20
    assert [row["trainer/global_step"] for row in rows if "gradwatch/grad_norm" in row] == list(
        range(1, 21)
    )
    assert "FabricSink logs to the WandbLogger as fabric.log_dict() does" in caplog.text


@pytest.mark.slow
@pytest.mark.filterwarnings(*BOARDS)
def test_mlflow_has_every_step(tmp_path, monkeypatch):
    """A run in sqlite has each loss and each step once, with the values of the history."""
    pytest.importorskip("mlflow", reason="NOT TESTED: MLflow is not installed.")
    from lightning.pytorch.loggers import MLFlowLogger

    monkeypatch.chdir(tmp_path)  # where MLflow keeps artifacts
    logger = MLFlowLogger(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    watcher, _ = train([logger], steps=20)

    def series(key):
        found = logger.experiment.get_metric_history(logger.run_id, key)
        return sorted((one.step, one.value) for one in found)

    assert [step for step, _ in series("loss")] == list(range(20))
    for name in NORMS:
        assert series(f"gradwatch/{name}") == [
            (step, pytest.approx(value)) for step, value in expected(watcher, name)
        ]
