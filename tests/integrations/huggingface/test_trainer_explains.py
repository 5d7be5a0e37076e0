"""GradientMonitorCallback: a bad batch is explained, the run survives, and the Trainer does not notice."""

from __future__ import annotations

import logging

import pytest

pytest.importorskip("transformers", reason="NOT TESTED: the Trainer (transformers is missing)")

import torch
from torch.utils.data import SequentialSampler
from transformers import LlamaForCausalLM, Trainer, TrainerCallback

import gradwatch
from gradwatch_huggingface import GradientMonitorCallback
from tests.integrations.huggingface.trainer_runs import (
    WARNINGS,
    Texts,
    is_clean,
    rows_of,
    same_weights,
    small_model,
    trained,
)

pytestmark = [pytest.mark.filterwarnings(one) for one in WARNINGS]

BAD = 13
"""The example with the bad batch: the 7th of two."""


class InTheModel(LlamaForCausalLM):
    """Divides by zero in a batch that has a text which begins with word 0."""

    def forward(self, input_ids=None, labels=None, **given):
        output = super().forward(input_ids=input_ids, labels=labels, **given)
        output.loss = output.loss / (input_ids[:, 0] != 0).all()
        return output


class Ordered(Trainer):
    """Takes the examples in order, and counts and logs in its loss."""

    counted = 0

    def _get_train_sampler(self, *args):
        return SequentialSampler(self.train_dataset)

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.counted += 1
        self.seen = [*getattr(self, "seen", []), len(inputs["input_ids"])]
        self.log({"mine": float(self.counted)})
        is_bad = bool((inputs["input_ids"][:, 0] == 0).any())
        inputs["labels"] = inputs.pop("labels")
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return torch.sqrt(loss * 0) + loss if is_bad and self.in_loss else loss

    in_loss = False


class InTheLoss(Ordered):
    """Takes the root of zero in its loss."""

    in_loss = True


class Without(TrainerCallback):
    """Leaves one step of the optimizer out."""

    def __init__(self, step):
        self.step = step

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == self.step:
            for parameter in model.parameters():
                parameter.grad = None


def outcome(trainer):
    """Returns what the Trainer and the user's code have counted and logged."""
    rows = [
        {tag: value for tag, value in row.items() if not tag.startswith("gradwatch")}
        for row in trainer.state.log_history
        if "mine" in row
    ]
    state = trainer.state
    return trainer.counted, trainer.seen, rows, state.num_input_tokens_seen, state.total_flos


@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("place", ["model", "loss"])
def test_a_bad_batch_is_explained_and_left_out(tmp_path, place, window):
    """The line and the micro-batch are named, and the weights are those without that step."""
    kind = InTheLoss if place == "loss" else Ordered
    of_model = InTheModel if place == "model" else LlamaForCausalLM
    step = 7 if window == 1 else 4
    given = {"gradient_accumulation_steps": window, "include_num_input_tokens_seen": True}
    given |= {"max_steps": 8}
    monitor = GradientMonitorCallback(on_nonfinite="explain")

    trainer = trained(
        tmp_path, monitor, kind=kind, model=small_model(of_model), data=Texts(bad=[BAD]), **given
    )
    plain = trained(
        tmp_path, Without(step), kind=kind, model=small_model(of_model), data=Texts(bad=[BAD]),
        **given,
    )  # fmt: skip

    (found,) = monitor.explanations
    line = "torch.sqrt(loss * 0)" if place == "loss" else "output.loss / (input_ids"
    assert line in found.source
    assert found.file.endswith("test_trainer_explains.py")
    assert (found.step, found.micro_batch) == (step, 1)
    outcomes = monitor.history.steps()["outcome"]
    assert outcomes.tolist() == ["applied"] * (step - 1) + ["skipped_nonfinite"] + ["applied"] * (
        8 - step
    )
    assert same_weights(trainer, plain)
    assert outcome(trainer) == outcome(plain)
    assert is_clean(trainer)


def test_the_hidden_loss_is_told_once(tmp_path, caplog):
    """The Trainer's filter puts another number in place of a NaN loss: the log says it, once."""

    class Bad(Trainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            return loss * float("nan") if self.state.global_step in (2, 3) else loss

    monitor = GradientMonitorCallback(on_nonfinite="skip")
    with caplog.at_level(logging.WARNING, logger="gradwatch"):
        trainer = trained(tmp_path, monitor, kind=Bad)

    told = [one.getMessage() for one in caplog.records if "logging_nan_inf_filter" in one.msg]
    assert len(told) == 1
    assert "the loss of step 3 is not finite" in told[0]
    assert [row["loss"] for row in rows_of(trainer)][2] == 0.0
    assert monitor.history.steps()["loss"].isna().tolist() == [False] * 2 + [True] * 2 + [False] * 2

    caplog.clear()
    trained(tmp_path, GradientMonitorCallback(), kind=Bad, logging_nan_inf_filter=False)
    assert not [one for one in caplog.records if "logging_nan_inf_filter" in one.msg]


def test_raise_ends_the_training_before_the_step(tmp_path):
    """The error comes out of train(), and everything is closed."""
    monitor = GradientMonitorCallback(on_nonfinite="raise")
    model = small_model(InTheModel)

    with pytest.raises(gradwatch.NonFiniteGradientError):
        trained(tmp_path, monitor, kind=Ordered, model=model, data=Texts(bad=[BAD]), max_steps=8)

    assert len(monitor.history.steps()) == 6
    assert not any(one._forward_hooks for one in model.modules())
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
