"""How many micro-batches make a step: fixed, by schedule, or by the gradient noise scale."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, asdict, dataclass, field
from functools import partial
from typing import Any, Protocol, SupportsIndex, cast, runtime_checkable

from gradwatch.accumulate.noise_scale import NoiseScale
from gradwatch.checks import (
    check_at_most,
    check_between,
    check_choice,
    check_count,
    check_power_of_two,
    described,
    whole_number,
)
from gradwatch.contracts import Contract, check_result, is_builtin
from gradwatch.errors import AccumulationError
from gradwatch.pickles import stable_name


@stable_name
@runtime_checkable
class AccumulatePolicy(Protocol):
    """A rule that decides before each window how many micro-batches it has.

    A window is all micro-batches of one optimizer step. Steps are counted by completed optimizer
    steps, so the first window is step 0. All ranks are given the same numbers, and must decide the
    same.
    """

    @property
    def micro_batches(self) -> int:
        """Micro-batches of the current window; before the first decision, of the first window."""

    @property
    def most(self) -> int | None:
        """The largest number it may ever ask for; None for no limit. 1 means no accumulation."""

    @property
    def lr_factor(self) -> float:
        """The factor for the learning rate in the current window; 1 to leave it unchanged."""

    def looks_at(self, step: int) -> bool:
        """Returns whether :meth:`decide` will read the noise scale at this step."""

    def decide(self, step: int, noise: NoiseScale) -> int:
        """Decides the length of the next window; called once between two windows.

        Args:
            step: The number of completed optimizer steps.
            noise: The current noise scale; its values are unspecified if :meth:`looks_at` returned
                False for this step.

        Returns:
            The micro-batches of the next window, at least 1.
        """

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as plain numbers and lists; empty for a rule without memory."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the state that :meth:`state_dict` returned."""


MEMBERS = {
    "micro_batches": "",
    "most": "",
    "lr_factor": "",
    "looks_at": "(step)",
    "decide": "(step, noise)",
    "state_dict": "()",
    "load_state_dict": "(state)",
}
NUMBER = "the micro-batches of the window that begins: an integer of at least 1"
WITHIN = "at most {most} micro-batches, as its attribute most says"
FACTOR = "a positive number; 1.0 to leave the learning rate unchanged"


def check_policy(argument: str, policy: AccumulatePolicy) -> None:
    """Refuses a rule that does not keep to :class:`AccumulatePolicy`.

    Args:
        argument: How error messages call the argument, as the user wrote it.
        policy: The rule; one of gradwatch's own is not looked at.

    Raises:
        ContractError: If a member is missing, or is not what it must be.
    """
    if is_builtin(policy):
        return
    contract = Contract(argument, policy, "gradwatch.AccumulatePolicy")
    contract.has(MEMBERS)
    contract.attribute("micro_batches", "an integer of at least 1", _is_count)
    most = "an integer of at least 1, or None for no limit"
    contract.attribute("most", most, lambda value: value is None or _is_count(value))
    contract.attribute("lr_factor", FACTOR, _is_factor)
    contract.gives_state()


def _is_count(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        return False
    return operator.index(value) >= 1


def _is_factor(value: object) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 < float(value) < math.inf  # type: ignore[arg-type]


class _WithoutNoise:
    """What rules have in common that never read the noise scale."""

    __slots__ = ("micro_batches", "most")

    micro_batches: int
    most: int | None
    lr_factor = 1.0  # a user who sets the window lengths also sets the learning rate for them

    def looks_at(self, step: int) -> bool:
        """Returns False: the noise scale is never read."""
        return False

    def __setstate__(self, state: tuple[None, dict[str, Any]]) -> None:
        # In pickles of gradwatch 0.1 the two attributes have other, private names.
        values = dict(state[1])
        if "_number" in values:
            values["most"] = values["_number"]
        renamed = {"_number": "micro_batches", "_micro_batches": "micro_batches", "_most": "most"}
        for name, value in values.items():
            setattr(self, renamed.get(name, name), value)


@stable_name
class FixedAccumulation(_WithoutNoise):
    """The same number of micro-batches in every window.

    Args:
        number: Micro-batches per window, at least 1; integers of NumPy and torch are accepted.
        name: How error messages call the number.

    Raises:
        TypeError: If the number is not an integer.
        ValueError: If the number is less than 1.
    """

    __slots__ = ()

    def __init__(self, number: SupportsIndex, *, name: str = "FixedAccumulation(number=)") -> None:
        advice = "Write 1 to step after every backward."
        self.micro_batches = self.most = whole_number(name, number, least=1, advice=advice)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.micro_batches})"

    def __str__(self) -> str:
        return str(self.micro_batches)

    def decide(self, step: int, noise: NoiseScale) -> int:
        """Returns the fixed number."""
        return self.micro_batches

    def state_dict(self) -> dict[str, Any]:
        """Returns an empty dict: the rule has no memory."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Does nothing: the rule has no memory."""


