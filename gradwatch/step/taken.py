"""StepTaken: the bool that says whether a step was taken, while only the device knows it."""

from __future__ import annotations

from collections.abc import Sequence

from gradwatch.step.skip_rule import StepOutcome


class StepTaken:
    """Whether a step was taken, where only the device knows; looking at it waits for the device.

    It stands for a bool wherever one is looked at: in a condition, a comparison, a sum, a text.
    ``bool()`` makes a plain one of it, and so do copies and pickles.
    """

    __slots__ = ("_outcomes", "_taken")

    def __init__(self, outcomes: Sequence[StepOutcome]) -> None:
        """Stands for whether any of some steps was applied."""
        self._outcomes = outcomes
        self._taken: bool | None = None

    # What a bool can be asked waits, and is answered as a bool would.

    def __bool__(self) -> bool:
        if self._taken is None:
            self._taken = any(one.final() == "applied" for one in self._outcomes)
            self._outcomes = ()
        return self._taken

    def __index__(self) -> int:
        return int(bool(self))

    def __eq__(self, other: object) -> bool:
        return bool(self) == (bool(other) if isinstance(other, StepTaken) else other)

    def __hash__(self) -> int:
        return hash(bool(self))

    def __add__(self, other: int) -> int:
        return bool(self) + other

    def __and__(self, other: int) -> int:
        return bool(self) & other

    def __or__(self, other: int) -> int:
        return bool(self) | other

    __radd__, __rand__, __ror__ = __add__, __and__, __or__

    def __repr__(self) -> str:
        return repr(bool(self))

    def __format__(self, form: str) -> str:
        return format(bool(self), form)

    def __reduce__(self) -> tuple[type[bool], tuple[bool]]:
        return bool, (bool(self),)


def taken(outcomes: Sequence[StepOutcome | None]) -> bool | StepTaken:
    """Returns whether any of some steps was applied; None is a step that was not begun."""
    begun = [one for one in outcomes if one is not None]
    late = [one for one in begun if one.late]
    known = any(one.outcome == "applied" for one in begun if not one.late)
    return StepTaken(late) if late and not known else known
