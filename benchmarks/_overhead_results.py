"""Results: what the rounds of a setting come to."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from _overhead_counts import Counts
from _overhead_spread import Spread, ratio, ratios, spread
from _overhead_turns import Key, Round
from _overhead_ways import BARE, CLIP, LIMITS, Way
from _overhead_workloads import Setting

from _overhead_deliveries import steps_per_delivery

UNTOUCHED = next(iter(LIMITS))


@dataclass
class Result:
    """One setting, measured.

    Attributes:
        setting: Which one.
        ways: All that was compared with the bare loop; labels only.
        deliveries: By sinks, the seconds of writing 64 steps down and handing them over.
        turns: Turns of a precise way in a round.
        steps: Timed steps in a turn.
        rounds: What each round has measured.
        within: By way, the seconds of a step within its own calls, where it can tell.
        counts: By way, what one step makes PyTorch do; the bare loop is ``BARE, ""``.
    """

    setting: Setting
    ways: Sequence[Way]
    deliveries: Mapping[tuple[str, ...], float]
    turns: int
    steps: int
    rounds: list[Round] = field(default_factory=list)
    within: dict[Key, Spread] = field(default_factory=dict)
    counts: dict[Key, Counts] = field(default_factory=dict)

    @property
    def bare_s(self) -> float:
        """Seconds of a step of the bare loop."""
        return statistics.median(seconds for each in self.rounds for seconds in each.bare)

    def way(self, name: str, regime: str = "") -> Way | None:
        """Returns a way by its name, or None if this setting has none."""
        return next((way for way in self.ways if way.key == (name, regime)), None)

    def added(self, way: Way) -> list[float]:
        """Returns the seconds that a way adds to a step, by round, deliveries included."""
        shared = steps_per_delivery(self.bare_s)
        delivery_s = 0.0 if way.sinks is None else self.deliveries.get(way.sinks, 0.0) / shared
        return [each.added[way.key] + delivery_s for each in self.rounds]

    def ratios(self, way: Way) -> list[float]:
        """Returns what a way adds over what ``clip_grad_norm_`` adds, by round.

        One that does not clip is held against a clip that changes nothing.
        """
        clip = self.way(CLIP, way.regime or UNTOUCHED)
        return [] if clip is None else ratios(self.added(way), self.added(clip))

    def ratio(self, way: Way) -> Spread:
        """Returns the same over all rounds."""
        clip = self.way(CLIP, way.regime or UNTOUCHED)
        return spread([]) if clip is None else ratio(self.added(way), self.added(clip))

    def share(self, way: Way) -> Spread:
        """Returns what a way adds as a share of the bare step."""
        return spread(self.added(way)).times(1 / self.bare_s)

    def count(self, way: Way) -> Counts | None:
        """Returns what a way makes PyTorch do beyond the bare loop; None if nobody counted."""
        if way.key not in self.counts:
            return None
        return self.counts[way.key] - self.counts[BARE, ""]
