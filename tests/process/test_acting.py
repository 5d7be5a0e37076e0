"""Acting options are refused where they could not be honest."""

import copy
import gc
import sys
import warnings
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch.adapters import check_options
from gradwatch.process.acting import refuse_dishonest
from tests.support import zoo

ACTING = [{"clip": 1.0}, {"on_nonfinite": "skip"}, {"on_nonfinite": "raise"}, {"skip_spikes": 6.0}]


def refuse(model: Any, *optimizers: Any, **options: Any) -> None:
    """Asks for options, for a model and its optimizers."""
    checked = check_options("watch_all", options, accumulate=1, scaler=None)
    refuse_dishonest(checked, optimizers, model)


def sgd(model: nn.Module) -> torch.optim.SGD:
    """Makes an optimizer of all parameters of a model."""
    return torch.optim.SGD(model.parameters(), lr=0.1)


# -- shared parameters -----------------------------------------------------------------------------


@pytest.mark.parametrize("options", ACTING, ids=str)
def test_shared_parameters(options: dict[str, Any]) -> None:
    """Two optimizers of the same parameters cannot act."""
    model = zoo.small()
    first, second = sgd(model), torch.optim.Adam(model.parameters())
    with pytest.raises(ValueError, match=r"SGD and Adam of Sequential share 4 parameters \(0.weig"):
        refuse(model, first, second, **options)


def test_shared_parameters_are_watched() -> None:
    """Without an acting option nothing is refused."""
    model = zoo.small()
    refuse(model, sgd(model), torch.optim.Adam(model.parameters()), explain=True)


def test_own_parameters() -> None:
    """Several optimizers with parameters of their own can act."""
    model = zoo.small()
    refuse(model, sgd(model[0]), sgd(model[2]), clip=1.0, on_nonfinite="skip")


class Wrapper(torch.optim.Optimizer):
    """Holds the optimizers that it steps: one as an attribute, or several in a list."""

    def __init__(self, *inside: torch.optim.Optimizer, several: bool) -> None:
        groups = [group for one in inside for group in one.param_groups]
        super().__init__(groups, {})
        if several:
            self.optimizers = list(inside)
        else:
            (self.optimizer,) = inside


def test_an_optimizer_inside_of_another() -> None:
    """A wrapper shares the parameters of the optimizers in it, and acts as one with them."""
    model = zoo.small()
    base = sgd(model)
    refuse(model, Wrapper(base, several=False), base, clip=1.0)
    parts = [sgd(model[0]), sgd(model[2])]
    refuse(model, *parts, Wrapper(*parts, several=True), clip=1.0)


def test_before_the_first_step() -> None:
    """Of optimizers that were there before, the error comes out of the first step of one."""
    model = zoo.small()
    before = copy.deepcopy(model.state_dict())
    first, second = sgd(model), torch.optim.Adam(model.parameters())
    with gradwatch.watch_all(clip=1.0):
        model(torch.ones(2, 4)).sum().backward()
        for optimizer in (first, second):
            with pytest.raises(ValueError, match="SGD and Adam"):
                optimizer.step()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_before_the_first_backward() -> None:
    """Of those that are built later, it comes out of the first backward."""
    model = zoo.small()
    with gradwatch.watch_all(clip=1.0):
        optimizers = [sgd(model), torch.optim.Adam(model.parameters())]
        loss = model(torch.ones(2, 4)).sum()
        with pytest.raises(ValueError, match="SGD and Adam"):
            loss.backward()
    assert len(optimizers) == 2


def test_optimizers_that_never_step_refuse_nothing() -> None:
    """What is left over of another training in the process does not end this one."""
    left = zoo.small()
    optimizers = [sgd(left), torch.optim.Adam(left.parameters())]
    model = zoo.small()
    optimizer = sgd(model)
    with gradwatch.watch_all(clip=1.0) as watching:
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    assert [watcher.last.step for watcher in watching.watchers if watcher.last] == [1]
    assert len(optimizers) == 2


def test_a_replaced_optimizer() -> None:
    """An optimizer that the program has dropped is none of two, be it that it lies in a cycle."""
    model = zoo.small()
    optimizer: torch.optim.Optimizer = sgd(model)
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    gc.disable()
    try:
        with gradwatch.watch_all(clip=1e-3) as watching:
            optimizer = torch.optim.Adam(model.parameters())
            model(torch.ones(2, 4)).sum().backward()
            optimizer.step()
    finally:
        gc.enable()
    assert [one.last.clipped for one in watching.watchers if one.last] == [True]