@stable_name
class AccumulationSchedule(_WithoutNoise):
    """A number of micro-batches that depends on the step.

    Args:
        schedule: A mapping ``{step: micro-batches}``, in which each number applies from its step
            on and step 0 must have one; or a function that takes the step and returns the number.
            Steps are optimizer steps, counted from 0. The function is called once for each window,
            and for step 0 already here.
        name: How error messages call the schedule.

    Raises:
        TypeError: If a step or a number is not an integer.
        ValueError: If a step is negative, a number is less than 1, or step 0 is missing.

    Example:
        >>> from gradwatch.accumulate.noise_scale import NoiseScaleEstimator
        >>> noise = NoiseScaleEstimator().read()
        >>> schedule = AccumulationSchedule({0: 1, 1000: 4})
        >>> [schedule.decide(step, noise) for step in (0, 999, 1000, 5000)]
        [1, 1, 4, 4]
    """

    __slots__ = ("_function", "_name", "_schedule")

    def __init__(
        self,
        schedule: Mapping[int, int] | Callable[[int], int],
        *,
        name: str = "AccumulationSchedule(schedule=)",
    ) -> None:
        self._name, self._schedule, self.most = name, schedule, None
        self._function: Callable[[int], int]
        if isinstance(schedule, Mapping):
            table = _table(name, schedule)
            self._schedule, self.most = table, max(table.values())
            self._function = partial(_looked_up, table)  # a lambda cannot be pickled
        elif callable(schedule):
            self._function = schedule
        else:
            raise TypeError(
                f"{name} must be a mapping {{step: micro-batches}} or a function of the step, got "
                f"{described(schedule)}. Write {{0: 1, 1000: 4}}."
            )
        self.decide(0)  # checks what a function returns for the first window

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._schedule!r})"

    def __str__(self) -> str:
        return str(self._schedule)

    def decide(self, step: int, noise: NoiseScale | None = None) -> int:
        """Returns the number for a step; see ``AccumulatePolicy``.

        Raises:
            TypeError: If the function did not return an integer.
            ValueError: If it returned less than 1.
        """
        number, advice = self._function(step), "Return 1 or more."
        self.micro_batches = whole_number(_at_step(self._name, step), number, 1, advice)
        return self.micro_batches

    def state_dict(self) -> dict[str, Any]:
        """Returns the micro-batches of the current window."""
        return {"micro_batches": self.micro_batches}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the state that :meth:`state_dict` returned."""
        self.micro_batches = int(state["micro_batches"])


def _table(name: str, schedule: Mapping[int, int]) -> dict[int, int]:
    table = {}
    for key, value in schedule.items():
        advice = "Steps count from 0: write {0: 1, 1000: 4}."
        step = whole_number(f"A step of {name}", key, least=0, advice=advice)
        advice = f"Write {{{step}: 1}} or more."
        table[step] = whole_number(_at_step(name, step), value, least=1, advice=advice)
    if 0 not in table:
        raise ValueError(
            f"{name} must say how many micro-batches step 0 has, got {dict(schedule)!r}. "
            "Add 0 to it: {0: 1, ...}."
        )
    return dict(sorted(table.items()))  # sorted for the repr only


def _at_step(name: str, step: int) -> str:
    return f"The micro-batches that {name} gives for step {step}"


@stable_name
def _looked_up(table: Mapping[int, int], step: int) -> int:
    return table[max(start for start in table if start <= step)]


_CHECKS = 3  # so many checks in a row must find the noise scale out of range, to double anyway
_SIGNIFICANCE = 3.0  # standard errors by which |G|^2 must be above 0 at each of these checks
_LR_POWERS = {"sqrt": 0.5, "linear": 1.0}


@stable_name
@dataclass(slots=True)
class _NoiseScaleState:
    """The memory of the policy; the field names are the keys of its state in a checkpoint."""

    micro_batches: int  # of the current window
    start: int  # micro-batches of the first window
    out_of_range: int = 0  # checks in a row that found the noise scale out of range


@stable_name
@dataclass(frozen=True, eq=False)
class AccumulateByNoiseScale:
    """Lets the batch size follow the gradient noise scale; ``accumulate="auto"``.

    Above the noise scale, a larger batch begins to gain less than it costs. Every few steps the
    noise scale is compared with the batch, both in micro-batches. If they are far enough apart, the
    number of micro-batches is doubled or halved, towards the power of two nearest to the noise
    scale.

    An estimate that is not valid changes nothing, with one exception: the number is also doubled if
    three checks in a row find a noise scale above four times the batch, provided that nothing else
    is wrong with the estimate and that the squared gradient is at least three standard errors above
    0. Such an estimate shows the direction but not the distance. Without this exception, a small
    ``min`` would never be left.

    This is a heuristic: the noise scale stands in for the critical batch size, and how well it
    does is disputed (arXiv 2505.23971). On one device, more micro-batches rarely save time.

    Attributes:
        min: The smallest number of micro-batches, a power of two. On a single process it must be
            at least 2, because a single micro-batch has no noise scale.
        max: The largest number of micro-batches, a power of two.
        start: The number to start with, a power of two from ``min`` to ``max``; None for ``min``.
        every: Optimizer steps between two checks, at least 1.
        hysteresis: The ratio of noise scale and batch, in either direction, from which the number
            is changed; above 1.
        min_updates: The number of windows that an estimate needs before it is used, at least 1.
        scale_lr: How the learning rate follows the batch size: ``"sqrt"``, by its square root, for
            Adam; ``"linear"``, in proportion, for SGD; None, not at all.

    Raises:
        TypeError: If an argument has the wrong type.
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
    _state: _NoiseScaleState = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._check_bounds()
        check_count("AccumulateByNoiseScale(every=)", self.every, 1)
        name = "AccumulateByNoiseScale(hysteresis=)"
        advice = "Write 1.5 to change at one and a half times the batch."
        check_between(name, self.hysteresis, 1.0, math.inf, advice)
        check_count("AccumulateByNoiseScale(min_updates=)", self.min_updates, 1)
        if self.scale_lr is not None:
            name = "AccumulateByNoiseScale(scale_lr=), where not None,"
            check_choice(name, self.scale_lr, list(_LR_POWERS))
        start = self.min if self.start is None else self.start
        object.__setattr__(self, "_state", _NoiseScaleState(start, start))

    def _check_bounds(self) -> None:
        check_power_of_two("AccumulateByNoiseScale(min=)", self.min)
        check_power_of_two("AccumulateByNoiseScale(max=)", self.max)
        reason = ". Write a larger max."
        check_at_most("AccumulateByNoiseScale(min=)", self.min, self.max, "max", reason)
        if self.start is None:
            return
        check_power_of_two("AccumulateByNoiseScale(start=)", self.start)
        if not self.min <= self.start <= self.max:
            raise ValueError(
                f"AccumulateByNoiseScale(start=) must be between the min of {self.min} and the max "
                f"of {self.max}, got {self.start}. Leave it out to start with the min."
            )

    @property
    def micro_batches(self) -> int:
        """Micro-batches of the current window."""
        return self._state.micro_batches

    @property
    def most(self) -> int:
        """The largest number it may ask for."""
        return self.max

    @property
    def lr_factor(self) -> float:
        """The factor for the learning rate, relative to that of the first window."""
        if self.scale_lr is None:
            return 1.0
        growth = self._state.micro_batches / self._state.start
        return float(growth ** _LR_POWERS[self.scale_lr])

    def looks_at(self, step: int) -> bool:
        """Returns whether there is a check at a step."""
        return step > 0 and step % self.every == 0

    def decide(self, step: int, noise: NoiseScale) -> int:
        """Decides the length of the next window; see ``AccumulatePolicy``."""
        state = self._state
        if self.looks_at(step) and noise.updates >= self.min_updates:
            state.out_of_range = state.out_of_range + 1 if _surely_out_of_range(noise) else 0
            state.micro_batches = self._within(self._wanted(noise))
        return state.micro_batches

    def _wanted(self, noise: NoiseScale) -> int:
        now = self._state.micro_batches
        # An estimate out of range is not valid, so without this a small number would never grow.
        if self._state.out_of_range == _CHECKS:
            self._state.out_of_range = 0
            return 2 * now
        nearest, exact = noise.suggested_micro_batches, noise.micro_batches
        if not noise.valid or nearest is None or not 0 <= exact < math.inf:
            return now
        # Halfway between two powers of two, the nearest one would change from check to check; the
        # hysteresis prevents that.
        if nearest > now and exact >= self.hysteresis * now:
            return 2 * now
        return now // 2 if nearest < now and exact * self.hysteresis <= now else now

    def _within(self, number: int) -> int:
        # Inside a method, the names min and max are the built-in functions, not the fields.
        return max(self.min, min(self.max, number))

    def state_dict(self) -> dict[str, Any]:
        """Returns the current micro-batches, those of the first window, and the checks in a row."""
        return asdict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the state that :meth:`state_dict` returned, within the bounds of this policy."""
        self._state.micro_batches = self._within(int(state["micro_batches"]))
        self._state.start = int(state["start"])
        self._state.out_of_range = int(state["out_of_range"])


def _surely_out_of_range(noise: NoiseScale) -> bool:
    # The gradient must be significant, because noise alone can make the estimate large as well.
    significant = noise.significance >= _SIGNIFICANCE
    return significant and noise.out_of_range and math.isfinite(noise.b_simple)


def accumulate_policy(name: str, value: object) -> AccumulatePolicy:
    """Makes the policy for a value of ``watch(accumulate=)``.

    Args:
        name: How error messages call the argument, as the user wrote it.
        value: A number of micro-batches; a mapping ``{step: micro-batches}`` or a function of the
            step; ``"auto"``; or a policy, which is returned as it is.

    Raises:
        TypeError: If the value is none of these, or is a class rather than an object.
        ValueError: If the value is another word, or a number out of bounds.
    """
    if isinstance(value, str) and value == "auto":
        return AccumulateByNoiseScale()
    # A class has the methods of a policy and is callable, and True is an integer; both are errors.
    if not isinstance(value, (str, bool, type)):
        if hasattr(value, "decide"):  # first, as a user's policy may also be callable
            policy: Any = value
            check_policy(name, policy)
            return cast(AccumulatePolicy, policy)
        if isinstance(value, SupportsIndex):
            return FixedAccumulation(value, name=name)
        if isinstance(value, Mapping) or callable(value):
            return AccumulationSchedule(value, name=name)
    raise (ValueError if isinstance(value, str) else TypeError)(
        f"{name} must be an integer of at least 1, a mapping {{step: micro-batches}}, a function "
        f'of the step, "auto" or an accumulation policy, got {described(value)}. '
        "Write accumulate=4 for four micro-batches per step, accumulate="
        '{0: 1, 1000: 4} to change it at a step, or accumulate="auto" (or an object, '
        "AccumulateByNoiseScale(min=2, max=32)) to have it follow the gradient noise."
    )


_NAN = math.nan
UNKNOWN = NoiseScale(_NAN, _NAN, _NAN, _NAN, valid=False, updates=0, suggested_micro_batches=None)
"""The noise scale that a policy is given at steps at which it does not look at it."""


class AccumulationPlan:
    """Asks the policy before each window, and reports every change.

    Args:
        policy: The rule that decides the length of each window.
        on_change: Called with the first step of the new length, the old length, the new length,
            and the noise scale that decided, or None if none did.

    Attributes:
        checked: Whether a step is refused if its window has another number of micro-batches. The
            adapter of a framework that accumulates by itself switches it off.
        by_framework: Whether such a framework accumulates, whatever the policy says.
        micro_batches: Micro-batches of the current window.
        lr_factor: The factor for the learning rate in the current step.
        fixed: Whether all windows have the same length, so that no decision is needed.
        by_noise: Whether the policy may read the noise scale, so that the ranks must agree on it.
    """

    def __init__(
        self,
        policy: AccumulatePolicy,
        on_change: Callable[[int, int, int, NoiseScale | None], None],
    ) -> None:
        self.checked = True
        self.by_framework = False
        # Any policy other than ours may read the noise scale, so it is assumed to.
        self.by_noise = not isinstance(policy, _WithoutNoise)
        self.fixed = isinstance(policy, FixedAccumulation)
        self._policy = policy
        self._on_change = on_change
        self._trusted = is_builtin(policy)
        self.micro_batches, self.lr_factor = policy.micro_batches, policy.lr_factor

    @property
    def accumulates(self) -> bool:
        """Whether a step may ever have more than one micro-batch."""
        return self.by_framework or self._policy.most != 1

    def next_window(self, step: int, noise: Callable[[], NoiseScale]) -> None:
        """Asks the policy about the next window, after ``step`` optimizer steps."""
        # noise() waits for numbers from the device, so it is called only if the policy needs it.
        looked = noise() if self._policy.looks_at(step) else None
        old, new = self.micro_batches, self._policy.decide(step, looked or UNKNOWN)
        factor = self._policy.lr_factor
        if not self._trusted:
            new = self._checked(new, factor)
        self.micro_batches, self.lr_factor = new, factor
        if new != old:
            self._on_change(step + 1, old, new, looked)

    def _checked(self, number: int, factor: float) -> int:
        """Refuses what a user's policy has decided, if no window can have it."""
        policy, most = self._policy, self._policy.most
        check_result(policy, "decide()", number, NUMBER, _is_count(number))
        within = most is None or number <= most
        check_result(policy, "decide()", number, WITHIN.format(most=most), within)
        check_result(policy, "lr_factor", factor, FACTOR, _is_factor(factor))
        return operator.index(number)

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs to make the same decisions."""
        # A policy need not keep what it has decided: its attribute may be that of the first window.
        return {
            "policy": type(self._policy).__name__,
            "state": self._policy.state_dict(),
            "micro_batches": self.micro_batches,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the state that :meth:`state_dict` returned; ignored if the policy is another."""
        if state["policy"] == type(self._policy).__name__:
            self._policy.load_state_dict(state["state"])
            self.micro_batches = self._policy.micro_batches
            if not self._trusted:
                # Not for gradwatch's own: they keep to their bounds, which may have changed.
                self.micro_batches = int(state.get("micro_batches", self.micro_batches))
            self.lr_factor = self._policy.lr_factor


