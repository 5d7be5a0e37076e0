"""Bad input is an error before the first step, in words that name the argument and the value."""

import copy
import inspect
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch.options import Options
from gradwatch.testing import CapturingSink


@dataclass(frozen=True)
class Bad:
    """A call that must be refused: the error's type and what its text must contain."""

    call: Callable[[nn.Module, torch.optim.Optimizer], Any]
    error: tuple[type[Exception], ...]
    says: tuple[str, ...]


class _NoWrite:
    def close(self) -> None:
        pass


class _NoClose:
    def write(self, batch: object) -> None:
        pass


class _Hourly(CapturingSink):
    deliver = "hour"


class _WriteIsNoMethod(_NoWrite):
    write = 3


WRONG_TYPE, WRONG_VALUE, EITHER = (TypeError,), (ValueError,), (TypeError, ValueError)


def _option(error: tuple[type[Exception], ...], *says: str, **options: Any) -> Bad:
    return Bad(lambda model, optimizer: gradwatch.watch(model, optimizer, **options), error, says)


def _policy(make: Callable[[], Any], error: tuple[type[Exception], ...], *says: str) -> Bad:
    return Bad(lambda model, optimizer: make(), error, says)


def _model(model: Any, error: tuple[type[Exception], ...], *says: str) -> Bad:
    return Bad(lambda _, optimizer: gradwatch.watch(model()), error, says)


def _optimizer(
    make: Callable[[nn.Module, Any], Any], error: tuple[type[Exception], ...], *says: str
) -> Bad:
    return Bad(lambda model, optimizer: gradwatch.watch(model, make(model, optimizer)), error, says)


def _frozen() -> nn.Module:
    return nn.Linear(2, 2).requires_grad_(False)


def _leaf() -> torch.Tensor:
    return torch.ones(2, requires_grad=True)


