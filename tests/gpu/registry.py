"""The list of checks: what each needs, and how it says that it failed or could not be run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.gpu.place import Place

Found = dict[str, Any]
"""What a check has measured: a mapping that can be written as JSON."""

CHECKS: dict[str, Check] = {}
"""All checks by name, in the order in which they run."""


class Skipped(Exception):
    """The check cannot be run here; the text says why."""


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: The name of its function.
        run: Does it, and returns what it found; raises ``AssertionError`` if it fails.
        cuda: Whether it needs CUDA or ROCm, and neither the CPU nor a stand-in will do.
        devices: How many devices it needs.
        alone_s: How long it may take in a process of its own, s; 0 runs it in the common one.
            What may leave a GPU unusable, or changes the process for good, runs alone.
        always_alone: Whether it does so where there is no GPU, too.
    """

    name: str
    run: Callable[[Place], Found]
    cuda: bool = False
    devices: int = 1
    alone_s: float = 0.0
    always_alone: bool = False
    text: str = field(init=False, default="")

    def __post_init__(self) -> None:
        """Takes the first line of the docstring as the text of the check."""
        object.__setattr__(self, "text", (self.run.__doc__ or "").splitlines()[0])

    def is_alone(self, place: Place) -> bool:
        """Returns whether it runs in a process of its own."""
        return self.always_alone or (self.alone_s > 0 and place.cuda)

    def skipped(self, place: Place) -> str:
        """Returns why it cannot be run in a place; empty if it can."""
        if self.cuda and not place.cuda:
            return "needs CUDA"
        if self.devices > 1 and (place.dry or place.count < self.devices):
            return f"needs {self.devices} devices"
        return ""


def check(
    *, cuda: bool = False, devices: int = 1, alone_s: float = 0.0, always_alone: bool = False
) -> Callable[[Callable[[Place], Found]], Callable[[Place], Found]]:
    """Registers a function as a check; the arguments are those of :class:`Check`."""

    def register(run: Callable[[Place], Found]) -> Callable[[Place], Found]:
        CHECKS[run.__name__] = Check(run.__name__, run, cuda, devices, alone_s, always_alone)
        return run

    return register


def require(condition: bool, text: str) -> None:
    """Fails the check with a text, unless a condition holds."""
    if not condition:
        raise AssertionError(text)
