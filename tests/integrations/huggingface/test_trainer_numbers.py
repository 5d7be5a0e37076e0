"""GradientMonitorCallback: its numbers are those of the Trainer and of a float64 reference."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("transformers", reason="NOT TESTED: the Trainer (transformers is missing)")

from transformers import Trainer

from gradwatch_huggingface import GradientMonitorCallback
from tests.integrations.huggingface.trainer_runs import (
    BEFORE_5,
    WARNINGS,
    Reference,
    Texts,
    arguments,
    has_their_losses,
    has_their_norms,
    rows_of,
    same_weights,
    small_model,
    trained,
)

pytestmark = [pytest.mark.filterwarnings(one) for one in WARNINGS]


def referenced(folder, monitor, **changes):
    """Trains under a callback and a reference; returns the Trainer and the reference."""
    reference = Reference()
    trainer = Trainer(
        small_model(),
        arguments(folder, **changes),
        train_dataset=changes.pop("data", None) or Texts(20),
        callbacks=[monitor, reference],
    )
    reference.follow(trainer)
    trainer.train()
    return trainer, reference


@pytest.mark.parametrize("most", [0.3, 1.0, 1e6])
def test_norms_and_losses_are_those_of_the_reference(tmp_path, most):
    """Norms before and after the Trainer's clip, micro-batches, also in short windows, and losses."""
    monitor = GradientMonitorCallback()
    accumulates = {"gradient_accumulation_steps": 3, "num_train_epochs": 2, "max_steps": -1}
    trainer, reference = referenced(tmp_path, monitor, max_grad_norm=most, **accumulates)

    steps = monitor.history.steps()

    # Transformers 4.48 plans the steps of an epoch rounded down, and so ends sooner.
    assert reference.micro_batches == ([3, 3, 3, 1] * 2)[: len(reference.micro_batches)]
    assert BEFORE_5 or len(reference.micro_batches) == 8  # older ones round the steps of an epoch
    assert len(reference.micro_batches) > 4
    assert steps["micro_batches"].tolist() == reference.micro_batches
    np.testing.assert_allclose(steps["grad_norm"], reference.before, rtol=2e-6)
    np.testing.assert_allclose(steps["grad_norm_clipped"], reference.after, rtol=2e-6)
    factors = np.array(reference.after) / np.array(reference.before)
    np.testing.assert_allclose(steps["clip_coef"], factors, rtol=4e-6)
    np.testing.assert_allclose(steps["loss"], reference.losses, rtol=1e-6)
    has_their_norms(trainer, steps)
    has_their_losses(trainer, steps)


def test_a_loss_without_token_counts_is_divided_by_the_window(tmp_path):
    """A Trainer whose compute_loss returns means divides them; the column has what it logs."""

    class Means(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            self.model_accepts_loss_kwargs = False
            return super().compute_loss(model, inputs, return_outputs, None)

    monitor = GradientMonitorCallback()
    given = {"gradient_accumulation_steps": 3, "num_train_epochs": 1, "max_steps": -1}
    trainer = trained(tmp_path, monitor, kind=Means, data=Texts(20), **given)

    steps = monitor.history.steps()

    assert steps["micro_batches"].tolist() == [3, 3, 3, 1][: trainer.state.max_steps]
    has_their_losses(trainer, steps)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bf16": True},
        {"gradient_accumulation_steps": 2},
        {"max_grad_norm": 0.0},
        {"label_smoothing_factor": 0.1, "optim": "sgd"},
        {"neftune_noise_alpha": 5.0, "optim": "adafactor"},
    ],
    ids=lambda changes: next(iter(changes), "default"),
)
@pytest.mark.parametrize("options", [{}, {"explain": True}], ids=["watched", "explained"])
def test_the_training_is_what_it_would_be_without(tmp_path, changes, options):
    """Weights are bit-identical, the Trainer's norm is ours, and nothing is told."""
    monitor = GradientMonitorCallback(**options)
    given = {"lr_scheduler_type": "linear", **changes}
    watched, plain = trained(tmp_path, monitor, **given), trained(tmp_path, **given)

    steps = monitor.history.steps()

    assert same_weights(watched, plain)
    has_their_norms(watched, steps)
    has_their_losses(watched, steps)
    assert not monitor.events


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
@pytest.mark.parametrize(
    "changes",
    [
        {"torch_compile": True, "torch_compile_backend": "eager"},
        {"gradient_checkpointing": True},
    ],
    ids=["compiled", "checkpointed"],
)
@pytest.mark.parametrize("options", [{}, {"explain": True}], ids=["watched", "explained"])
def test_wrapped_models_are_watched_under_their_own_names(tmp_path, changes, options):
    """A compiled or checkpointed model has the same weights as without, and its own names."""
    monitor = GradientMonitorCallback(**options)
    watched, plain = trained(tmp_path, monitor, **changes), trained(tmp_path, **changes)

    names = set(monitor.history.parameters()["parameter"])

    assert same_weights(watched, plain)
    assert names == {name for name, _ in small_model().named_parameters()}
    has_their_norms(watched, monitor.history.steps())


def test_the_callback_clips_in_place_of_the_trainer(tmp_path):
    """With max_grad_norm=0 clip=0.5 has the weights of the Trainer's own clip at 0.5."""
    monitor = GradientMonitorCallback(clip=0.5)
    ours = trained(tmp_path, monitor, max_grad_norm=0.0, optim="sgd")
    theirs = trained(tmp_path, max_grad_norm=0.5, optim="sgd")

    steps = monitor.history.steps()

    has_their_norms(ours, steps)
    assert steps["clipped"].all()
    np.testing.assert_allclose(steps["grad_norm_clipped"], 0.5, rtol=1e-5)
    for left, right in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        np.testing.assert_allclose(left.detach(), right.detach(), atol=1e-6)


def test_the_noise_scale_is_estimated_from_the_micro_batches(tmp_path):
    """After 20 windows of three micro-batches there is an estimate."""
    data = Texts()
    data.labels = data.labels.clamp(max=5)  # mostly the same word: the gradients agree
    monitor = GradientMonitorCallback()
    given = {"gradient_accumulation_steps": 3, "max_steps": 30, "learning_rate": 1e-4}
    trained(tmp_path, monitor, data=data, logging_steps=30, **given)

    assert monitor.noise_scale.reason == ""
    assert 0 < monitor.noise_scale.micro_batches < 3


def test_records_have_the_global_step_of_the_log(tmp_path):
    """The x-axis of the records is that of the Trainer's rows."""
    monitor = GradientMonitorCallback()
    trainer = trained(tmp_path, monitor, gradient_accumulation_steps=2)

    found = [record.global_step for record in monitor.watcher._run.recorder.batch().steps]

    assert found == [row["step"] for row in rows_of(trainer)] == [1, 2, 3, 4, 5, 6]
