"""AcceleratorSink into real runs of W&B and MLflow: all rows of both sides, read back from disk."""

import logging

import pytest

pytest.importorskip("accelerate", reason="NOT TESTED: accelerate is not installed")

from tests.integrations.huggingface.accelerate_loops import fresh
from tests.integrations.huggingface.test_accelerate_sink import (
    NORM,
    ORDERS,
    STEPS,
    norms_of,
    train_logged,
)

# Of MLflow and SQLAlchemy about themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:mlflow"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:sqlalchemy"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


def kept_by_wandb(order):
    """Return the numbers of the user's rows that W&B itself keeps: those that do not fall."""
    newest, kept = -1, []
    for number in range(1, STEPS + 1):
        step = ORDERS[order](number).get("step", newest + 1)
        if step >= newest:
            kept.append(number)
            newest = step
    return len(kept)


@pytest.mark.slow
@pytest.mark.parametrize("closed_first", [True, False])
@pytest.mark.parametrize("order", ["from 0", "from 1", "no step", "scrambled"])
def test_wandb(order, closed_first, tmp_path, monkeypatch):
    """All rows of ours, and all of the loop's that W&B takes without us, are in the run's file."""
    pytest.importorskip("wandb", reason="NOT TESTED: wandb is not installed")
    from tests.support import wandb_runs

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    accelerator = fresh(log_with="wandb")
    accelerator.init_trackers("run", init_kwargs={"wandb": {"dir": str(tmp_path)}})
    watcher = train_logged(accelerator, log=ORDERS[order])
    if closed_first:
        watcher.close()
    accelerator.end_training()
    watcher.close()
    rows = wandb_runs.rows(tmp_path)
    assert wandb_runs.series(rows, NORM) == norms_of(watcher)
    his = [row for row in rows if "loss" in row]
    assert len(his) == kept_by_wandb(order)
    if order == "from 0":
        assert [row["_step"] for row in his] == list(range(STEPS))


@pytest.mark.slow
@pytest.mark.parametrize("order", ["from 0", "scrambled"])
def test_mlflow(order, tmp_path, monkeypatch):
    """All 200 of both sides are in the database, under the steps that were given."""
    mlflow = pytest.importorskip("mlflow", reason="NOT TESTED: mlflow is not installed")
    for package in ("sqlalchemy", "alembic"):
        pytest.importorskip(package, reason="NOT TESTED: MLflow without a database")
    for name in ("mlflow", "alembic"):
        monkeypatch.setattr(logging.getLogger(name), "level", logging.WARNING)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    try:
        accelerator = fresh(log_with="mlflow")
        options = {"mlflow": {"logging_dir": (tmp_path / "artifacts").as_uri()}}
        accelerator.init_trackers("run", init_kwargs=options)
        run = accelerator.get_tracker("mlflow", unwrap=True).info.run_id
        watcher = train_logged(accelerator, log=ORDERS[order])
        accelerator.end_training()
        watcher.close()
        client = mlflow.MlflowClient()
        ours = client.get_metric_history(run, NORM)
        assert sorted((one.step, one.value) for one in ours) == norms_of(watcher)
        assert len(client.get_metric_history(run, "loss")) == STEPS
    finally:
        mlflow.end_run()
        mlflow.set_tracking_uri(before)
