"""GradientMonitorCallback: it begins with a training, and ends with it whatever happens."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers", reason="NOT TESTED: the Trainer (transformers is missing)")

import torch
from transformers import Trainer, TrainerCallback

import gradwatch
from gradwatch_huggingface import GradientMonitorCallback
from gradwatch_huggingface.trainer import watched_of
from tests.integrations.huggingface.trainer_runs import (
    WARNINGS,
    Texts,
    arguments,
    is_clean,
    rows_of,
    same_weights,
    small_model,
    trained,
)

pytestmark = [pytest.mark.filterwarnings(one) for one in WARNINGS]


class Stopping(TrainerCallback):
    """Raises in one event, from a step on."""

    def __init__(self, event, error, step):
        def call(args, state, control, **kwargs):
            if state.global_step >= step:
                raise error

        setattr(self, event, call)


class Kept(Texts):
    """Cannot read one of its examples."""

    def __getitem__(self, index):
        if index == 17:
            raise OSError("the disk")
        return super().__getitem__(index)


@pytest.mark.parametrize(
    ("event", "step"),
    [
        ("on_train_begin", 0),
        ("on_epoch_begin", 0),
        ("on_step_begin", 3),
        ("on_substep_end", 3),
        ("on_pre_optimizer_step", 3),
        ("on_optimizer_step", 3),
        ("on_step_end", 3),
        ("on_log", 3),
        ("on_evaluate", 3),
        ("on_epoch_end", 3),
        ("on_train_end", 3),
    ],
)
@pytest.mark.parametrize("error", [ZeroDivisionError(), KeyboardInterrupt()], ids=type)
def test_an_error_in_any_event_ends_the_watching(tmp_path, event, step, error):
    """Whichever callback raises, and when, the watcher is closed before the error is seen."""
    monitor = GradientMonitorCallback()
    changes = {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 3}
    trainer = Trainer(
        small_model(),
        arguments(tmp_path, num_train_epochs=1, **{**changes, "max_steps": 4}),
        train_dataset=Texts(),
        eval_dataset=Texts(4),
        callbacks=[monitor, Stopping(event, error, step)],
    )

    with pytest.raises(type(error)):
        trainer.train()

    assert is_clean(trainer)
    if event == "on_train_begin":
        assert monitor.watcher is None
    else:
        assert "closed" in repr(monitor.watcher)
        assert len(monitor.history.steps()) >= step


def test_an_error_in_the_data_ends_it_and_a_second_training_begins_anew(tmp_path):
    """The same Trainer and callback train again: another watcher, from step 1."""
    monitor = GradientMonitorCallback()
    trainer = Trainer(
        small_model(),
        arguments(tmp_path, max_steps=20),
        train_dataset=Kept(),
        callbacks=[monitor],
    )
    with pytest.raises(OSError, match="the disk"):
        trainer.train()
    assert is_clean(trainer)
    first = monitor.watcher

    trainer.train_dataset = Texts()
    trainer.train()
    trainer.train()

    assert is_clean(trainer)
    assert monitor.watcher is not first
    assert monitor.history.steps().index.tolist() == list(range(1, 21))


def test_a_callback_that_stops_the_training_ends_the_watching(tmp_path):
    """After control.should_training_stop there are as many records as steps."""

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    monitor = GradientMonitorCallback()
    trainer = trained(tmp_path, monitor, Stop())

    assert is_clean(trainer)
    assert len(monitor.history.steps()) == 3


def test_the_search_for_a_batch_size_begins_anew(tmp_path):
    """After an out-of-memory error the records are those of the attempt that succeeds."""

    class Small(Trainer):
        def training_step(self, model, inputs, *args, **kwargs):
            if len(inputs["input_ids"]) > 3 and self.state.global_step == 2:
                raise RuntimeError("CUDA out of memory.")
            return super().training_step(model, inputs, *args, **kwargs)

    monitor = GradientMonitorCallback()
    trainer = trained(
        tmp_path, monitor, kind=Small, auto_find_batch_size=True, per_device_train_batch_size=4
    )

    assert is_clean(trainer)
    assert monitor.history.steps().index.tolist() == [1, 2, 3, 4, 5, 6]
    assert [row["grad_norm"] for row in rows_of(trainer)] == monitor.history.steps()[
        "grad_norm"
    ].tolist()


def test_however_it_is_added_it_watches(tmp_path):
    """As a class, and by add_callback() after the constructor; two Trainers in a process."""
    first = trained(tmp_path, GradientMonitorCallback)
    found = [
        one for one in first.callback_handler.callbacks if isinstance(one, GradientMonitorCallback)
    ]
    late = GradientMonitorCallback()
    second = Trainer(small_model(), arguments(tmp_path), train_dataset=Texts())
    second.add_callback(late)
    second.train()

    assert len(found[0].history.steps()) == len(late.history.steps()) == 6
    assert is_clean(first)
    assert is_clean(second)
    assert same_weights(first, second)


def test_one_callback_serves_two_trainers(tmp_path):
    """The history is that of the latest training, and a policy of the user's begins anew."""
    monitor = GradientMonitorCallback(clip="auto")
    given = {"max_grad_norm": 0.0, "max_steps": 8}
    trained(tmp_path, monitor, **given)
    first = monitor.history.steps()
    trained(tmp_path, monitor, **given)
    second = monitor.history.steps()

    assert first["clip_threshold"].notna().any()
    assert first["clip_threshold"].equals(second["clip_threshold"])


