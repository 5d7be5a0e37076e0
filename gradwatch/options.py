"""The arguments of ``watch()``: checked once, before the first step."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import InitVar, dataclass, fields
from functools import partial
from typing import Any, TypedDict, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from gradwatch.accumulate.policies import AccumulatePolicy, accumulate_policy
from gradwatch.checks import check_positive, described, shown
from gradwatch.clip.fixed import ClipByNorm, ClipByValue
from gradwatch.clip.policy import ClipPolicy, check_policy
from gradwatch.clip.robust import RobustClip
from gradwatch.clip.spikes import AUTO_Z
from gradwatch.contracts import Contract
from gradwatch.hessian.every import CurvatureEvery
from gradwatch.hooks.backward import ask_to_give_way, is_watched
from gradwatch.hooks.data_parallel import refuse_fsdp1, reshard
from gradwatch.hooks.optimizer import is_wrapper, parameters_held, parts_of, stepped_by
from gradwatch.measure.parameters import ParameterTable
from gradwatch.measure.statistics import STATISTICS
from gradwatch.pickles import stable_name
from gradwatch.record.records import DELIVERIES, Sink

Accumulate = int | str | Mapping[int, int] | Callable[[int], int] | AccumulatePolicy
"""The type of ``watch(accumulate=)``."""

Optimizers = Optimizer | Sequence[Optimizer] | Mapping[str, Optimizer] | None
"""The type of ``watch(optimizer=)``."""

ON_NONFINITE = ("record", "skip", "raise", "explain")


class SharedOptions(TypedDict, total=False):
    """The options of :func:`gradwatch.watch` that an adapter accepts as ``**options``.

    ``accumulate`` and ``scaler`` are missing because the framework decides them.
    """

    clip: float | str | ClipPolicy | None
    on_nonfinite: str
    statistics: Iterable[str]
    every: int
    buffer_size: int
    sinks: Iterable[Sink]
    run_dir: str | os.PathLike[str] | None
    exploding_norm: float | None
    skip_spikes: float | str | None
    max_consecutive_skips: int
    curvature: CurvatureEvery | None
    explain: bool
    keep_batches: bool


@stable_name
@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The checked options of :func:`gradwatch.watch`, which documents each of them.

    Arguments are passed as the user wrote them and stored in normalized form: ``clip=1.0`` becomes
    ``ClipByNorm(1.0)``, and ``on_nonfinite="explain"`` becomes ``"skip"`` with ``explain=True``.
    Error messages name the function given as ``caller``.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of bounds.
    """

    # Run folders store the options in the order of these fields.
    clip: ClipPolicy | None
    accumulate: AccumulatePolicy
    on_nonfinite: str
    statistics: tuple[str, ...]
    every: int
    buffer_size: int
    scaler: torch.amp.GradScaler | None = None
    sinks: tuple[Sink, ...]
    run_dir: str | None
    exploding_norm: float | None
    skip_spikes: float | None
    max_consecutive_skips: int
    curvature: CurvatureEvery | None
    explain: bool = False
    keep_batches: bool = False
    caller: InitVar[str] = "watch"

    @classmethod
    def of(cls, arguments: Mapping[str, Any], caller: str = "watch") -> Options:
        """Makes options from the arguments of a call.

        Args:
            arguments: Arguments by name, for example ``locals()``. Names that are not options are
                ignored.
            caller: The function that the user called, for error messages.
        """
        names = [field.name for field in fields(cls) if field.name in arguments]
        return cls(**{name: arguments[name] for name in names}, caller=caller)

    def __post_init__(self, caller: str) -> None:
        for name, check in CHECKS.items():
            checked = check(f"{caller}({name}=)", getattr(self, name))
            object.__setattr__(self, name, checked)  # a frozen dataclass refuses plain assignment
        if self.on_nonfinite == "explain":
            object.__setattr__(self, "on_nonfinite", "skip")
            object.__setattr__(self, "explain", True)
        if self.keep_batches and not self.explain:
            raise ValueError(BATCHES_UNEXPLAINED.format(caller=caller))
        if self.keep_batches and self.run_dir is None:
            raise ValueError(BATCHES_NOWHERE.format(caller=caller))

    @property
    def acts(self) -> bool:
        """Whether gradwatch may change the training, rather than only watch it."""
        return bool(self.acting)

    @property
    def acting(self) -> list[str]:
        """The arguments that make gradwatch change the training at an optimizer step."""
        asked = {
            "clip=": self.clip is not None,
            "accumulate=": self.accumulate.most != 1,
            "on_nonfinite=": self.on_nonfinite != "record",
            "skip_spikes=": self.skip_spikes is not None,
        }
        return [argument for argument, wanted in asked.items() if wanted]

    @property
    def on_all_ranks(self) -> dict[str, str]:
        """What ranks that hold parts of the same parameters must ask for alike, as written."""
        clip = repr(self.clip)
        return {
            # A policy of the user's own may show where it is in memory.
            "clip": type(self.clip).__name__ if " at 0x" in clip else clip,
            "accumulate": str(self.accumulate.most != 1),
            "on_nonfinite": repr(self.on_nonfinite),
            "skip_spikes": str(self.skip_spikes),
            "statistics": repr(list(self.statistics)),
            "every": str(self.every),
        }

    @property
    def of_steps(self) -> list[str]:
        """The requested options that need the step of an optimizer."""
        names = [n for n in self.statistics if n != "norm" and STATISTICS[n].weights]
        asked = [f"statistics={names}"] if names else []
        return asked + ["curvature="] * (self.curvature is not None)

    @property
    def deciding(self) -> dict[str, str]:
        """The options that need all gradients of a step at once, each with its text for errors."""
        texts = {
            "clip": f"Clipping by the global norm (clip={self.clip!r})",
            "accumulate": f"accumulate={self.accumulate}",
            "on_nonfinite": f'on_nonfinite="{self.on_nonfinite}"',
            "skip_spikes": f"skip_spikes={self.skip_spikes}",
        }
        if isinstance(self.clip, ClipByValue):  # it clips each element on its own
            del texts["clip"]
        return {name: text for name, text in texts.items() if f"{name}=" in self.acting}