def _foreign(model: nn.Module, optimizer: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(nn.Linear(3, 3).parameters())


def _partly_foreign(model: nn.Module, optimizer: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([*model.parameters(), *nn.Linear(3, 3).parameters()])


def _scheduler(model: nn.Module, optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 1)


BAD: dict[str, Bad] = {
    # clip
    "clip_negative": _option(WRONG_VALUE, "clip", "-1", clip=-1.0),
    "clip_zero": _option(WRONG_VALUE, "clip", "0", clip=0.0),
    "clip_nan": _option(WRONG_VALUE, "clip", "nan", clip=math.nan),
    "clip_minus_inf": _option(WRONG_VALUE, "clip", "-inf", clip=-math.inf),
    "clip_bool": _option(WRONG_TYPE, "clip", "True", clip=True),
    "clip_word": _option(EITHER, "clip", "hard", clip="hard"),
    "clip_number_as_text": _option(EITHER, "clip", "1.0", clip="1.0"),
    "clip_pair": _option(WRONG_TYPE, "clip", "0.5", clip=(0.5, 1.0)),
    "clip_class_not_object": _option(WRONG_TYPE, "clip", "ClipByNorm", clip=gradwatch.ClipByNorm),
    "max_norm_negative": _policy(lambda: gradwatch.ClipByNorm(-2.5), WRONG_VALUE, "max_norm", "-2.5"),
    "max_norm_zero": _policy(lambda: gradwatch.ClipByNorm(0), WRONG_VALUE, "max_norm", "0"),
    "max_norm_nan": _policy(lambda: gradwatch.ClipByNorm(math.nan), WRONG_VALUE, "max_norm", "nan"),
    "max_norm_text": _policy(lambda: gradwatch.ClipByNorm("1"), WRONG_TYPE, "max_norm", "1"),
    "max_norm_none": _policy(lambda: gradwatch.ClipByNorm(None), WRONG_TYPE, "max_norm", "None"),
    "max_norm_bool": _policy(lambda: gradwatch.ClipByNorm(True), WRONG_TYPE, "max_norm", "True"),
    "norm_type_zero": _policy(lambda: gradwatch.ClipByNorm(1.0, norm_type=0), WRONG_VALUE, "norm_type", "0"),
    "norm_type_negative": _policy(lambda: gradwatch.ClipByNorm(1.0, norm_type=-1), WRONG_VALUE, "norm_type", "-1"),
    "norm_type_minus_inf": _policy(lambda: gradwatch.ClipByNorm(1.0, norm_type=-math.inf), WRONG_VALUE, "norm_type", "-inf"),
    "norm_type_nan": _policy(lambda: gradwatch.ClipByNorm(1.0, norm_type=math.nan), WRONG_VALUE, "norm_type", "nan"),
    "norm_type_word": _policy(lambda: gradwatch.ClipByNorm(1.0, norm_type="fro"), EITHER, "norm_type", "fro"),
    "clip_value_negative": _policy(lambda: gradwatch.ClipByValue(-0.5), WRONG_VALUE, "clip_value", "-0.5"),
    "clip_value_zero": _policy(lambda: gradwatch.ClipByValue(0.0), WRONG_VALUE, "clip_value", "0"),
    "clip_value_nan": _policy(lambda: gradwatch.ClipByValue(math.nan), WRONG_VALUE, "clip_value", "nan"),
    "clip_value_text": _policy(lambda: gradwatch.ClipByValue("1"), WRONG_TYPE, "clip_value", "1"),
    # numbers
    "accumulate_zero": _option(WRONG_VALUE, "accumulate", "0", accumulate=0),
    "accumulate_negative": _option(WRONG_VALUE, "accumulate", "-4", accumulate=-4),
    "accumulate_bool": _option(WRONG_TYPE, "accumulate", "True", accumulate=True),
    "accumulate_float": _option(WRONG_TYPE, "accumulate", "2.0", accumulate=2.0),
    "accumulate_word": _option(EITHER, "accumulate", "many", accumulate="many"),
    "accumulate_none": _option(WRONG_TYPE, "accumulate", "None", accumulate=None),
    "every_zero": _option(WRONG_VALUE, "every", "0", every=0),
    "every_negative": _option(WRONG_VALUE, "every", "-1", every=-1),
    "every_float": _option(WRONG_TYPE, "every", "0.5", every=0.5),
    "buffer_size_zero": _option(WRONG_VALUE, "buffer_size", "0", buffer_size=0),
    "buffer_size_negative": _option(WRONG_VALUE, "buffer_size", "-8", buffer_size=-8),
    "buffer_size_infinite": _option(WRONG_TYPE, "buffer_size", "inf", buffer_size=math.inf),
    "exploding_norm_zero": _option(WRONG_VALUE, "exploding_norm", "0", exploding_norm=0.0),
    "exploding_norm_negative": _option(WRONG_VALUE, "exploding_norm", "-3", exploding_norm=-3.0),
    "exploding_norm_nan": _option(WRONG_VALUE, "exploding_norm", "nan", exploding_norm=math.nan),
    "exploding_norm_text": _option(WRONG_TYPE, "exploding_norm", "big", exploding_norm="big"),
    # words
    "on_nonfinite_unknown": _option(WRONG_VALUE, "on_nonfinite", "ignore", "skip", on_nonfinite="ignore"),
    "on_nonfinite_none": _option(EITHER, "on_nonfinite", "None", on_nonfinite=None),
    "on_nonfinite_capitals": _option(WRONG_VALUE, "on_nonfinite", "SKIP", on_nonfinite="SKIP"),
    "statistic_unknown": _option(WRONG_VALUE, "statistics", "median", "norm", statistics=("norm", "median")),
    "statistics_word": _option(EITHER, "statistics", "norm", statistics="norm"),
    "statistics_number": _option(WRONG_TYPE, "statistics", "3", statistics=3),
    "statistics_of_numbers": _option(EITHER, "statistics", "1", statistics=(1,)),
    # sinks and scaler
    "sink_without_write": _option(EITHER, "sinks", "write", "_NoWrite", sinks=[_NoWrite()]),
    "sink_without_close": _option(EITHER, "sinks", "close", "_NoClose", sinks=[_NoClose()]),
    "sink_write_is_no_method": _option(EITHER, "sinks", "write", sinks=[_WriteIsNoMethod()]),
    "sink_class_not_object": _option(EITHER, "sinks", "CapturingSink", sinks=[CapturingSink]),
    "sink_delivered_in_a_way_that_is_none": _option(EITHER, "sinks", "'step'", "_Hourly", sinks=[_Hourly()]),
    "sinks_not_a_sequence": _option(WRONG_TYPE, "sinks", "CapturingSink", sinks=CapturingSink()),
    "sinks_path": _option(EITHER, "sinks", "runs", sinks="runs"),
    "sinks_none": _option(WRONG_TYPE, "sinks", "None", sinks=None),
    "scaler_wrong_type": _option(WRONG_TYPE, "scaler", "True", scaler=True),
    "scaler_number": _option(WRONG_TYPE, "scaler", "1024", scaler=1024.0),
    # optimizer
    "optimizer_foreign": _optimizer(_foreign, WRONG_VALUE, "optimizer", "AdamW"),
    "optimizer_partly_foreign": _optimizer(_partly_foreign, WRONG_VALUE, "optimizer", "AdamW"),
    "optimizer_wrong_type": _optimizer(lambda model, _: "adam", WRONG_TYPE, "optimizer", "adam"),
    "optimizer_class": _optimizer(lambda model, _: torch.optim.SGD, WRONG_TYPE, "optimizer", "SGD"),
    "optimizer_is_a_scheduler": _optimizer(_scheduler, WRONG_TYPE, "optimizer", "StepLR"),
    "optimizers_empty": _optimizer(lambda model, _: [], WRONG_VALUE, "optimizer", "empty"),
    "optimizers_of_wrong_type": _optimizer(lambda model, opt: [opt, None], WRONG_TYPE, "optimizer", "None"),
    "optimizer_twice": _optimizer(lambda model, opt: [opt, opt], WRONG_VALUE, "optimizer", "twice"),
    "optimizer_parameters": _optimizer(lambda model, _: model.parameters(), WRONG_TYPE, "optimizer", "Parameter"),
    "optimizers_named_none": _optimizer(lambda model, opt: {"none": opt}, WRONG_VALUE, "optimizer", "none"),
    "optimizers_named_nothing": _optimizer(lambda model, opt: {" ": opt}, WRONG_VALUE, "optimizer", "' '"),
    "optimizers_named_by_number": _optimizer(lambda model, opt: {3: opt}, WRONG_TYPE, "optimizer", "3", "adamw"),
    "optimizers_named_none_given": _optimizer(lambda model, _: {}, WRONG_VALUE, "optimizer", "empty"),
    "optimizers_named_twice": _optimizer(lambda model, opt: {"a": opt, "b": opt}, WRONG_VALUE, "optimizer", "twice"),
    "optimizer_state": _optimizer(lambda model, opt: opt.state_dict(), WRONG_TYPE, "optimizer", "mapping"),
    # model
    "model_without_trainable": _model(_frozen, WRONG_VALUE, "model", "Linear"),
    "model_without_parameters": _model(nn.ReLU, WRONG_VALUE, "model", "ReLU"),
    "model_is_a_tensor": _model(_leaf, WRONG_TYPE, "model", "Tensor"),
    "model_is_a_class": _model(lambda: nn.Linear, WRONG_TYPE, "model", "Linear"),
    "model_is_a_list": _model(lambda: [_leaf()], WRONG_TYPE, "model", "list"),
    "model_is_none": _model(lambda: None, WRONG_TYPE, "model", "None"),
    "model_not_yet_initialized": _model(lambda: nn.LazyLinear(2), WRONG_VALUE, "model", "weight", "forward"),
    "mapping_empty": _model(dict, WRONG_VALUE, "model"),
    "mapping_no_leaf": _model(lambda: {"y": _leaf() * 2}, WRONG_VALUE, "y", "leaf"),
    "mapping_no_tensor": _model(lambda: {"y": 3.0}, WRONG_TYPE, "y", "3.0"),
    "mapping_no_grad": _model(lambda: {"y": torch.ones(2)}, WRONG_VALUE, "y", "requires_grad"),
    "mapping_name_no_text": _model(lambda: {3: _leaf()}, WRONG_TYPE, "3"),
}  # fmt: skip


def _model_and_optimizer() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(2, 2)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_words(name: str) -> None:
    """The constructor raises ValueError or TypeError; its text names the argument and the value."""
    bad = BAD[name]
    model, optimizer = _model_and_optimizer()
    with pytest.raises(bad.error) as caught:
        bad.call(model, optimizer)
    text = str(caught.value)
    assert type(caught.value) in (TypeError, ValueError)
    for word in bad.says:
        assert re.search(re.escape(word), text, re.IGNORECASE), f"{word!r} is not in: {text}"


@pytest.mark.parametrize("name", BAD)
def test_refused_input_leaves_nothing_behind(name: str) -> None:
    """After the error the model is not watched: a right call works at once, and no hook hangs."""
    model, optimizer = _model_and_optimizer()
    with pytest.raises((TypeError, ValueError)):
        BAD[name].call(model, optimizer)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    with gradwatch.watch(model, optimizer) as watcher:
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    assert len(watcher.history.steps()) == 1


def test_at_least_twenty_bad_inputs_are_named() -> None:
    """The table has the twenty that were asked for, and more."""
    assert len(BAD) >= 20


def test_watching_twice_names_the_remedy() -> None:
    """Watching a watched model is a RuntimeError before anything is attached."""
    model, optimizer = _model_and_optimizer()
    with (
        gradwatch.watch(model, optimizer),
        pytest.raises(RuntimeError, match=r"weight.*(already|watched|attached)"),
    ):
        gradwatch.watch(model, optimizer)


def test_an_argument_that_does_not_exist_is_a_type_error() -> None:
    """A misspelt option is Python's own TypeError."""
    model, optimizer = _model_and_optimizer()
    with pytest.raises(TypeError, match="clipping"):
        gradwatch.watch(model, optimizer, clipping=1.0)


def test_options_are_by_name_only() -> None:
    """watch(model, optimizer, 1.0) is refused: a bare number says nothing."""
    model, optimizer = _model_and_optimizer()
    with pytest.raises(TypeError):
        gradwatch.watch(model, optimizer, 1.0)


def test_arguments_are_not_changed() -> None:
    """watch() changes neither lists nor mappings that it is given."""
    model, optimizer = _model_and_optimizer()
    optimizers, sinks, statistics = [optimizer], [CapturingSink()], ["norm"]
    leaves = dict(model.named_parameters())
    before = copy.copy(leaves)
    with gradwatch.watch(leaves, optimizers, sinks=sinks, statistics=statistics):
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    assert (len(optimizers), len(sinks), statistics, list(leaves)) == (1, 1, ["norm"], list(before))


@pytest.mark.parametrize(
    "options",
    [
        {"clip": 1}, {"clip": 1e-30}, {"clip": math.inf}, {"clip": gradwatch.ClipByValue(1)},
        {"clip": gradwatch.ClipByNorm(1, norm_type=math.inf)}, {"accumulate": 1}, {"statistics": ()},
        {"statistics": ["norm", "norm"]}, {"sinks": ()}, {"sinks": (CapturingSink(),)}, {"buffer_size": 1},
        {"exploding_norm": 1}, {"every": 1000},
    ],
    ids=lambda options: "-".join(f"{key}={type(value).__name__}" for key, value in options.items()),
)  # fmt: skip
def test_good_input_at_the_bounds_is_taken(options: dict[str, Any]) -> None:
    """What is just within the bounds works."""
    model, optimizer = _model_and_optimizer()
    with gradwatch.watch(model, [optimizer], **options) as watcher:
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    assert len(watcher.history.steps()) == 1


def test_loss_that_is_no_scalar_is_refused_by_the_managed_loop() -> None:
    """watcher.backward() of something that is no scalar tensor says so, and the run can go on."""
    model, optimizer = _model_and_optimizer()
    with gradwatch.watch(model, optimizer) as watcher:
        for loss in (3.0, None, model(torch.ones(1, 2))):
            with pytest.raises((TypeError, ValueError, RuntimeError, AttributeError)):
                watcher.backward(loss)
        watcher.backward(model(torch.ones(1, 2)).sum())
        assert watcher.step() is True
    assert list(watcher.history.steps()["micro_batches"]) == [1]


def test_error_of_a_long_value_is_short() -> None:
    """What a user gave is cut in the message, so that its advice is still in sight."""
    model, optimizer = _model_and_optimizer()
    weights = [torch.randn(30, 30) for _ in range(10)]
    calls: list[Callable[[], object]] = [
        lambda: gradwatch.watch(weights),  # type: ignore[arg-type]
        lambda: gradwatch.watch({"x": weights}),  # type: ignore[dict-item]
        lambda: gradwatch.watch(model, weights),  # type: ignore[arg-type]
        lambda: gradwatch.watch(model, optimizer, clip=weights),  # type: ignore[arg-type]
        lambda: gradwatch.watch(model, optimizer, run_dir=weights),  # type: ignore[arg-type]
        lambda: gradwatch.watch(model, optimizer, sinks=weights),  # type: ignore[arg-type]
        lambda: gradwatch.watch(model, optimizer, statistics=["norm" * 1000]),
        lambda: gradwatch.watch({f"name{i}": torch.ones(1) for i in range(1000)}),
    ]
    for call in calls:
        with pytest.raises((TypeError, ValueError)) as error:
            call()
        assert len(str(error.value)) < 600


def test_first_of_two_mistakes_is_that_of_the_norm() -> None:
    """Of two bad options always the same one is reported."""
    with pytest.raises(ValueError, match="exploding_norm"):
        gradwatch.watch(nn.Linear(1, 1), clip=-1.0, exploding_norm=-1.0)
    with pytest.raises(ValueError, match="clip="):
        gradwatch.watch(nn.Linear(1, 1), every=0, clip=-1.0)


def test_every_argument_of_watch_is_an_option() -> None:
    """What watch() takes besides model and optimizer is what Options checks, name for name."""
    arguments = list(inspect.signature(gradwatch.watch).parameters)
    assert arguments == ["model", "optimizer", *(field.name for field in fields(Options))]