def test_what_a_trainer_is_given_otherwise_stays(tmp_path):
    """The list of callbacks and the methods are afterwards what they were."""
    monitor = GradientMonitorCallback()
    trainer = Trainer(
        small_model(), arguments(tmp_path), train_dataset=Texts(), callbacks=[monitor]
    )
    told = []
    trainer.log = lambda logs, *args, **kwargs: told.append(logs)
    mine, callbacks = trainer.log, list(trainer.callback_handler.callbacks)

    trainer.train()

    assert trainer.log is mine
    assert trainer.callback_handler.callbacks == callbacks
    assert [row["gradwatch/grad_norm"] for row in told[:-1]] == monitor.history.steps()[
        "grad_norm"
    ].tolist()


def test_evaluation_and_prediction_are_not_watched(tmp_path):
    """evaluate() and predict() before, between and after leave no record, and log nothing of ours."""

    class Between(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                monitor.trainer.evaluate()
                monitor.trainer.predict(Texts(4))

    monitor = GradientMonitorCallback(explain=True)
    trainer = Trainer(
        small_model(),
        arguments(tmp_path),
        train_dataset=Texts(),
        eval_dataset=Texts(4),
        callbacks=[monitor, Between()],
    )
    monitor.trainer = trainer
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()

    assert len(monitor.history.steps()) == 6
    others = [row for row in trainer.state.log_history if "loss" not in row]
    assert len(others) == 3
    assert not [tag for row in others for tag in row if tag.startswith("gradwatch")]


def test_copies_and_pickles_hold_the_record(tmp_path):
    """They have the history, watch nothing, and can be given to another Trainer."""
    monitor = GradientMonitorCallback()
    trained(tmp_path, monitor)

    for one in (copy.deepcopy(monitor), pickle.loads(pickle.dumps(monitor))):
        assert one.history.steps().equals(monitor.history.steps())
        again = trained(tmp_path, one, max_steps=2)
        assert is_clean(again)
        assert len(one.history.steps()) == 2


def test_nothing_is_read_before_a_training():
    """The properties say what to do first."""
    monitor = GradientMonitorCallback()

    assert monitor.watcher is None
    for name in ("history", "events", "explanations", "noise_scale"):
        with pytest.raises(RuntimeError, match=rf"{name} was read.*after trainer\.train\(\)"):
            getattr(monitor, name)


def test_two_clips_are_refused_before_the_first_step(tmp_path):
    """The error names both values and says which side to remove, also for the Trainer's default."""
    monitor = GradientMonitorCallback(clip=2.0)
    trainer = Trainer(
        small_model(), arguments(tmp_path), train_dataset=Texts(), callbacks=[monitor]
    )

    with pytest.raises(ValueError, match=r"max_grad_norm=1\.0.*Remove one side.*max_grad_norm=0"):
        trainer.train()

    assert is_clean(trainer)
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"accumulate": 4}, ValueError, r"gradient_accumulation_steps=4"),
        ({"scaler": None}, ValueError, r"Leave scaler out"),
        ({"log": 1}, TypeError, r"log=\) must be True or False, got 1"),
        ({"log_blocks": None}, TypeError, r"log_blocks=\) must be True or False"),
        ({"clip": -1.0}, ValueError, r"GradientMonitorCallback\(clip=\)"),
        ({"clipp": 1.0}, TypeError, r"unexpected argument 'clipp'"),
    ],
)
def test_bad_arguments_are_refused_by_the_constructor(options, error, text):
    """Each error names the argument, and what to write in its place."""
    with pytest.raises(error, match=text):
        GradientMonitorCallback(**options)


def test_a_model_that_is_watched_already_is_told_and_the_training_goes_on(tmp_path):
    """A callback that only watches warns; one that acts refuses."""
    model = small_model()
    with gradwatch.watch(model):
        monitor = GradientMonitorCallback()
        with pytest.warns(gradwatch.GradwatchWarning, match="does not watch this training"):
            trainer = trained(tmp_path, monitor, model=model)
        assert trainer.state.global_step == 6
        with pytest.raises(RuntimeError, match="the latest training was not watched"):
            _ = monitor.history
        with pytest.raises(RuntimeError, match="watche"):
            trained(tmp_path, GradientMonitorCallback(on_nonfinite="skip"), model=model)


def test_deepspeed_is_said_not_to_be_watched():
    """Its engine steps copies of the gradients, which nobody sees from outside."""
    with pytest.raises(RuntimeError, match="DeepSpeed"):
        watched_of(SimpleNamespace(is_deepspeed_enabled=True, model=torch.nn.Linear(1, 1)))


@pytest.mark.parametrize("options", [{}, {"on_nonfinite": "explain"}], ids=["watched", "explained"])
def test_a_callback_that_is_kept_keeps_no_trainer(tmp_path, options):
    """Its history stays, and the Trainer, the model and the optimizer go when nobody else has them."""
    monitor = GradientMonitorCallback(**options)

    def train():
        trainer = Trainer(
            small_model(),
            arguments(tmp_path, max_steps=3),
            train_dataset=Texts(),
            callbacks=[monitor],
        )
        trainer.train()
        parts = (trainer, trainer.model, trainer.optimizer.optimizer)
        return [weakref.ref(one) for one in parts]

    gone = train()
    gc.collect()
    assert [one() for one in gone] == [None, None, None]
    assert len(monitor.history.steps()) == 3
