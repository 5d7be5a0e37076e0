"""Metrics: the state of a training as Prometheus reads it: gauges, counters and a histogram."""

from __future__ import annotations

import math
import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from gradwatch import Event, StepRecord
from gradwatch.adapters import EVENT_KINDS, SCALARS, STEP_COLUMNS, StepScalars, sentence

BOUNDS = tuple(float(f"{digit}e{power}") for power in range(-6, 7) for digit in (1, 3))
"""Upper bounds of the buckets of the histogram: two per power of ten."""

OUTCOMES = ("skipped_nonfinite", "skipped_scaler", "skipped_policy")

OWN_LABELS = ("optimizer", "block", "kind", "outcome", "le")
"""Labels that are taken."""

COUNTERS = {
    "steps": "Optimizer steps.",
    "clipped_steps": "Steps whose gradients a clip changed.",
    "nonfinite_steps": "Steps whose gradients held a NaN or an Inf.",
}


class Metrics:
    """What has been seen of the steps, as families of ``prometheus_client``.

    A gauge has the newest step that was there when it was read. What must not be missed between two
    readings is counted: events, clips, skips, and each finite norm in a histogram.

    Attributes:
        labels: Put on every metric.
    """

    def __init__(self, labels: Mapping[str, str]) -> None:
        """Starts without a step."""
        self.labels = dict(labels)
        self._lock = threading.Lock()  # a server reads in its own thread
        self._running = 1.0
        self._scalars: dict[str, StepScalars] = {}
        self._newest: dict[str, dict[str, float]] = {}
        self._blocks: dict[str, dict[tuple[str, str], float]] = {}
        self._steps: dict[str, Counter[str]] = {name: Counter() for name in COUNTERS}
        self._outcomes: Counter[tuple[str, str]] = Counter()
        self._events: Counter[tuple[str, str]] = Counter()
        self._buckets: dict[str, list[int]] = {}
        self._sums: Counter[str] = Counter()

    def add(
        self,
        records: Sequence[StepRecord],
        events: Sequence[Event],
        blocks: Mapping[str, Mapping[tuple[str, str], float]],
    ) -> None:
        """Adds some steps.

        Args:
            records: The steps, oldest first.
            events: What happened in them.
            blocks: By optimizer, the newest number of each (statistic, block).
        """
        now = time.time() - (records[-1].time_s if records else 0.0)
        with self._lock:
            for record in records:
                self._add(record, now + record.time_s)
            for event in events:
                self._begin(event.optimizer)
                self._events[event.optimizer, event.kind] += 1
            for optimizer, numbers in blocks.items():
                self._blocks.setdefault(optimizer, {}).update(numbers)

    def end(self) -> None:
        """Notes that the training is over."""
        with self._lock:
            self._running = 0.0

    def collect(self) -> Iterator[Metric]:
        """Returns all metrics as they are now."""
        with self._lock:
            families = [*self._gauges(), *self._counters(), *self._histograms()]
        return iter(families)

    def _begin(self, optimizer: str) -> None:
        if optimizer in self._scalars:
            return
        self._scalars[optimizer] = StepScalars(SCALARS)
        self._buckets[optimizer] = [0] * (len(BOUNDS) + 1)
        # What has not happened is 0 from the start: increase() sees the first time then.
        for counts in self._steps.values():
            counts[optimizer] = 0
        self._outcomes.update({(optimizer, outcome): 0 for outcome in OUTCOMES})
        self._events.update({(optimizer, kind): 0 for kind in EVENT_KINDS})

    def _add(self, record: StepRecord, wall_time: float) -> None:
        name = record.optimizer
        self._begin(name)
        values = self._scalars[name].of(record)
        more = {"global_step": float(record.global_step), "last_step_time_seconds": wall_time}
        self._newest[name] = {**values, **more}
        self._steps["steps"][name] += 1
        self._steps["clipped_steps"][name] += bool(record.clipped)
        self._steps["nonfinite_steps"][name] += record.nonfinite_parameters > 0
        if record.outcome != "applied":
            self._outcomes[name, record.outcome] += 1
        if math.isfinite(record.grad_norm):  # one NaN would make a NaN of the sum for ever
            self._buckets[name][bisect_left(BOUNDS, record.grad_norm)] += 1
            self._sums[name] += record.grad_norm  # type: ignore[assignment]

    def _gauges(self) -> Iterator[Metric]:
        running = self._gauge("training_running", "1 during the training, 0 after its end.")
        running.add_metric(self._with(), self._running)
        yield running
        for name in (*SCALARS, "global_step", "last_step_time_seconds"):
            gauge = self._gauge(name, _NEWEST.get(name) or _meaning(name), "optimizer")
            for optimizer, values in self._newest.items():
                if name in values:
                    gauge.add_metric(self._with(optimizer), values[name])
            if gauge.samples:
                yield gauge
        yield from self._of_blocks()

    def _of_blocks(self) -> Iterator[Metric]:
        statistics = {statistic for of in self._blocks.values() for statistic, _ in of}
        for wanted in sorted(statistics):
            meaning = f"Statistic {wanted} of a part of the model, when it was last taken: that of "
            meaning += "the parameter where it is largest in magnitude."
            if wanted == "norm":
                meaning = "L2 norm of the gradients of a part of the model, before the clip."
            gauge = self._gauge(f"block_{wanted}", meaning, "optimizer", "block")
            for optimizer, values in self._blocks.items():
                for (statistic, block), value in values.items():
                    if statistic == wanted:
                        gauge.add_metric(self._with(optimizer, block), value)
            yield gauge

    def _counters(self) -> Iterator[Metric]:
        for name, meaning in COUNTERS.items():
            counter = self._counter(name, meaning, "optimizer")
            for optimizer, number in self._steps[name].items():
                counter.add_metric(self._with(optimizer), number)
            yield counter
        outcomes = self._counter(
            "skipped_steps", "Steps that were not applied.", "optimizer", "outcome"
        )
        events = self._counter("events", "Events, as History.events().", "optimizer", "kind")
        for family, counts in ((outcomes, self._outcomes), (events, self._events)):
            for values, number in counts.items():
                family.add_metric(self._with(*values), number)
            yield family

    def _histograms(self) -> Iterator[Metric]:
        histogram = HistogramMetricFamily(
            "gradwatch_grad_norms",
            "Total gradient norms before the clip, of all steps in which they were finite.",
            labels=[*self.labels, "optimizer"],
        )
        for optimizer, counts in self._buckets.items():
            sums = [sum(counts[: end + 1]) for end in range(len(counts))]
            buckets = [(str(bound), n) for bound, n in zip((*BOUNDS, "+Inf"), sums, strict=True)]
            histogram.add_metric(self._with(optimizer), buckets, self._sums[optimizer])
        yield histogram

    def _gauge(self, name: str, meaning: str, *labels: str) -> GaugeMetricFamily:
        return GaugeMetricFamily(f"gradwatch_{name}", meaning, labels=[*self.labels, *labels])

    def _counter(self, name: str, meaning: str, *labels: str) -> CounterMetricFamily:
        return CounterMetricFamily(f"gradwatch_{name}", meaning, labels=[*self.labels, *labels])

    def _with(self, *values: str) -> list[str]:
        return [*self.labels.values(), *values]


_NEWEST = {
    "global_step": "Step on the x-axis of loggers.",
    "last_step_time_seconds": "When the newest step ended, in seconds since 1970.",
}


def _meaning(name: str) -> str:
    """Returns what a column means, without the marks of a page."""
    text = sentence(STEP_COLUMNS[name]).replace("**", "").replace("`", "")
    return f"{text} Newest step."
