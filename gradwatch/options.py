"""What ``watch()`` was asked for and what is watched, checked once, before the first step."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from gradwatch.accumulate.policies import AccumulatePolicy, accumulate_policy
from gradwatch.checks import check_positive
from gradwatch.clip.fixed import ClipByNorm, ClipByValue
from gradwatch.clip.policy import ClipPolicy
from gradwatch.clip.robust import RobustClip
from gradwatch.hessian.every import CurvatureEvery
from gradwatch.hooks.backward import is_watched
from gradwatch.hooks.data_parallel import refuse_fsdp1, reshard
from gradwatch.measure.parameters import ParameterTable, optimizer_parameters
from gradwatch.measure.statistics import STATISTICS, WEIGHT_STATISTICS
from gradwatch.record.records import Sink

Accumulate = int | str | Mapping[int, int] | Callable[[int], int] | AccumulatePolicy
"""What ``watch(accumulate=)`` takes."""

AUTO_Z = 6.0
ON_NONFINITE = ("record", "skip", "raise")


@dataclass(frozen=True, slots=True)
class Options:
    """The checked arguments of :func:`gradwatch.watch`; see there for what each one means."""

    clip: ClipPolicy | None
    accumulate: AccumulatePolicy
    on_nonfinite: str
    statistics: tuple[str, ...]
    every: int
    buffer_size: int
    scaler: torch.amp.GradScaler | None
    sinks: tuple[Sink, ...]
    run_dir: str | None
    exploding_norm: float | None
    skip_spikes: float | None
    max_consecutive_skips: int
    curvature: CurvatureEvery | None = None

    @property
    def acts(self) -> bool:
        """Whether gradwatch may change the training, rather than only watch it."""
        return bool(self.acting)

    @property
    def acting(self) -> list[str]:
        """The arguments by which gradwatch changes the training at an optimizer step."""
        asked = {
            "clip": self.clip is not None,
            "accumulate": self.accumulate.most != 1,
            "on_nonfinite": self.on_nonfinite != "record",
            "skip_spikes": self.skip_spikes is not None,
        }
        return [f"{argument}=" for argument, wanted in asked.items() if wanted]

    @property
    def of_steps(self) -> list[str]:
        """What was asked for that only an optimizer's step can give."""
        names = [name for name in self.statistics if name in WEIGHT_STATISTICS]
        asked = [f"statistics={names}"] if names else []
        return asked + ["curvature="] * (self.curvature is not None)

    @property
    def deciding(self) -> dict[str, str]:
        """What decides about all gradients of a step at once: the argument, and how it reads."""
        asked = {
            "clip": (
                f"Clipping by the global norm (clip={self.clip!r})",
                self.clip is not None and not isinstance(self.clip, ClipByValue),
            ),
            "accumulate": (f"accumulate={self.accumulate}", self.accumulate.most != 1),
            "on_nonfinite": (f'on_nonfinite="{self.on_nonfinite}"', self.on_nonfinite != "record"),
            "skip_spikes": (f"skip_spikes={self.skip_spikes}", self.skip_spikes is not None),
        }
        return {argument: text for argument, (text, wanted) in asked.items() if wanted}


def check_options(
    *,
    clip: float | str | ClipPolicy | None = None,
    accumulate: Accumulate = 1,
    on_nonfinite: str = "record",
    statistics: Iterable[str] = ("norm",),
    every: int = 1,
    buffer_size: int = 1024,
    scaler: torch.amp.GradScaler | None = None,
    sinks: Iterable[Sink] = (),
    run_dir: str | os.PathLike[str] | None = None,
    exploding_norm: float | None = None,
    skip_spikes: float | str | None = None,
    max_consecutive_skips: int = 10,
    curvature: CurvatureEvery | None = None,
    caller: str = "watch",
) -> Options:
    """Checks the arguments of :func:`gradwatch.watch`, or of an adapter that hands them on.

    Args:
        clip: As for ``watch``, like all others.
        accumulate: As for ``watch``.
        on_nonfinite: As for ``watch``.
        statistics: As for ``watch``.
        every: As for ``watch``.
        buffer_size: As for ``watch``.
        scaler: As for ``watch``.
        sinks: As for ``watch``.
        run_dir: As for ``watch``.
        exploding_norm: As for ``watch``.
        skip_spikes: As for ``watch``.
        max_consecutive_skips: As for ``watch``.
        curvature: As for ``watch``.
        caller: What the user called, for the text of errors.

    Returns:
        The options.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If an argument is out of bounds.
    """
    if exploding_norm is not None:
        check_positive(f"{caller}(exploding_norm=)", exploding_norm)
    if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
        raise TypeError(
            f"{caller}(scaler=) must be a torch.amp.GradScaler, got {_described(scaler)}."
        )
    return Options(
        clip=_clip_policy(f"{caller}(clip=)", clip),
        accumulate=accumulate_policy(f"{caller}(accumulate=)", accumulate),
        on_nonfinite=_choice(f"{caller}(on_nonfinite=)", on_nonfinite, ON_NONFINITE),
        statistics=_statistics(f"{caller}(statistics=)", statistics),
        every=_positive_int(f"{caller}(every=)", every),
        buffer_size=_positive_int(f"{caller}(buffer_size=)", buffer_size),
        scaler=scaler,
        sinks=_sinks(f"{caller}(sinks=)", sinks),
        run_dir=_folder(f"{caller}(run_dir=)", run_dir),
        exploding_norm=exploding_norm,
        skip_spikes=_spike_z(f"{caller}(skip_spikes=)", skip_spikes),
        max_consecutive_skips=_positive_int(
            f"{caller}(max_consecutive_skips=)", max_consecutive_skips
        ),
        curvature=_curvature(f"{caller}(curvature=)", curvature),
    )


