"""AccumulateByNoiseScale: the rule behind ``accumulate="auto"``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, asdict, dataclass, field
from typing import Any

from gradwatch.control.checks import check_between, check_choice, check_count
from gradwatch.control.noise_scale import NoiseScale

_CHECKS = 3  # this many in a row must find the noise scale out of range before more are tried
_SIGNIFICANCE = 3.0  # standard errors of |G|^2 at each of them: it does have a size
_LR_POWERS = {"sqrt": 0.5, "linear": 1.0}


@dataclass(slots=True)
class _State:
    """What changes from window to window.

    Attributes:
        micro_batches: Of the window under way.
        start: Of the first window.
        out_of_range: Checks in a row that found the noise scale out of range.
    """

    micro_batches: int
    start: int
    out_of_range: int = 0


@dataclass(frozen=True, eq=False)
class AccumulateByNoiseScale:
    """Lets the batch follow the gradient noise scale; ``accumulate="auto"``.

    The noise scale is where a larger batch begins to pay less than it costs. Every few steps it is
    compared with the batch, both in micro-batches, and if it is well away the number of
    micro-batches is doubled or halved: to the nearest power of two in the end, one factor of two at
    a time. An estimate that is not valid changes nothing, but for one case: if the noise scale is
    above four times the batch, and that alone is wrong with it, in three checks in a row in which
    the squared gradient is at least three standard errors above 0, the number is doubled. How far
    to go cannot be told from there, but the direction can; without it a small ``min`` would never
    be left.

    This is a heuristic: the noise scale stands in for the critical batch size, and how well it
    does is disputed (arXiv 2505.23971). On one device, more micro-batches rarely save time.

    Attributes:
        min: The least number of micro-batches, a power of two. One has no noise scale on a single
            process: 1 makes sense only with several ranks.
        max: The largest, a power of two.
        start: The number to start with, a power of two between them; None for ``min``.
        every: Optimizer steps from one check to the next.
        hysteresis: By what factor the noise scale must be away from the batch; above 1.
        min_updates: Windows that the estimate must have seen.
        scale_lr: How the learning rate follows the batch: ``"sqrt"`` by its square root, for Adam;
            ``"linear"``, for SGD; None for not at all.

    Raises:
        TypeError: If an argument is not of the kind that is asked for.
        ValueError: If an argument is out of bounds.

    References:
        McCandlish, Kaplan, Amodei: An Empirical Model of Large-Batch Training. 2018,
        arXiv 1812.06162.

    Example:
        >>> policy = AccumulateByNoiseScale(scale_lr="sqrt")
        >>> noise = NoiseScale(
        ...     b_simple=60.0, tr_sigma=60.0, grad_sq=1.0, stderr=2.0, valid=True, updates=100,
        ...     suggested_micro_batches=8, micro_batches=7.5, significance=30.0, batch=16.0,
        ... )
        >>> [policy.decide(step, noise) for step in (99, 100, 110, 120)]
        [2, 4, 8, 8]
        >>> policy.lr_factor
        2.0
    """

    min: int = 2
    max: int = 32
    _: KW_ONLY
    start: int | None = None
    every: int = 10
    hysteresis: float = 1.5
    min_updates: int = 50
    scale_lr: str | None = None
    _state: _State = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._check_bounds()
        check_count(_named("every"), self.every, 1)
        advice = "Write 1.5 to change at one and a half times the batch."
        check_between(_named("hysteresis"), self.hysteresis, 1.0, math.inf, advice)
        check_count(_named("min_updates"), self.min_updates, 1)
        if self.scale_lr is not None:
            check_choice(f"{_named('scale_lr')}, where not None,", self.scale_lr, list(_LR_POWERS))
        start = self.min if self.start is None else self.start
        object.__setattr__(self, "_state", _State(start, start))

    def _check_bounds(self) -> None:
        _check_power("min", self.min)
        _check_power("max", self.max)
        if self.min > self.max:
            raise ValueError(
                f"{_named('min')} must be at most the max of {self.max}, got {self.min}. Write a "
                "larger max."
            )
        if self.start is None:
            return
        _check_power("start", self.start)
        if not self.min <= self.start <= self.max:
            raise ValueError(
                f"{_named('start')} must be between the min of {self.min} and the max of "
                f"{self.max}, got {self.start}. Leave it out to start with the min."
            )

    @property
    def micro_batches(self) -> int:
        """Micro-batches of the window under way."""
        return self._state.micro_batches

    @property
    def most(self) -> int:
        """The largest number it may ask for."""
        return self.max

    @property
    def lr_factor(self) -> float:
        """By what the learning rate follows the batch, in proportion to the first window's."""
        if self.scale_lr is None:
            return 1.0
        growth = self._state.micro_batches / self._state.start
        return float(growth ** _LR_POWERS[self.scale_lr])

    def looks_at(self, step: int) -> bool:
        """Tells whether there is a check at a step."""
        return step > 0 and step % self.every == 0

    def decide(self, step: int, noise: NoiseScale) -> int:
        """Decides about the window that begins; see ``AccumulatePolicy``."""
        state = self._state
        if self.looks_at(step) and noise.updates >= self.min_updates:
            state.out_of_range = state.out_of_range + 1 if _surely_out_of_range(noise) else 0
            state.micro_batches = self._within(self._wanted(noise))
        return state.micro_batches

    def _wanted(self, noise: NoiseScale) -> int:
        now = self._state.micro_batches
        if self._state.out_of_range == _CHECKS:
            self._state.out_of_range = 0
            return 2 * now
        nearest, exact = noise.suggested_micro_batches, noise.micro_batches
        if not noise.valid or nearest is None or not 0 <= exact < math.inf:
            return now
        if nearest > now and exact >= self.hysteresis * now:
            return 2 * now
        return now // 2 if nearest < now and exact * self.hysteresis <= now else now

    def _within(self, number: int) -> int:
        # Inside the methods min and max are the functions, not the fields.
        return max(self.min, min(self.max, number))

    def state_dict(self) -> dict[str, Any]:
        """Returns the micro-batches, those of the first window, and the checks in a row."""
        return asdict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what :meth:`state_dict` gave, within the bounds of this policy."""
        self._state.micro_batches = self._within(int(state["micro_batches"]))
        self._state.start = int(state["start"])
        self._state.out_of_range = int(state["out_of_range"])


def _surely_out_of_range(noise: NoiseScale) -> bool:
    """Tells whether an estimate has nothing wrong with it but that it is out of range."""
    significant = noise.significance >= _SIGNIFICANCE
    return significant and noise.out_of_range and math.isfinite(noise.b_simple)


def _named(argument: str) -> str:
    return f"AccumulateByNoiseScale({argument}=)"


def _check_power(argument: str, value: object) -> None:
    """Refuses what is not a power of two, and names the nearest ones."""
    name = _named(argument)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(
            f"{name} must be an integer, a power of two, got {value!r} of type "
            f"{type(value).__name__}. Write 2, for instance."
        )
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value!r}. Write 2, for instance.")
    if value & (value - 1):
        below = 1 << (value.bit_length() - 1)
        raise ValueError(
            f"{name} must be a power of two, got {value!r}. Write {below} or {2 * below}."
        )
