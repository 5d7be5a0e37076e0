"""Accumulation: how many micro-batches make a step, who decides, and whether a window has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, SupportsIndex, runtime_checkable

from gradwatch.control.accumulate_by_noise_scale import AccumulateByNoiseScale
from gradwatch.control.accumulate_schedule import AccumulationSchedule, FixedAccumulation
from gradwatch.control.noise_scale import NoiseScale
from gradwatch.errors import AccumulationError

TOO_EARLY = (
    "{optimizer}.step() was called after {found} of the {wanted} micro-batches that "
    "watch(accumulate={wanted}) asks for: the update would use a part of the window only. "
    "Call watcher.step() after every micro-batch, it steps the optimizer when the window is full "
    "(watcher.step(last=True) for a short last one), or pass the number that your loop "
    "accumulates, watch(accumulate={found})."
)
TOO_LATE = (
    "{found} micro-batches came before {optimizer}.step(), but watch(accumulate={wanted}) asks for "
    "{wanted}: the gradient would have a weight of {found}/{wanted}. Call watcher.step() after "
    "every micro-batch, it steps the optimizer when the window is full, or pass the number that "
    "your loop accumulates, watch(accumulate={found})."
)


def check_window(optimizer: str, found: int, wanted: int) -> None:
    """Refuses a step whose window has another number of micro-batches than was asked for.

    Args:
        optimizer: Label of the optimizer that is about to step.
        found: Micro-batches in its window.
        wanted: Micro-batches that make a step; with 1 every number is taken.

    Raises:
        AccumulationError: If they differ.
    """
    if wanted > 1 and found != wanted:
        text = TOO_EARLY if found < wanted else TOO_LATE
        raise AccumulationError(text.format(optimizer=optimizer, found=found, wanted=wanted))


@runtime_checkable
class AccumulatePolicy(Protocol):
    """A rule that says before each window how many micro-batches it has.

    Steps are optimizer steps done so far: the window that begins first is step 0. All ranks are
    given the same numbers, and must come to the same answer.
    """

    @property
    def micro_batches(self) -> int:
        """Micro-batches of the window under way, before the first decision of the first one."""

    @property
    def most(self) -> int | None:
        """The largest number it may ever ask for; None for any. With 1 nothing accumulates."""

    @property
    def lr_factor(self) -> float:
        """What the learning rate is to be multiplied with in the window under way; else 1."""

    def looks_at(self, step: int) -> bool:
        """Tells whether it will read the noise scale at a step: only then is it waited for.

        Args:
            step: Optimizer steps done so far.
        """

    def decide(self, step: int, noise: NoiseScale) -> int:
        """Decides about the window that begins; called once, between two windows.

        Args:
            step: Optimizer steps done so far.
            noise: The noise scale; nothing can be said of what it holds where :meth:`looks_at` is
                false.

        Returns:
            Its micro-batches, at least 1.
        """

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as plain numbers and lists; empty for a rule without memory."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what :meth:`state_dict` gave."""


def accumulate_policy(name: str, value: object) -> AccumulatePolicy:
    """Turns what a user wrote into the rule that it means.

    Args:
        name: The argument as the user wrote it, for errors.
        value: A number of micro-batches; a mapping ``{step: micro-batches}`` or a function of the
            step; ``"auto"``; or a policy, which is taken as it is, callable or not.

    Returns:
        The rule.

    Raises:
        TypeError: If it is none of them, or a class rather than an object.
        ValueError: If it is another word, or a number out of bounds.
    """
    if isinstance(value, str) and value == "auto":
        return AccumulateByNoiseScale()
    if isinstance(value, (str, bool, type)):
        raise _unknown(name, value)
    if isinstance(value, AccumulatePolicy):
        return value
    if isinstance(value, SupportsIndex):
        return FixedAccumulation(value, name=name)
    if isinstance(value, Mapping) or callable(value):
        return AccumulationSchedule(value, name=name)
    raise _unknown(name, value)


def _unknown(name: str, value: object) -> Exception:
    return (ValueError if isinstance(value, str) else TypeError)(
        f"{name} must be an integer of at least 1, a mapping {{step: micro-batches}}, a function "
        f'of the step, "auto" or an accumulation policy, got {value!r} of type '
        f"{type(value).__name__}. Write accumulate=4 for four micro-batches per step, accumulate="
        '{0: 1, 1000: 4} to change it at a step, or accumulate="auto" (or an object, '
        "AccumulateByNoiseScale(min=2, max=32)) to have it follow the gradient noise."
    )
