"""GradientMonitorCallback: what the Trainer's own rows get, and the services that it reports to."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

pytest.importorskip("transformers", reason="NOT TESTED: the Trainer (transformers is missing)")

import torch
from transformers import Trainer

from gradwatch_huggingface import GradientMonitorCallback
from tests.integrations.huggingface.trainer_runs import WARNINGS, Texts, rows_of, trained
from tests.support import processes

pytestmark = [pytest.mark.filterwarnings(one) for one in WARNINGS]

OURS = ("grad_norm", "grad_norm_clipped", "clip_coef", "micro_batches", "nonfinite_parameters")

REPORTS = """
import os, sys, torch
from tests.integrations.huggingface.trainer_runs import small_model, trained
from gradwatch_huggingface import GradientMonitorCallback
monitor = GradientMonitorCallback()
trained("out", monitor, max_steps=200, report_to=sys.argv[1:], gradient_accumulation_steps=2)
monitor.history.steps().to_pickle("steps.pickle")
import wandb
wandb.finish()  # or the end of its file may never be written
"""


def ours_of(row):
    """Returns what a row has of gradwatch's."""
    return {tag: value for tag, value in row.items() if tag.startswith("gradwatch")}


def test_each_row_has_the_numbers_of_its_step_once(tmp_path):
    """With logging_steps=1 every row has those of the record; others have none."""
    monitor = GradientMonitorCallback()
    changes = {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    trainer = trained(tmp_path, monitor, max_steps=20, **changes)

    steps = monitor.history.steps()

    assert [row["step"] for row in rows_of(trainer)] == list(range(1, 21))
    for name in OURS:
        assert [row[f"gradwatch/{name}"] for row in rows_of(trainer)] == steps[name].tolist()
    rest = [row for row in trainer.state.log_history if "loss" not in row]
    assert len(rest) == 11
    assert not any(map(ours_of, rest))


@pytest.mark.parametrize(
    ("changes", "at"),
    [
        ({"logging_steps": 10}, [10, 20]),
        ({"logging_steps": 0.25, "logging_first_step": True}, [1, 6, 12, 18, 22]),
        ({"logging_strategy": "epoch", "max_steps": 45}, [20, 40, 45]),
        ({"logging_strategy": "no"}, []),
    ],
)
def test_a_row_of_several_steps_has_those_of_the_newest(tmp_path, changes, at):
    """As the Trainer's own grad_norm, whatever the steps at which it logs."""
    monitor = GradientMonitorCallback()
    trainer = trained(tmp_path, monitor, **{"max_steps": 22, **changes})

    steps = monitor.history.steps()
    rows = rows_of(trainer)

    assert set(at) >= {row["step"] for row in rows}
    assert len(rows) >= len(at) - 1
    for row in rows:
        assert row["gradwatch/grad_norm"] == row["grad_norm"] == steps["grad_norm"][row["step"]]
        assert row["gradwatch/clip_coef"] == steps["clip_coef"][row["step"]]


def test_rows_that_the_user_logs_stay_as_they_are(tmp_path):
    """Also such as have a loss in them, and they take nothing from the Trainer's."""

    class Talks(Trainer):
        def compute_loss(self, *args, **kwargs):
            self.log({"loss": 1.0, "mine": 1.0})
            return super().compute_loss(*args, **kwargs)

    trainer = trained(tmp_path, GradientMonitorCallback(), kind=Talks)

    mine = [row for row in trainer.state.log_history if "mine" in row]
    theirs = [row for row in rows_of(trainer) if "mine" not in row]
    assert len(mine) == len(theirs) == 6
    assert not any(map(ours_of, mine))
    assert all(map(ours_of, theirs))


def test_the_log_can_be_turned_off(tmp_path):
    """log=False leaves the Trainer's rows alone."""
    trainer = trained(tmp_path, GradientMonitorCallback(log=False))

    assert len(rows_of(trainer)) == 6
    assert not any(map(ours_of, trainer.state.log_history))


def test_blocks_and_statistics_go_the_same_road(tmp_path):
    """On request rows have norms of parts of the model, and the newest sample of statistics."""
    monitor = GradientMonitorCallback(
        log_blocks=True, log_statistics=True, statistics=("norm", "max"), every=4
    )
    trainer = trained(tmp_path, monitor, max_steps=12, logging_steps=3)

    rows = rows_of(trainer)
    blocks = [
        {tag: value for tag, value in row.items() if tag.startswith("gradwatch_blocks/")}
        for row in rows
    ]
    largest = [
        {tag: value for tag, value in row.items() if tag.startswith("gradwatch_max/")}
        for row in rows
    ]

    for row, norms in zip(rows, blocks, strict=True):
        total = math.sqrt(sum(value**2 for value in norms.values()))
        assert total == pytest.approx(row["gradwatch/grad_norm"], rel=1e-5)
    # Taken in the steps 1, 5 and 9, and logged in the rows of the steps 3, 6, 9 and 12.
    assert [bool(one) for one in largest] == [True, True, True, False]
    samples = monitor.history.parameters().dropna(subset=["max"])
    embedded = samples[samples["parameter"] == "model.embed_tokens.weight"]
    tag = "gradwatch_max/model.embed_tokens"
    assert [one[tag] for one in largest if one] == embedded["max"].tolist()


def test_nan_breaks_no_checkpoint(tmp_path):
    """A NaN of a step is in trainer_state.json, where the Trainer writes its own, and is read."""

    class Bad(Trainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss * math.nan if self.state.global_step == 3 else loss

    monitor = GradientMonitorCallback(on_nonfinite="skip")
    trained(tmp_path, monitor, kind=Bad, save_strategy="steps", save_steps=6)

    text = (tmp_path / "checkpoint-6" / "trainer_state.json").read_text(encoding="utf-8")
    rows = [row for row in json.loads(text)["log_history"] if "loss" in row]
    norms = [row["gradwatch/grad_norm"] for row in rows]
    assert [math.isnan(one) for one in norms] == [False, False, False, True, False, False]
    assert torch.isfinite(torch.tensor(norms)[[0, 1, 2, 4, 5]]).all()
    assert len(Texts()) == 40


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    """Returns a folder in which a script has reported 200 steps to several services, and the steps."""
    pandas = pytest.importorskip("pandas")
    for name in ("tensorboard", "mlflow", "wandb"):
        pytest.importorskip(name, reason=f"NOT TESTED: reports to {name}")
    folder = tmp_path_factory.mktemp("reported")
    environment = processes.environment(
        path=[processes.Path(__file__).parents[3]],
        MLFLOW_TRACKING_URI="sqlite:///runs.db",
        TENSORBOARD_LOGGING_DIR="board",
        WANDB_MODE="offline",
        WANDB_SILENT="true",
    )
    done = processes.run(
        *("tensorboard", "mlflow", "wandb"), code=REPORTS, cwd=folder, env=environment
    )
    assert done.returncode == 0, done.stderr
    return folder, pandas.read_pickle(folder / "steps.pickle")


@pytest.mark.slow
def test_tensorboard_has_every_row(reported):
    """report_to="tensorboard": 200 of 200, under the steps of the loss."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, steps = reported
    board = EventAccumulator(str(folder / "board"), size_guidance={"scalars": 0})
    board.Reload()

    for name in OURS:
        found = board.Scalars(f"train/gradwatch/{name}")
        assert [one.step for one in found] == steps.index.tolist()
        assert [one.value for one in found] == np.float32(steps[name]).tolist()
    assert len(board.Scalars("train/loss")) == len(steps) == 200


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_mlflow_has_every_row(reported):
    """report_to="mlflow": 200 of 200 in its database."""
    import mlflow

    folder, steps = reported
    client = mlflow.MlflowClient(f"sqlite:///{folder / 'runs.db'}")
    (run,) = client.search_runs(["0"])

    for name in OURS:
        found = client.get_metric_history(run.info.run_id, f"gradwatch/{name}")
        found = sorted(found, key=lambda one: one.step)
        assert [one.step for one in found] == steps.index.tolist()
        assert [one.value for one in found] == steps[name].tolist()


@pytest.mark.slow
def test_wandb_has_every_row(reported):
    """report_to="wandb": 200 of 200, each in the row of its loss, in the file of the run."""
    from tests.support.wandb_runs import rows as rows_in_file  # needs W&B

    folder, steps = reported
    found = rows_in_file(folder)
    rows = [row for row in found if "train/loss" in row]

    assert [row["train/global_step"] for row in rows] == steps.index.tolist()
    for name in OURS:
        assert [row[f"train/gradwatch/{name}"] for row in rows] == steps[name].tolist()
