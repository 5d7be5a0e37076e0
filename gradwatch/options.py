"""Options: what ``watch()`` was asked for, checked before the first step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from gradwatch.control.clip import ClipByNorm, check_positive
from gradwatch.control.policy import ClipPolicy
from gradwatch.observe.statistics import STATISTICS
from gradwatch.record.sinks import Sink

ON_NONFINITE = ("record", "skip", "raise")


@dataclass(frozen=True, slots=True)
class Options:
    """The checked arguments of :func:`gradwatch.watch`; see there for what each one means."""

    clip: ClipPolicy | None
    accumulate: int
    on_nonfinite: str
    statistics: tuple[str, ...]
    every: int
    buffer_size: int
    scaler: torch.amp.GradScaler | None
    sinks: tuple[Sink, ...]
    exploding_norm: float | None

    @property
    def acts(self) -> bool:
        """Whether gradwatch may change the training, rather than only watch it."""
        return self.clip is not None or self.accumulate > 1 or self.on_nonfinite != "record"


def check_options(
    *,
    clip: float | ClipPolicy | None = None,
    accumulate: int = 1,
    on_nonfinite: str = "record",
    statistics: Iterable[str] = ("norm",),
    every: int = 1,
    buffer_size: int = 1024,
    scaler: torch.amp.GradScaler | None = None,
    sinks: Iterable[Sink] = (),
    exploding_norm: float | None = None,
) -> Options:
    """Checks the arguments of :func:`gradwatch.watch`.

    Returns:
        The options.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If an argument is out of bounds.
    """
    if exploding_norm is not None:
        check_positive("watch(exploding_norm=)", exploding_norm)
    if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
        raise TypeError(f"watch(scaler=) must be a torch.amp.GradScaler, got {_described(scaler)}.")
    return Options(
        clip=_clip_policy(clip),
        accumulate=_positive_int("accumulate", accumulate),
        on_nonfinite=_choice("on_nonfinite", on_nonfinite, ON_NONFINITE),
        statistics=_statistics(statistics),
        every=_positive_int("every", every),
        buffer_size=_positive_int("buffer_size", buffer_size),
        scaler=scaler,
        sinks=_sinks(sinks),
        exploding_norm=exploding_norm,
    )


def _clip_policy(clip: object) -> ClipPolicy | None:
    if clip is None:
        return None
    if isinstance(clip, (int, float)) and not isinstance(clip, bool):
        check_positive("watch(clip=)", clip)
        return ClipByNorm(float(clip))
    if isinstance(clip, type) or not isinstance(clip, ClipPolicy):
        raise (ValueError if isinstance(clip, str) else TypeError)(
            f"watch(clip=) must be a positive number or a clipping policy, got {_described(clip)}. "
            "Write clip=1.0 to clip by the global L2 norm, or clip=ClipByNorm(1.0, norm_type=...) "
            "or clip=ClipByValue(...)."
        )
    return clip


def _positive_int(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"watch({name}=) must be an integer of at least 1, got {_described(value)}."
        )
    if value < 1:
        raise ValueError(f"watch({name}=) must be at least 1, got {value}.")
    return value


def _choice(name: str, value: object, choices: tuple[str, ...]) -> str:
    if not isinstance(value, str):
        raise TypeError(f"watch({name}=) must be one of {choices}, got {_described(value)}.")
    if value not in choices:
        raise ValueError(f"watch({name}=) must be one of {choices}, got {value!r}.")
    return value


def _statistics(names: object) -> tuple[str, ...]:
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise TypeError(
            f"watch(statistics=) must be a sequence of names, got {_described(names)}. "
            f'Write statistics=("norm", "max"), for instance.'
        )
    chosen = tuple(names)
    for name in chosen:
        _choice("statistics", name, STATISTICS)
    return chosen


def _sinks(sinks: object) -> tuple[Sink, ...]:
    if isinstance(sinks, Sink):
        raise TypeError(
            f"watch(sinks=) must be a sequence of sinks, got one {type(sinks).__name__}. "
            "Write sinks=[...] around it."
        )
    if isinstance(sinks, str) or not isinstance(sinks, Iterable):
        raise TypeError(f"watch(sinks=) must be a sequence of sinks, got {_described(sinks)}.")
    chosen = tuple(sinks)
    for sink in chosen:
        if isinstance(sink, type) or not isinstance(sink, Sink):
            raise TypeError(
                f"watch(sinks=) takes objects with the methods write(batch) and close(), got "
                f"{_described(sink)}."
            )
    return chosen


def _described(value: object) -> str:
    return f"{value!r} of type {type(value).__name__}"
