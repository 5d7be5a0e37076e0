"""Acting options are refused where they could not be honest, before the first step.

``clip``, ``on_nonfinite`` and ``skip_spikes`` change a training, and its records say what they have
changed. Both only hold as long as nobody else clips the same gradients, or steps with them. In a
loop of one's own that is plain to see; here the loop is a program's or a framework's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, combinations
from typing import Any, NamedTuple

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from gradwatch.clip.policy import ClipPolicy
from gradwatch.hooks.data_parallel import is_distributed, wrappers_that_hold
from gradwatch.hooks.engines import engines_of, instances_of_named, trains_any
from gradwatch.hooks.exchange import settle_copies
from gradwatch.measure.parameters import optimizer_parameters
from gradwatch.options import Options
from gradwatch.record.events import counted_names

SHARED = (
    "{asked} cannot be had where two optimizers hold the same parameters: {first} and {second} of "
    "{model} share {shared}, so each would clip or skip gradients that the other one steps with "
    "as well. Give each optimizer parameters of its own, or leave {leave} out: watching alone "
    "works with both."
)
CLIPS_TOO = (
    "{asked} and {setting} would both clip the gradients of {model}: the second clip would act on "
    "what the first has left, and the recorded coefficient would be the product of both. Keep "
    "one: leave {leave} out to keep the clip of {framework}, whose norms before and after are "
    "recorded all the same{remedy}."
)
TO_KEEP_OURS = ", or {remedy} to keep that of gradwatch"
BY_ENGINE = "{asked} cannot be had for {model}. {reason} Leave {leave} out: watching alone works."
UNWATCHED_RANKS = (
    "{asked} cannot be had on some ranks only: ranks {{ranks}} hold copies of {model}, "
    "which stay alike only if all of them do the same, but {{missing}} did not begin to watch "
    "within {{seconds:g}} s of rank {{rank}}. Start every rank under gradwatch, `torchrun "
    "--nproc-per-node N -m gradwatch run ...`, if the program starts the other ranks by itself; or "
    "leave {leave} out: watching alone works."
)


def refuse_dishonest(
    options: Options, optimizers: Sequence[Optimizer], model: nn.Module | Mapping[str, Tensor]
) -> None:
    """Refuses options that change the training where their effect would not be what they say.

    To be called when the forward of the first step has run: frameworks are built by then. They are
    recognized by their objects in this process, and never imported.

    Args:
        options: The checked options. If none of them acts, nothing is refused.
        optimizers: The optimizers of the model that are about to be watched.
        model: The model, or its parameters by name.

    Raises:
        ValueError: If two optimizers hold the same parameters, neither inside of the other; if an
            engine reduces, clips or steps where ``.grad`` does not show it; if ``clip`` is asked
            for, and a framework or an optimizer clips as well. The text says which setting to
            change.
        RuntimeError: If another rank with a copy of the model is not watched, or acts otherwise.
    """
    if not options.acts:
        return
    # By name: shared parameters are told by it.
    named = dict(model.named_parameters() if isinstance(model, nn.Module) else model)
    called = type(model).__name__ if isinstance(model, nn.Module) else "the model"
    text = _of_shared(options, optimizers, named, called)
    held = [parameter for one in optimizers for parameter in optimizer_parameters(one)]
    parameters = [*named.values(), *held]
    if not text:
        reason = next(iter(engines_of(parameters)), "")
        text = reason and BY_ENGINE.format(
            asked=_asked(options), leave=_leave(options), model=called, reason=reason
        )
    if not text and options.clip is not None:
        text = _of_two_clips(options.clip, optimizers, set(map(id, parameters)), called)
    if text:
        raise ValueError(text)
    _settle_with_other_ranks(options, parameters, called)


def _settle_with_other_ranks(options: Options, parameters: Sequence[Tensor], called: str) -> None:
    """Refuses to act on some copies of a model only: they would no longer be alike."""
    # Shards are settled when their watcher is attached, whether it acts or not.
    if not is_distributed():
        return
    asked = {name: text for name, text in options.on_all_ranks.items() if name in _OF_COPIES}
    written = _asked(options).replace("{", "{{").replace("}", "}}")
    missing = UNWATCHED_RANKS.format(asked=written, leave=_leave(options), model=called)
    for wrapper in wrappers_that_hold(parameters):
        settle_copies(dist.get_process_group_ranks(wrapper.process_group), asked, missing)


def _of_shared(
    options: Options, optimizers: Sequence[Optimizer], named: Mapping[str, Tensor], called: str
) -> str:
    shared = _first_shared(optimizers)
    if shared is None:
        return ""
    first, second, keys = shared
    names = [name for name, parameter in named.items() if id(parameter) in keys]
    return SHARED.format(
        asked=_asked(options),
        leave=_leave(options),
        first=first,
        second=second,
        model=called,
        shared=counted_names(names) if names else f"{len(keys)} parameters",
    )


def _of_two_clips(
    clip: ClipPolicy, optimizers: Sequence[Optimizer], wanted: set[int], called: str
) -> str:
    other = next(chain(_clips_inside(optimizers), _clips_of_frameworks(wanted)), None)
    if other is None:
        return ""
    return CLIPS_TOO.format(
        asked=f"clip={clip!r}",
        leave=_OPTIONS["clip="],
        setting=other.setting,
        model=called,
        framework=other.framework,
        remedy=TO_KEEP_OURS.format(remedy=other.remedy) if other.remedy else "",
    )


# The acting options: as arguments, and as options of the command.
_OPTIONS = {
    "clip=": "clip= (--clip)",
    "on_nonfinite=": "on_nonfinite= (--on-nonfinite)",
    "skip_spikes=": "skip_spikes=",
}
_OF_COPIES = ("clip", "on_nonfinite", "skip_spikes")


def _leave(options: Options) -> str:
    """Names the acting options, without their values."""
    return " and ".join(_OPTIONS.get(argument, argument) for argument in options.acting)


def _asked(options: Options) -> str:
    """Names the acting options, as they were written."""
    how = "explain" if options.explain and options.on_nonfinite == "skip" else options.on_nonfinite
    written = {
        "clip=": f"clip={options.clip!r}",
        "on_nonfinite=": f'on_nonfinite="{how}"',
        "skip_spikes=": f"skip_spikes={options.skip_spikes}",
    }
    return " and ".join(written.get(argument, argument) for argument in options.acting)


# -- two optimizers with the same parameters -------------------------------------------------------


def _first_shared(optimizers: Sequence[Optimizer]) -> tuple[str, str, set[int]] | None:
    """Finds two optimizers that hold the same parameters, neither inside of the other.

    Returns:
        Their classes, and the ids of the parameters that they share; None if there are none.
    """
    held = [list(map(id, optimizer_parameters(one))) for one in optimizers]
    if len(set().union(*held)) == sum(map(len, held)):
        return None
    for (first, mine), (second, others) in combinations(zip(optimizers, held, strict=True), 2):
        both = set(mine).intersection(others)
        if both and not _holds(first, second) and not _holds(second, first):
            return type(first).__name__, type(second).__name__, both
    return None


def _holds(outer: Optimizer, inner: Optimizer) -> bool:
    """Returns whether an optimizer has another one, as an attribute or in a list or dict of it."""
    found, waiting = {id(outer)}, [outer]
    while waiting:
        for value in list(vars(waiting.pop()).values()):
            several = value.values() if isinstance(value, dict) else value
            several = list(several) if isinstance(value, (dict, list, tuple)) else [value]
            inside = [o for o in several if isinstance(o, Optimizer) and id(o) not in found]
            found.update(map(id, inside))
            waiting += inside
    return id(inner) in found


# -- who else clips --------------------------------------------------------------------------------


class _Clip(NamedTuple):
    """A clip that is not gradwatch's.

    Attributes:
        framework: Whose clip it is, in words.
        setting: How it was asked for, as written in the program.
        remedy: What to do to be rid of it, as an imperative; empty if nothing can be done.
    """

    framework: str
    setting: str
    remedy: str


class _Framework(NamedTuple):
    """How to recognize a framework that clips by itself.

    Attributes:
        homes: The modules that define its class, over its versions and names.
        name: The class, of whose objects, and those of derived classes, there is one per training.
        trains: Returns the modules and optimizers that an object trains. May raise.
        clip: Returns its clip; None if it does not clip. May raise.
    """

    homes: tuple[str, ...]
    name: str
    trains: Callable[[Any], Iterable[object]]
    clip: Callable[[Any], _Clip | None]


def _limits(value: object) -> bool:
    """Returns whether a setting is a limit: frameworks take None, 0 or inf for none."""
    return bool(value) and value != math.inf


def _setting(owner: str, name: str, off: str, value: object, framework: str = "") -> _Clip | None:
    """Returns the clip by an argument ``owner(name=value)`` that the value ``off`` turns off."""
    if not _limits(value):
        return None
    by = framework or f"the {owner}"
    return _Clip(by, f"{owner}({name}={value!r})", f"write {owner}({name}={off})")


def _of_hugging_face(trainer: Any) -> _Clip | None:
    value, kind = trainer.args.max_grad_norm, type(trainer.args).__name__
    return _setting(kind, "max_grad_norm", "0", value, f"Hugging Face's {type(trainer).__name__}")


def _of_lightning(trainer: Any) -> _Clip | None:
    if trainer.gradient_clip_val:
        setting = f"Trainer(gradient_clip_val={trainer.gradient_clip_val!r})"
        return _Clip("Lightning", setting, "remove gradient_clip_val")
    # The method that Lightning calls before each step; of the framework itself, it does nothing
    # without the setting above.
    method = "configure_gradient_clipping"
    kind = type(trainer.lightning_module)
    home = next(one.__module__ for one in kind.__mro__ if method in vars(one))
    if home.startswith(("lightning.", "pytorch_lightning.")):
        return None
    return _Clip("Lightning", f"{kind.__name__}.{method}()", "remove that method")


def _of_ultralytics(trainer: Any) -> _Clip:
    # In the code of optimizer_step() of its BaseTrainer: no argument sets it.
    return _Clip("ultralytics", f"{type(trainer).__name__} (always at a norm of 10.0)", "")


def _of_torchtnt(unit: Any) -> _Clip | None:
    name = "clip_grad_norm" if _limits(unit.clip_grad_norm) else "clip_grad_value"
    return _setting(type(unit).__name__, name, "None", getattr(unit, name))


def _of_mmengine(wrapper: Any) -> _Clip | None:
    return _setting(type(wrapper).__name__, "clip_grad", "None", wrapper.clip_grad_kwargs)


def _of_stable_baselines(algorithm: Any) -> _Clip | None:
    value = getattr(algorithm, "max_grad_norm", None)  # off-policy algorithms mostly have none
    return _setting(type(algorithm).__name__, "max_grad_norm", 'float("inf")', value)


def _of_fastai(callback: Any) -> _Clip:
    setting = f"GradientClip(max_norm={callback.max_norm!r})"
    return _Clip("fastai", setting, "take that callback out of cbs")


def _of_composer(state: Any) -> _Clip | None:
    clips = [one for one in state.algorithms if type(one).__name__ == "GradientClipping"]
    settings = [f"GradientClipping(clipping_threshold={one.clipping_threshold!r})" for one in clips]
    return _Clip("Composer", settings[0], "take it out of algorithms") if settings else None


def _of_skorch(net: Any) -> _Clip | None:
    name, kind = "gradient_clip_value", "GradientNormClipping"
    limits = [getattr(one, name, None) for _, one in net.callbacks_ if type(one).__name__ == kind]
    used = [limit for limit in limits if _limits(limit)]
    setting = f"{kind}({name}={used[0]!r})" if used else ""
    return _Clip("skorch", setting, "take that callback out of callbacks") if used else None


_FRAMEWORKS = (
    _Framework(
        # transformers 4 and 5, and the trainers derived from it (trl, sentence-transformers, ...)
        ("transformers.trainer",),
        "Trainer",
        lambda trainer: (trainer.model, trainer.optimizer),
        _of_hugging_face,
    ),
    _Framework(
        # Lightning 2, by either of its names
        ("lightning.pytorch.trainer.trainer", "pytorch_lightning.trainer.trainer"),
        "Trainer",
        lambda trainer: (trainer.lightning_module, *trainer.optimizers),
        _of_lightning,
    ),
    _Framework(
        # ultralytics 8
        ("ultralytics.engine.trainer",),
        "BaseTrainer",
        lambda trainer: (trainer.model, trainer.optimizer),
        _of_ultralytics,
    ),
    _Framework(
        ("torchtnt.framework.auto_unit",),
        "AutoUnit",
        lambda unit: (unit.module,),
        _of_torchtnt,
    ),
    _Framework(
        # mmengine, on which mmdetection and its siblings are built
        ("mmengine.optim.optimizer.optimizer_wrapper",),
        "OptimWrapper",
        lambda wrapper: (wrapper.optimizer,),
        _of_mmengine,
    ),
    _Framework(
        ("stable_baselines3.common.base_class",),
        "BaseAlgorithm",
        lambda algorithm: (algorithm.policy,),
        _of_stable_baselines,
    ),
    _Framework(
        ("skorch.net",),
        "NeuralNet",
        lambda net: (net.module_, net.optimizer_),
        _of_skorch,
    ),
    _Framework(
        ("fastai.callback.training",),
        "GradientClip",
        lambda callback: (callback.learn.model,),
        _of_fastai,
    ),
    _Framework(
        ("composer.core.state",),
        "State",
        lambda state: (state.model, *state.optimizers),
        _of_composer,
    ),
)


def _clips_inside(optimizers: Iterable[Optimizer]) -> Iterator[_Clip]:
    """Yields the clips of optimizers that clip all gradients in their step, as those of LAMB do."""
    for one in optimizers:
        for group in one.param_groups:
            clip = _setting(type(one).__name__, "max_grad_norm", "None", group.get("max_grad_norm"))
            if clip is not None:
                yield clip


def _clips_of_frameworks(wanted: set[int]) -> Iterator[_Clip]:
    for framework in _FRAMEWORKS:
        for one in instances_of_named((home, framework.name) for home in framework.homes):
            if trains_any(wanted, framework.trains, one):
                try:
                    clip = framework.clip(one)
                except Exception:  # of a version that has the setting elsewhere: not known to clip
                    clip = None
                if clip is not None:
                    yield clip