def _restore(self: Options, state: Sequence[Any]) -> None:
    """Restores options from a pickle; one of an earlier version has not all of the fields."""
    newer = [field.default for field in fields(Options)[len(state) :]]
    for field, value in zip(fields(Options), [*state, *newer], strict=True):
        object.__setattr__(self, field.name, value)


# Not in the class, as the decorator of Python 3.10 puts its own method in the place of that one.
Options.__setstate__ = _restore  # type: ignore[attr-defined]

CLIP_ADVICE = (
    ' Write clip=1.0 to clip by the global L2 norm, clip="auto" to let gradwatch find the limit, '
    "or clip=ClipByNorm(1.0, norm_type=...) or clip=ClipByValue(...)."
)
CURVATURE_ADVICE = (
    " Write curvature=CurvatureEvery(200, lambda: criterion(model(x), y)), or "
    "gradwatch.curvature(model, loss) to take it once."
)
BATCHES_UNEXPLAINED = (
    "{caller}(keep_batches=True) keeps the micro-batches of steps that are explained, and nothing "
    'is: write on_nonfinite="explain", or explain=True, beside it.'
)
BATCHES_NOWHERE = (
    "{caller}(keep_batches=True) keeps micro-batches in the run folder, and there is none: write "
    'run_dir="runs/a" beside it.'
)
NOT_A_MODEL = (
    "watch(model=) got {value}. Write watch(model) with the torch.nn.Module, or a mapping "
    'from names to leaf tensors: watch({{"x": x}}).{several}'
)
NOT_A_LEAF = (
    'watch(model=) got "{name}", which is the result of an operation, so backward() sets no .grad '
    "on it. Pass the leaf tensors that it was computed from."
)
LAZY = (
    'watch(model=) got "{name}", a lazy parameter that has no shape yet. Run one forward pass of '
    "the model before watching it."
)
NOTHING_TO_WATCH = (
    "watch(model=) got {what}, in which no tensor requires a gradient: there is nothing to watch. "
    "Unfreeze a parameter (requires_grad_(True)) before watching."
)
WATCHED_ALREADY = (
    'watch() was given "{name}", which another watcher is attached to. Leave the with block of '
    "that watcher (or call its close()) first."
)
NO_OPTIMIZER = (
    "watch(optimizer=) is empty, got {value}. Leave it out to have the optimizers found "
    "at their first step."
)
OVERLAPPING = (
    "watch(optimizer=) got a {optimizer} with overlap_with_ddp=True, which steps during the "
    "reduction of the gradients, where they cannot be measured. Build it without that argument."
)
NOT_A_NAME = (
    "watch(optimizer=) takes names that are strings, got {value} as a key. Write "
    'watch(model, {{"muon": ..., "adamw": ...}}).'
)
NO_NAME = (
    "watch(optimizer=) got {value} as a name. It is the label in every record: write one that says "
    'which optimizer it is, such as {{"muon": ..., "adamw": ...}}.'
)
RESERVED_NAME = (
    'watch(optimizer=) got the name "none", which stands for backwards that no optimizer steps. '
    "Write another one."
)
SEVERAL_IN_ONE = (
    "watch(optimizer=) got a {optimizer} that holds {parts} optimizers, which step by themselves. "
    "Give each of them a name of its own."
)
FOREIGN_PARAMETERS = (
    "{optimizer} holds {foreign} of {total} parameters that are not the model's, so its gradient "
    "norm cannot be computed over the model. Pass everything that it updates, "
    "watch(nn.ModuleList([model, ...]), optimizer), or build the optimizer after the model was "
    "moved or wrapped."
)