def _spike_z(name: str, value: object) -> float | None:
    if value is None:
        return None
    if value == "auto":
        return AUTO_Z
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise (ValueError if isinstance(value, str) else TypeError)(
            f'{name} must be None, "auto" or a positive number of deviations, got '
            f"{_described(value)}."
        )
    check_positive(name, value)
    return float(value)


def _clip_policy(name: str, clip: object) -> ClipPolicy | None:
    if clip is None:
        return None
    if isinstance(clip, str) and clip == "auto":
        return RobustClip()
    if isinstance(clip, (int, float)) and not isinstance(clip, bool):
        check_positive(name, clip)
        return ClipByNorm(float(clip))
    if isinstance(clip, type) or not isinstance(clip, ClipPolicy):
        raise (ValueError if isinstance(clip, str) else TypeError)(
            f'{name} must be a positive number, "auto" or a clipping policy, got '
            f"{_described(clip)}. Write clip=1.0 to clip by the global L2 norm, clip="
            '"auto" to have the limit found, or clip=ClipByNorm(1.0, norm_type=...) '
            "or clip=ClipByValue(...)."
        )
    return clip


def _positive_int(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer of at least 1, got {_described(value)}.")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")
    return value


def _choice(name: str, value: object, choices: tuple[str, ...]) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be one of {choices}, got {_described(value)}.")
    if value not in choices:
        raise ValueError(f"{name} must be one of {choices}, got {value!r}.")
    return value


def _statistics(name: str, names: object) -> tuple[str, ...]:
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise TypeError(
            f"{name} must be a sequence of names, got {_described(names)}. "
            f'Write statistics=("norm", "max"), for instance.'
        )
    chosen = tuple(names)
    for statistic in chosen:
        _choice(name, statistic, STATISTICS)
    return chosen


def _curvature(name: str, value: object) -> CurvatureEvery | None:
    if value is None or isinstance(value, CurvatureEvery):
        return value
    raise TypeError(
        f"{name} must be a CurvatureEvery or None, got {_described(value)}. Write curvature="
        "CurvatureEvery(200, lambda: criterion(model(x), y)), or gradwatch.curvature(model, loss) "
        "to take it once."
    )


def _folder(name: str, value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, (str, os.PathLike)) or not isinstance(os.fspath(value), str):
        raise TypeError(
            f"{name} must be a folder (str or PathLike) or None, got {_described(value)}. "
            'Write run_dir="runs/a".'
        )
    if not os.fspath(value):
        raise ValueError(f'{name} must name a folder, got an empty path. Write run_dir="runs/a".')
    return str(os.fspath(value))


def _sinks(name: str, sinks: object) -> tuple[Sink, ...]:
    if isinstance(sinks, Sink):
        raise TypeError(
            f"{name} must be a sequence of sinks, got one {type(sinks).__name__}. "
            "Write sinks=[...] around it."
        )
    if isinstance(sinks, str) or not isinstance(sinks, Iterable):
        raise TypeError(f"{name} must be a sequence of sinks, got {_described(sinks)}.")
    chosen = tuple(sinks)
    for sink in chosen:
        if isinstance(sink, type) or not _is_sink(sink):
            raise TypeError(
                f"{name} takes objects with the methods write(batch) and close(), got "
                f"{_described(sink)}."
            )
    return chosen


def _is_sink(value: object) -> bool:
    return all(callable(getattr(value, name, None)) for name in ("write", "close"))


def _described(value: object) -> str:
    return f"{value!r} of type {type(value).__name__}"


