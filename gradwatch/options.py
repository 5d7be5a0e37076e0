"""Options: what ``watch()`` was asked for, checked before the first step."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch

from gradwatch.control.accumulate import AccumulatePolicy, accumulate_policy
from gradwatch.control.auto import RobustClip
from gradwatch.control.clip import ClipByNorm, ClipByValue, check_positive
from gradwatch.control.policy import ClipPolicy
from gradwatch.explain.curvature_every import CurvatureEvery
from gradwatch.observe.statistics import STATISTICS, WEIGHT_STATISTICS
from gradwatch.record.sinks import Sink

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
