"""Several models in one registry of prometheus_client: one collector shows them all."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

from prometheus_client.core import Metric

from gradwatch_loggers.prometheus_metrics import Metrics

TAKEN = (
    "the registry holds the metrics of another sink with labels {labels}. Give each model labels "
    'of its own: PrometheusSink(labels={{"model": "generator"}})'
)


class Collector:
    """Collects what several sinks have put into one registry; each metric is one family there."""

    _of: ClassVar[WeakKeyDictionary[Any, Collector]] = WeakKeyDictionary()
    _lock: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self) -> None:
        """Starts empty."""
        self.members: list[Metrics] = []

    @classmethod
    def add(cls, registry: Any, metrics: Metrics) -> None:
        """Puts metrics into a registry.

        Raises:
            ValueError: If it holds metrics with the same labels, or somebody else's of that name.
        """
        with cls._lock:
            collector = cls._of.get(registry)
            if collector is None:
                collector = cls()
                registry.register(collector)
                cls._of[registry] = collector
            if any(one.labels == metrics.labels for one in collector.members):
                raise ValueError(TAKEN.format(labels=metrics.labels))
            collector.members = [*collector.members, metrics]

    @classmethod
    def remove(cls, registry: Any, metrics: Metrics) -> None:
        """Takes them out again."""
        with cls._lock:
            collector = cls._of[registry]
            collector.members = [one for one in collector.members if one is not metrics]
            if not collector.members:
                registry.unregister(collector)
                del cls._of[registry]

    def describe(self) -> list[Metric]:
        """Returns the metrics without numbers: a registry looks for names that are taken."""
        return list(Metrics({}).collect())

    def collect(self) -> Iterator[Metric]:
        """Returns all metrics as they are now."""
        families: dict[str, Metric] = {}
        for metrics in self.members:
            for family in metrics.collect():
                known = families.setdefault(family.name, family)
                if known is not family:
                    known.samples.extend(family.samples)
        return iter(families.values())