# -- frameworks ------------------------------------------------------------------------------------


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[..., type]:
    """Puts a class like that of a framework into a module of its name."""

    def make(home: str, name: str) -> type:
        module = ModuleType(home)
        kind = type(name, (), {"__init__": lambda self, **given: vars(self).update(given)})
        setattr(module, name, kind)
        monkeypatch.setitem(sys.modules, home, module)
        return kind

    return make


def hugging_face(kind: Any, model: Any, optimizer: Any, limit: Any) -> Any:
    """Makes a stand-in of a Trainer."""
    arguments = type("TrainingArguments", (), {"max_grad_norm": limit})()
    return kind(model=model, optimizer=optimizer, args=arguments)


def ultralytics(kind: Any, model: Any, optimizer: Any, limit: Any) -> Any:
    """Makes a stand-in of a DetectionTrainer."""
    return type("DetectionTrainer", (kind,), {})(model=model, optimizer=optimizer)


def torchtnt(kind: Any, model: Any, optimizer: Any, limit: Any) -> Any:
    """Makes a stand-in of an AutoUnit."""
    unit = type("MyUnit", (kind,), {})
    return unit(module=model, clip_grad_norm=None, clip_grad_value=limit)


def mmengine(kind: Any, model: Any, optimizer: Any, limit: Any) -> Any:
    """Makes a stand-in of an OptimWrapper."""
    return kind(optimizer=optimizer, clip_grad_kwargs=limit and {"max_norm": limit})


def stable_baselines(kind: Any, model: Any, optimizer: Any, limit: Any) -> Any:
    """Makes a stand-in of PPO."""
    return type("PPO", (kind,), {})(policy=model, max_grad_norm=limit)


def skorch(kind: Any, model: Any, optimizer: Any, limit: Any) -> Any:
    """Makes a stand-in of a regressor."""
    clipping = type("GradientNormClipping", (), {"gradient_clip_value": limit})
    return kind(module_=model, optimizer_=optimizer, callbacks_=[("clipping", clipping())])


def fastai(kind: Any, model: Any, optimizer: Any, limit: Any) -> Any:
    """Makes a stand-in of a callback of a Learner."""
    return kind(learn=SimpleNamespace(model=model), max_norm=limit)


def composer(kind: Any, model: Any, optimizer: Any, limit: Any) -> Any:
    """Makes a stand-in of the state of a Trainer."""
    clipping = type("GradientClipping", (), {"clipping_threshold": limit})
    return kind(model=model, optimizers=[optimizer], algorithms=[clipping()] if limit else [])


FRAMEWORKS = [
    (
        "transformers.trainer.Trainer",
        hugging_face,
        r"TrainingArguments\(max_grad_norm=0.5\) would both .* Sequential.* TrainingArguments\(max_grad_norm=0\)",
    ),
    (
        "ultralytics.engine.trainer.BaseTrainer",
        ultralytics,
        r"DetectionTrainer \(always at a norm of 10.0\) would both .* recorded all the same\.$",
    ),
    (
        "torchtnt.framework.auto_unit.AutoUnit",
        torchtnt,
        r"MyUnit\(clip_grad_value=0.5\) .* write MyUnit\(clip_grad_value=None\)",
    ),
    (
        "mmengine.optim.optimizer.optimizer_wrapper.OptimWrapper",
        mmengine,
        r"OptimWrapper\(clip_grad={'max_norm': 0.5}\) .* write OptimWrapper\(clip_grad=None\)",
    ),
    (
        "stable_baselines3.common.base_class.BaseAlgorithm",
        stable_baselines,
        r'PPO\(max_grad_norm=0.5\) .* write PPO\(max_grad_norm=float\("inf"\)\)',
    ),
    (
        "skorch.net.NeuralNet",
        skorch,
        r"GradientNormClipping\(gradient_clip_value=0.5\) .* or take that callback out of callbacks",
    ),
    (
        "fastai.callback.training.GradientClip",
        fastai,
        r"GradientClip\(max_norm=0.5\) .* or take that callback out of cbs",
    ),
    (
        "composer.core.state.State",
        composer,
        r"GradientClipping\(clipping_threshold=0.5\) .* or take it out of algorithms",
    ),
]
NEVER_OFF = (ultralytics, fastai)