TOO_EARLY = (
    "{optimizer}.step() was called after {found} of the {wanted} micro-batches that "
    "watch(accumulate={wanted}) asks for: the update would use only a part of the window. "
    "Call watcher.step() after every micro-batch: it steps the optimizer when the window is full "
    "(watcher.step(last=True) for a short last one). Or pass the number that your loop "
    "accumulates, watch(accumulate={found})."
)
TOO_LATE = (
    "{found} micro-batches came before {optimizer}.step(), but watch(accumulate={wanted}) asks for "
    "{wanted}: the gradient would have a weight of {found}/{wanted}. Call watcher.step() after "
    "every micro-batch: it steps the optimizer when the window is full. Or pass the number that "
    "your loop accumulates, watch(accumulate={found})."
)


def check_window(optimizer: str, found: int, wanted: int) -> None:
    """Refuses a step whose window has a number of micro-batches other than the wanted one.

    Raises:
        AccumulationError: If the numbers differ, and ``wanted`` is more than 1.
    """
    # With 1, the default, the user has said nothing about windows: the loop may accumulate itself.
    if wanted > 1 and found != wanted:
        text = TOO_EARLY if found < wanted else TOO_LATE
        raise AccumulationError(text.format(optimizer=optimizer, found=found, wanted=wanted))


ALONE = (
    "watch(accumulate={policy!r}) may come down to one micro-batch per step. On one process this "
    "has no noise scale, so the number would never rise again. Write min=2."
)


def check_noise_scale_exists(policy: AccumulatePolicy, *, single_process: bool) -> None:
    """Refuses a policy that may get stuck at one micro-batch, which has no noise scale.

    Raises:
        ValueError: If the policy may go down to one micro-batch per step, on a single process.
    """
    if isinstance(policy, AccumulateByNoiseScale) and policy.min == 1 and single_process:
        raise ValueError(ALONE.format(policy=policy))