def _must_be(name: str, wanted: str, value: object, advice: str = "") -> str:
    return f"{name} must be {wanted}, got {described(value)}.{advice}"


def _limit(name: str, value: float | None) -> float | None:
    if value is not None:
        check_positive(name, value)
    return value


def _scaler(name: str, value: object) -> torch.amp.GradScaler | None:
    if value is None or isinstance(value, torch.amp.GradScaler):
        return value
    raise TypeError(_must_be(name, "a torch.amp.GradScaler", value))


def _clip_policy(name: str, clip: object) -> ClipPolicy | None:
    if clip is None:
        return None
    if isinstance(clip, str) and clip == "auto":
        return RobustClip()
    if isinstance(clip, (int, float)) and not isinstance(clip, bool):
        check_positive(name, clip)
        return ClipByNorm(float(clip))
    # clip=ClipByNorm, without parentheses, is a class; it has the methods of a policy too.
    if isinstance(clip, type) or not hasattr(clip, "decide"):
        wanted = 'a positive number, "auto" or a clipping policy'
        raise (ValueError if isinstance(clip, str) else TypeError)(
            _must_be(name, wanted, clip, CLIP_ADVICE)
        )
    check_policy(name, clip)
    return cast(ClipPolicy, clip)


def _choice(name: str, value: object, choices: tuple[str, ...]) -> str:
    if not isinstance(value, str):
        raise TypeError(_must_be(name, f"one of {choices}", value))
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {shown(value)}.")
    return value


def _flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(_must_be(name, "True or False", value))
    return value


def _statistics(name: str, names: object) -> tuple[str, ...]:
    # A string is also a sequence of names: "max" would request m, a and x.
    if isinstance(names, str) or not isinstance(names, Iterable):
        advice = ' Write statistics=("norm", "max"), for instance.'
        raise TypeError(_must_be(name, "a sequence of names", names, advice))
    known = ("norm", *STATISTICS)
    return tuple(_choice(name, statistic, known) for statistic in names)


def _positive_int(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):  # True is an int in Python
        raise TypeError(_must_be(name, "an integer of at least 1", value))
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {shown(value)}.")
    return value