NOT_A_MODEL = (
    "watch(model=) got {value!r} of type {kind}. It watches a torch.nn.Module, or a mapping "
    'from names to leaf tensors: watch({{"x": x}}).'
)
NOT_A_LEAF = (
    'watch(model=) got "{name}", which is the result of an operation, so that a backward '
    "leaves no .grad in it. Pass the leaf tensors that it was computed from."
)
LAZY = (
    'watch(model=) got "{name}", a lazy parameter that has no shape yet. Run one forward of the '
    "model before watching it."
)
NOTHING_TO_WATCH = (
    "watch(model=) got {what}, in which no tensor requires a gradient: there is nothing to watch. "
    "Unfreeze a parameter (requires_grad_(True)) before watching."
)
WATCHED_ALREADY = (
    'watch() was given "{name}", which another watcher is attached to. Leave the with block of '
    "that one (or call its close()) first."
)
OVERLAPPING = (
    "watch(optimizer=) got a {optimizer} with overlap_with_ddp=True, which steps inside the "
    "reduction of the gradients, where nobody can look at them. Build it without that argument."
)
FOREIGN_PARAMETERS = (
    "{optimizer} holds {foreign} of {total} parameters that are not the model's, so its gradient "
    "norm cannot be taken over the model. Pass everything that it steps, "
    "watch(nn.ModuleList([model, ...]), optimizer), or build the optimizer after the model was "
    "moved or wrapped."
)


def parameter_table(model: nn.Module | Mapping[str, Tensor]) -> ParameterTable:
    """Lists what is to be watched.

    Args:
        model: A module, or a mapping from names to leaf tensors.

    Returns:
        The table of its tensors.

    Raises:
        TypeError: If the model, a name or a tensor is of another type.
        ValueError: If a tensor is not a leaf, none requires a gradient, or FSDP1 hides them.
    """
    if not isinstance(model, (nn.Module, Mapping)):
        raise TypeError(NOT_A_MODEL.format(value=model, kind=type(model).__name__))
    if isinstance(model, Mapping):
        for name, tensor in model.items():
            _check_entry(name, tensor)
    refuse_fsdp1(model)
    reshard(model)
    table = ParameterTable.of(model)
    for name, tensor in zip(table.names, table.tensors, strict=True):
        if is_lazy(tensor):
            raise ValueError(LAZY.format(name=name))
    if not any(tensor.requires_grad for tensor in table.tensors):
        what = type(model).__name__ if isinstance(model, nn.Module) else f"{list(model)}"
        raise ValueError(NOTHING_TO_WATCH.format(what=what))
    return table


def check_unwatched(table: ParameterTable) -> None:
    """Refuses a model that has a watcher already.

    Args:
        table: Its tensors.

    Raises:
        RuntimeError: If another watcher is attached to one of them.
    """
    for name, tensor in zip(table.names, table.tensors, strict=True):
        if is_watched(tensor):
            raise RuntimeError(WATCHED_ALREADY.format(name=name))


def optimizer_list(
    optimizer: Optimizer | Sequence[Optimizer] | None, table: ParameterTable
) -> list[Optimizer]:
    """Lists the optimizers whose steps are to be watched.

    Args:
        optimizer: One, several, or None where they are to be found at their first step.
        table: The watched tensors.

    Returns:
        The optimizers; empty for None.

    Raises:
        TypeError: If something is not an optimizer.
        ValueError: If there is none, one stands there twice, or one holds foreign parameters.
    """
    if optimizer is None:
        return []
    given = [optimizer] if isinstance(optimizer, Optimizer) else optimizer
    if isinstance(given, (str, Mapping)) or not isinstance(given, Iterable):
        raise TypeError(_not_an_optimizer(given))
    optimizers = list(given)
    if not optimizers:
        raise ValueError(
            f"watch(optimizer=) is empty, got {given!r}. Leave it out to have the optimizers found "
            "at their first step."
        )
    for position, one in enumerate(optimizers):
        if not isinstance(one, Optimizer):
            raise TypeError(_not_an_optimizer(one))
        if getattr(one, "_overlap_with_ddp", False):
            raise ValueError(OVERLAPPING.format(optimizer=type(one).__name__))
        if any(one is earlier for earlier in optimizers[:position]):
            raise ValueError(f"watch(optimizer=) holds the same {type(one).__name__} twice.")
        _check_parameters(one, table)
    return optimizers


def _check_entry(name: object, tensor: object) -> None:
    if not isinstance(name, str):
        raise TypeError(f"watch(model=) takes names that are strings, got {name!r} as a key.")
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(
            f'watch(model=) got {tensor!r} of type {type(tensor).__name__} under "{name}".'
        )
    if not tensor.is_leaf:
        raise ValueError(NOT_A_LEAF.format(name=name))


def _check_parameters(optimizer: Optimizer, table: ParameterTable) -> None:
    known = table.positions()
    parameters = optimizer_parameters(optimizer)
    foreign = sum(id(parameter) not in known for parameter in parameters)
    if foreign:
        raise ValueError(
            FOREIGN_PARAMETERS.format(
                optimizer=type(optimizer).__name__, foreign=foreign, total=len(parameters)
            )
        )


def _not_an_optimizer(value: object) -> str:
    return (
        "watch(optimizer=) must be a torch.optim.Optimizer or a sequence of them, got "
        f"{value!r} of type {type(value).__name__}."
    )