@pytest.mark.parametrize(
    ("home", "make", "text"), FRAMEWORKS, ids=[f[1].__name__ for f in FRAMEWORKS]
)
class TestFrameworks:
    """Of each framework that clips by itself."""

    def test_refused(self, stand_in: Any, home: str, make: Any, text: str) -> None:
        """A second clip is refused, with the setting to change."""
        model = zoo.small()
        optimizer = sgd(model)
        trainer = make(stand_in(*home.rsplit(".", 1)), model, optimizer, 0.5)
        with pytest.raises(ValueError, match=text):
            refuse(model, optimizer, clip=2.0)
        del trainer

    def test_allowed(self, stand_in: Any, home: str, make: Any, text: str) -> None:
        """Everything else is allowed: steps may be skipped, and another model be clipped."""
        model, other = zoo.small(), zoo.small()
        optimizer = sgd(model)
        trainer = make(stand_in(*home.rsplit(".", 1)), model, optimizer, 0.5)
        refuse(model, optimizer, on_nonfinite="explain", skip_spikes="auto")
        refuse(other, sgd(other), clip=2.0)
        del trainer

    def test_off(self, stand_in: Any, home: str, make: Any, text: str) -> None:
        """A framework that was told not to clip is none."""
        model = zoo.small()
        optimizer = sgd(model)
        trainer = make(stand_in(*home.rsplit(".", 1)), model, optimizer, None)
        if make not in NEVER_OFF:
            refuse(model, optimizer, clip=2.0)
        del trainer


def test_half_built(stand_in: Any) -> None:
    """A framework's object that is not as expected is passed over."""
    model = zoo.small()
    trainer = stand_in("transformers.trainer", "Trainer")()
    refuse(model, sgd(model), clip=1.0)
    trainer.model, trainer.optimizer = model, None
    refuse(model, sgd(model), clip=1.0)


@pytest.mark.parametrize("options", ACTING, ids=str)
def test_deepspeed(stand_in: Any, options: dict[str, Any]) -> None:
    """Under DeepSpeed nothing can act, as it steps flat copies of the weights."""
    model = zoo.small()
    inner = sgd(nn.Linear(3, 3))
    kind = stand_in("deepspeed.runtime.engine", "DeepSpeedEngine")
    engine = kind(module=model, basic_optimizer=inner)
    for watched, optimizer in ((model, sgd(model)), (nn.ParameterList(), inner)):
        with pytest.raises(ValueError, match=r"Set gradient_clipping .*Leave "):
            refuse(watched, optimizer, **options)
    refuse(model, inner)
    del engine


@pytest.mark.parametrize("options", ACTING, ids=str)
def test_a_stage_of_a_pipeline(stand_in: Any, options: dict[str, Any]) -> None:
    """On a stage of a pipeline nothing can act, as each would act by itself."""
    model = zoo.small()
    stage = stand_in("torch.distributed.pipelining.stage", "_PipelineStageBase")(submod=model)
    with pytest.raises(ValueError, match=r"for Sequential\. The model is a stage of a pipeline"):
        refuse(model, sgd(model), **options)
    del stage


@pytest.mark.parametrize("options", ACTING, ids=str)
def test_steps_inside_the_backward(options: dict[str, Any]) -> None:
    """Optimizers that step inside the backward cannot act, and move no weight before the error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch's own import of torch.jit
        from torch.distributed.optim import _apply_optimizer_in_backward
        from torch.distributed.optim.apply_optimizer_in_backward import (
            param_to_optim_hook_handle_map,
        )

    model = zoo.small()
    before = copy.deepcopy(model.state_dict())
    with gradwatch.watch_all(**options):
        _apply_optimizer_in_backward(torch.optim.SGD, model.parameters(), {"lr": 0.1})
        loss = model(torch.ones(2, 4)).sum()
        with pytest.raises(ValueError, match="inside the backward"):
            loss.backward()
    for parameter in model.parameters():  # torch would keep them for the tests that follow
        for handle in param_to_optim_hook_handle_map[parameter]:
            handle.remove()
        del parameter._in_backward_optimizers
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_an_optimizer_that_clips() -> None:
    """An optimizer that clips all gradients inside of its step, as LAMB does, is a second clip."""
    model = zoo.small()
    optimizer = sgd(model)
    refuse(model, optimizer, clip=1.0)
    optimizer.param_groups[0]["max_grad_norm"] = 1.0
    with pytest.raises(ValueError, match=r"SGD\(max_grad_norm=1.0\) would both"):
        refuse(model, optimizer, clip=1.0)
    refuse(model, optimizer, on_nonfinite="skip")