def _sinks(name: str, sinks: object) -> tuple[Sink, ...]:
    if isinstance(sinks, Sink):
        raise TypeError(
            f"{name} must be a sequence of sinks, got one {type(sinks).__name__}. "
            "Write sinks=[...] around it."
        )
    if isinstance(sinks, str) or not isinstance(sinks, Iterable):
        raise TypeError(_must_be(name, "a sequence of sinks", sinks))
    chosen = tuple(sinks)
    for sink in chosen:
        # Not isinstance(sink, Sink): a protocol accepts a `write` attribute that is not callable.
        methods = (getattr(sink, name, None) for name in ("write", "close"))
        if isinstance(sink, type) or not all(map(callable, methods)):
            raise TypeError(
                f"{name} takes objects with the methods write(batch) and close(), got "
                f"{described(sink)}."
            )
        contract = Contract(name, sink, "a sink")
        contract.takes("write", "(batch)")
        contract.takes("close", "()")
        if callable(getattr(sink, "attached", None)):
            contract.takes("attached", "(watcher)")
        # Whatever else is called so is of no concern of ours: a method, say.
        deliver = getattr(sink, "deliver", None)
        if isinstance(deliver, str):
            _choice(f"{name} got a {type(sink).__name__} whose deliver", deliver, DELIVERIES)
    return chosen


def _folder(name: str, value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str):
        advice = ' Write run_dir="runs/a".'
        raise TypeError(_must_be(name, "a folder (str or PathLike) or None", value, advice))
    if not os.fspath(value):
        raise ValueError(f'{name} must name a folder, got an empty path. Write run_dir="runs/a".')
    return str(os.fspath(value))


def _spike_z(name: str, value: object) -> float | None:
    if value is None:
        return None
    if value == "auto":
        return AUTO_Z
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        wanted = 'None, "auto" or a positive number of deviations'
        raise (ValueError if isinstance(value, str) else TypeError)(_must_be(name, wanted, value))
    check_positive(name, value)
    return float(value)


def _curvature(name: str, value: object) -> CurvatureEvery | None:
    if value is None or isinstance(value, CurvatureEvery):
        return value
    raise TypeError(_must_be(name, "a CurvatureEvery or None", value, CURVATURE_ADVICE))


CHECKS: dict[str, Callable[[str, Any], object]] = {
    "exploding_norm": _limit,
    "scaler": _scaler,
    "clip": _clip_policy,
    "accumulate": accumulate_policy,
    "on_nonfinite": partial(_choice, choices=ON_NONFINITE),
    "statistics": _statistics,
    "every": _positive_int,
    "buffer_size": _positive_int,
    "sinks": _sinks,
    "run_dir": _folder,
    "skip_spikes": _spike_z,
    "max_consecutive_skips": _positive_int,
    "curvature": _curvature,
    "explain": _flag,
    "keep_batches": _flag,
}
"""By name what checks an option, and returns what it stands for.

The order decides which of two mistakes is reported first. Each check must accept its own result,
because ``dataclasses.replace`` runs all of them again.
"""


def parameter_table(model: nn.Module | Mapping[str, Tensor]) -> ParameterTable:
    """Lists the tensors to watch.

    Args:
        model: A module, or a mapping from names to leaf tensors.

    Raises:
        TypeError: If the model, a name or a tensor has the wrong type.
        ValueError: If a tensor is not a leaf or has no shape yet, if no tensor requires a gradient,
            or if the model uses FSDP1, which hides the parameters.
    """
    if not isinstance(model, (nn.Module, Mapping)):
        raise TypeError(NOT_A_MODEL.format(value=described(model), several=_several(model)))
    if isinstance(model, Mapping):
        for name, tensor in model.items():
            _check_entry(name, tensor)
    refuse_fsdp1(model)
    # Before the parameters are listed: after a forward, an FSDP2 module may hold unsharded
    # parameters, but the optimizer holds the shards.
    reshard(model)
    table = ParameterTable.of(model)
    for name, tensor in zip(table.names, table.tensors, strict=True):
        if is_lazy(tensor):
            raise ValueError(LAZY.format(name=name))
    if not any(tensor.requires_grad for tensor in table.tensors):
        what = type(model).__name__ if isinstance(model, nn.Module) else shown(list(model))
        raise ValueError(NOTHING_TO_WATCH.format(what=what))
    return table


