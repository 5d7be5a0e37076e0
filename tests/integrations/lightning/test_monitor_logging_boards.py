"""GradientMonitor and Lightning's loggers for W&B and MLflow: every row of both sides arrives."""

from __future__ import annotations

import pytest

from gradwatch_lightning import GradientMonitor

BATCHES = 60
BLOCK = "gradwatch_blocks/body.0"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore:.*anonymous.*",
        "ignore::ResourceWarning",
        "ignore::pytest.PytestUnraisableExceptionWarning",
        "ignore:The ``noload`` loader strategy is deprecated",  # MLflow's own, of SQLAlchemy
    ),
]


def test_wandb(kit, tmp_path, monkeypatch):
    """Read back from its file there is a row per step with loss, norm and blocks side by side."""
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb = pytest.importorskip("wandb", reason="NOT TESTED: wandb is not installed.")
    from lightning.pytorch.loggers import WandbLogger

    from tests.support import wandb_runs

    monitor = GradientMonitor(log_blocks=True)
    logger = WandbLogger(save_dir=str(tmp_path), offline=True)
    kit.trainer(monitor, logger=logger).fit(kit.Net(), kit.loader(BATCHES))
    wandb.finish()

    rows = [row for row in wandb_runs.rows(tmp_path) if "train_loss" in row]
    assert [row["trainer/global_step"] for row in rows] == list(range(BATCHES))
    norms = monitor.history.steps().grad_norm.tolist()
    assert [row["gradwatch/grad_norm"] for row in rows] == pytest.approx(norms, rel=1e-6)
    assert all(0 < row[BLOCK] <= row["gradwatch/grad_norm"] for row in rows)


def test_mlflow(kit, tmp_path, monkeypatch):
    """A run in sqlite has each step once, with the values of the history."""
    pytest.importorskip("mlflow", reason="NOT TESTED: MLflow is not installed.")
    from lightning.pytorch.loggers import MLFlowLogger

    monkeypatch.chdir(tmp_path)  # where MLflow keeps artifacts
    monitor = GradientMonitor(log_blocks=True)
    logger = MLFlowLogger(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    kit.trainer(monitor, logger=logger).fit(kit.Net(), kit.loader(10))

    def series(key):
        found = logger.experiment.get_metric_history(logger.run_id, key)
        return sorted((one.step, one.value) for one in found)

    norms = monitor.history.steps().grad_norm.tolist()
    assert series("gradwatch/grad_norm") == [
        (step, pytest.approx(norm, rel=1e-6)) for step, norm in enumerate(norms)
    ]
    assert [step for step, _ in series(BLOCK)] == list(range(10))
    assert [step for step, _ in series("train_loss")] == list(range(10))
