"""AccumulationPlan: how many micro-batches the windows of a run have, as its policy decides."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from gradwatch.control.accumulate import AccumulatePolicy
from gradwatch.control.accumulate_by_noise_scale import AccumulateByNoiseScale
from gradwatch.control.accumulate_schedule import AccumulationSchedule, FixedAccumulation
from gradwatch.control.noise_scale import NoiseScale
from gradwatch.observe.data_parallel import DataParallel

ALONE = (
    "watch(accumulate={policy!r}) may come down to one micro-batch per step, which has no noise "
    "scale on one process, so that it would never leave it again. Write min=2."
)


OnChange = Callable[[int, int, int, NoiseScale | None], None]
"""Told the first step of windows of another length, the old and new one, and what decided."""


def check_can_be_had(policy: AccumulatePolicy, data_parallel: DataParallel | None) -> None:
    """Refuses a policy that would blind itself.

    Args:
        policy: What was asked for.
        data_parallel: The ranks that average their gradients; None where there is one only.

    Raises:
        ValueError: If it follows a noise scale that there may be none of.
    """
    if isinstance(policy, AccumulateByNoiseScale) and policy.min == 1 and data_parallel is None:
        raise ValueError(ALONE.format(policy=policy))


class AccumulationPlan:
    """Asks the policy before each window, and tells of every change.

    Attributes:
        checked: Whether a step whose window has another number is refused. A framework's adapter,
            which leaves the windows to the framework, switches it off.
        by_framework: Whether that framework accumulates, whatever the policy says.
        micro_batches: Micro-batches of the window under way.
        lr_factor: What the learning rate is multiplied with in the step under way.
        fixed: Whether all windows have the same, so that nobody needs to decide.
        by_noise: Whether the noise scale decides, so that all ranks must have the same.
    """

    def __init__(self, policy: AccumulatePolicy, on_change: OnChange) -> None:
        """Begins the first window.

        Args:
            policy: Decides.
            on_change: Told of every change.
        """
        self.checked = True
        self.by_framework = False
        self.by_noise = not isinstance(policy, (FixedAccumulation, AccumulationSchedule))
        self.fixed = isinstance(policy, FixedAccumulation)
        self._policy = policy
        self._on_change = on_change
        self._read()

    def _read(self) -> None:
        self.micro_batches, self.lr_factor = self._policy.micro_batches, self._policy.lr_factor

    @property
    def accumulates(self) -> bool:
        """Whether a step may ever have more than one micro-batch."""
        return self.by_framework or self._policy.most != 1

    def next_window(self, step: int, noise: Callable[[], NoiseScale]) -> None:
        """Has the next window decided about.

        Args:
            step: Optimizer steps done so far.
            noise: Gives the noise scale; waits for numbers that are still on their way, and is
                asked only where they are needed.
        """
        looked = noise() if self._policy.looks_at(step) else None
        old, new = self.micro_batches, self._policy.decide(step, looked or UNKNOWN)
        self._read()
        if new != old:
            self._on_change(step + 1, old, new, looked)

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs to decide the same."""
        return {"policy": type(self._policy).__name__, "state": self._policy.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes back what :meth:`state_dict` gave; another policy than that begins anew."""
        if state["policy"] == type(self._policy).__name__:
            self._policy.load_state_dict(state["state"])
            self._read()


_NAN = float("nan")
UNKNOWN = NoiseScale(_NAN, _NAN, _NAN, _NAN, valid=False, updates=0, suggested_micro_batches=None)
"""What a policy is given at steps where it does not look."""