def _several(model: object) -> str:
    if isinstance(model, (list, tuple)) and any(isinstance(one, nn.Module) for one in model):
        return " Several modules: watch(torch.nn.ModuleList([first, second]))."
    return ""


def _check_entry(name: object, tensor: object) -> None:
    if not isinstance(name, str):
        raise TypeError(f"watch(model=) takes names that are strings, got {shown(name)} as a key.")
    if not isinstance(tensor, torch.Tensor):
        module = " Put modules into a torch.nn.ModuleDict." if isinstance(tensor, nn.Module) else ""
        raise TypeError(
            f'watch(model=) takes leaf tensors, got {described(tensor)} under "{name}".{module}'
        )
    if not tensor.is_leaf:
        raise ValueError(NOT_A_LEAF.format(name=name))


def check_unwatched(table: ParameterTable) -> None:
    """Refuses a model that is already watched.

    Raises:
        RuntimeError: If another watcher is attached to one of the tensors.
    """
    if any(map(is_watched, table.tensors)):
        ask_to_give_way(table.tensors)
    for name, tensor in zip(table.names, table.tensors, strict=True):
        if is_watched(tensor):
            raise RuntimeError(WATCHED_ALREADY.format(name=name))


def optimizer_names(optimizer: object) -> list[str]:
    """Lists the names that the user gave to the optimizers; empty if they were not given any.

    Raises:
        TypeError: If a name is not a string.
        ValueError: If a name is empty, or is "none".
    """
    if not isinstance(optimizer, Mapping):
        return []
    for name in optimizer:
        if not isinstance(name, str):
            raise TypeError(NOT_A_NAME.format(value=shown(name)))
        if not name.strip():
            raise ValueError(NO_NAME.format(value=shown(name)))
        if name == "none":
            raise ValueError(RESERVED_NAME)
    return list(optimizer)


def optimizer_list(optimizer: Optimizers, table: ParameterTable) -> list[Optimizer]:
    """Lists the optimizers to watch; an empty list for None, to find them at their first step.

    Raises:
        TypeError: If an entry is not an optimizer.
        ValueError: If the sequence or mapping is empty, holds an optimizer twice, or holds one with
            ``overlap_with_ddp=True`` or with parameters that are not watched.
    """
    if optimizer is None:
        return []
    wanted = "a torch.optim.Optimizer, a sequence of them or a mapping from names to them"
    given: object = [optimizer] if _is_optimizer(optimizer) else optimizer
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(_must_be("watch(optimizer=)", wanted, given))
    optimizers: list[Optimizer] = []
    for one in given.values() if isinstance(given, Mapping) else given:
        if not _is_optimizer(one):
            raise TypeError(_must_be("watch(optimizer=)", wanted, one))
        # A wrapper that torch's step hooks do not see, and whose parts step by themselves.
        parts = [one] if stepped_by(one) else parts_of(one)
        if len(parts) > 1 and isinstance(given, Mapping):
            raise ValueError(SEVERAL_IN_ONE.format(optimizer=type(one).__name__, parts=len(parts)))
        optimizers += parts
    if not optimizers:
        raise ValueError(NO_OPTIMIZER.format(value=shown(given)))
    for position, one in enumerate(optimizers):
        if getattr(one, "_overlap_with_ddp", False):  # ZeroRedundancyOptimizer's private flag
            raise ValueError(OVERLAPPING.format(optimizer=type(one).__name__))
        # By identity: `in` compares with ==, which an optimizer may define for itself.
        if any(one is earlier for earlier in optimizers[:position]):
            raise ValueError(f"watch(optimizer=) holds the same {type(one).__name__} twice.")
        _check_parameters(one, table)
    return optimizers


def _is_optimizer(value: object) -> bool:
    return isinstance(value, Optimizer) or is_wrapper(value)


def _check_parameters(optimizer: Optimizer, table: ParameterTable) -> None:
    known = table.positions()
    parameters = parameters_held(optimizer)
    foreign = sum(id(parameter) not in known for parameter in parameters)
    if foreign:
        raise ValueError(
            FOREIGN_PARAMETERS.format(
                optimizer=type(optimizer).__name__, foreign=foreign, total=len(parameters)
            )
        )
