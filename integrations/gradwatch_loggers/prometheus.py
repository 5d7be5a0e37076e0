"""PrometheusSink: the state of a training for Prometheus, in a file, at a port or in a registry."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

try:
    from prometheus_client import REGISTRY, CollectorRegistry, generate_latest, start_http_server
except ModuleNotFoundError as error:
    if error.name != "prometheus_client":
        raise
    raise ModuleNotFoundError(
        "PrometheusSink needs prometheus_client, which is not installed. "
        "Run: pip install 'gradwatch[prometheus]'",
        name=error.name,
    ) from error

from gradwatch import RecordBatch
from gradwatch.adapters import BlockScalars, described, shown
from gradwatch_loggers.arguments import Deliver, checked_deliver, checked_file, checked_flag
from gradwatch_loggers.background import CLOSED
from gradwatch_loggers.prometheus_metrics import OWN_LABELS, Metrics
from gradwatch_loggers.prometheus_registry import Collector

NAME = "PrometheusSink"
EVERY_S = 1.0
"""The least time between two writings of the file; Prometheus reads it every 15 seconds or so."""

_LABEL = re.compile(r"(?!__)[a-zA-Z_][a-zA-Z0-9_]*\Z")


class PrometheusSink:
    """Shows the newest step and counts of what happened to Prometheus.

    In one of three ways: a file for node_exporter's textfile collector, a port of its own, or a
    registry of ``prometheus_client`` that the program serves or pushes itself. ``docs/boards.md``
    lists the metrics. A gauge that is NaN makes every comparison false: alert on
    ``increase(gradwatch_nonfinite_steps_total[5m]) > 0``.

    Attributes:
        deliver: When the watcher hands records over.

    Example:
        >>> import gradwatch
        >>> from gradwatch.testing import LinearModel
        >>> registry, model = CollectorRegistry(), LinearModel([3.0, 4.0])
        >>> sink = PrometheusSink(registry=registry)
        >>> with gradwatch.watch(model, sinks=[sink]) as watcher:
        ...     model().backward()
        ...     watcher.flush()
        ...     registry.get_sample_value("gradwatch_grad_norm", {"optimizer": "none"})
        5.0
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        port: int | None = None,
        address: str = "127.0.0.1",
        registry: CollectorRegistry | None = None,
        labels: Mapping[str, str] | None = None,
        blocks: bool = False,
        statistics: bool = False,
        deliver: Deliver = "batch",
    ) -> None:
        """Makes a sink; the file is written, or the port opened, with the first step.

        Without path, port and registry the metrics are in the default registry of
        ``prometheus_client``.

        Args:
            path: A file that ends in ``.prom``, in the folder that node_exporter reads. It is
                replaced as a whole at most once a second, and stays there at the end with
                ``gradwatch_training_running 0``.
            port: Where to serve ``/metrics``; 0 for a free one, which :attr:`port` tells. It is
                closed at the end.
            address: Where to listen: ``"0.0.0.0"`` for a Prometheus on another machine.
            registry: A registry that the program serves itself. The metrics are in it until the
                end.
            labels: Put on every metric, ``{"run": "lr3e-4"}``. Models in one registry need
                different ones.
            blocks: Whether to show the norm of each part of the model, too.
            statistics: Whether to show what ``watch(statistics=)`` measures of each part.
            deliver: ``"batch"``: up to 64 steps or 5 seconds at a time; ``"step"``: each step.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If more than one of path, port and registry is given, or one is out of
                bounds.
        """
        ways = {"path": path, "port": port, "registry": registry}
        given = [f"{name}=" for name, value in ways.items() if value is not None]
        if len(given) > 1:
            raise ValueError(
                f"{NAME} got {' and '.join(given)}, and shows the metrics in one way. "
                "Make a sink for each, each with a registry or file of its own."
            )
        self._path = None if path is None else _checked_prom(path)
        self._port = None if port is None else _checked_port(port)
        if not isinstance(address, str):
            raise TypeError(f"{NAME}(address=) must be a string, got {described(address)}.")
        if registry is not None and not hasattr(registry, "register"):
            raise TypeError(
                f"{NAME}(registry=) must be a CollectorRegistry, got {described(registry)}."
            )
        self._address = address
        own = CollectorRegistry() if given else REGISTRY
        self._registry: Any = own if registry is None else registry
        self._metrics = Metrics(_checked_labels(labels))
        self._blocks = BlockScalars(
            norms=checked_flag(f"{NAME}(blocks=)", blocks),
            statistics=checked_flag(f"{NAME}(statistics=)", statistics),
        )
        self.deliver: Deliver = checked_deliver(NAME, deliver)
        self._counted: RecordBatch | None = None
        self._registered = self._closed = False
        self._server: Any = None
        self._next_s = 0.0

    @property
    def port(self) -> int | None:
        """The port that is served; None before the first step, and where none was asked for."""
        return None if self._server is None else self._server.server_port

    def write(self, batch: RecordBatch) -> None:
        """Adds a batch; after an error, pass the same batch again.

        Raises:
            OSError: If the port is taken, or the disk is full, read-only or gone.
            ValueError: If the registry holds another run's metrics.
            RuntimeError: If this is closed.
        """
        if self._closed:
            raise RuntimeError(CLOSED.format(name=NAME))
        if batch is not self._counted:
            self._counted = batch
            self._metrics.add(batch.steps, batch.events, self._blocks_of(batch))
        if not self._registered:
            Collector.add(self._registry, self._metrics)
            self._registered = True
        if self._port is not None and self._server is None:
            self._server, _ = start_http_server(
                self._port, addr=self._address, registry=self._registry
            )
        if self._path is not None and time.monotonic() >= self._next_s:
            self._write_file(self._path)

    def close(self) -> None:
        """Writes the file a last time; closes the port, or takes the metrics from the registry.

        Raises:
            OSError: If the disk is full, read-only or gone.
        """
        if self._closed:
            return
        self._closed = True
        self._metrics.end()
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
        if not self._registered:
            return
        try:
            if self._path is not None:
                self._write_file(self._path)
        finally:
            Collector.remove(self._registry, self._metrics)

    def _blocks_of(self, batch: RecordBatch) -> dict[str, dict[tuple[str, str], float]]:
        """Returns, by optimizer, the newest number of each (statistic, block)."""
        newest: dict[str, dict[tuple[str, str], float]] = {}
        for record, values in zip(batch.steps, self._blocks.of(batch), strict=True):
            for tag, value in values.items():
                statistic, _, block = tag.partition("/")
                statistic = "norm" if statistic == "blocks" else statistic
                newest.setdefault(record.optimizer, {})[statistic, block] = value
        return newest

    def _write_file(self, path: Path) -> None:
        """Replaces the file as a whole: node_exporter never reads half of one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_name(f".{path.name}.{os.getpid()}")  # which it does not read
        try:
            new.write_bytes(generate_latest(self._registry))
            new.replace(path)
        finally:
            new.unlink(missing_ok=True)
        self._next_s = time.monotonic() + EVERY_S


def _checked_prom(value: object) -> Path:
    path = checked_file(f"{NAME}(path)", value, "gradwatch.prom")
    if path.suffix != ".prom":
        raise ValueError(
            f"{NAME}(path) must end in .prom, got {shown(value)}: node_exporter reads no other "
            f"file. Write {str(path.with_suffix('.prom'))!r}."
        )
    return path


def _checked_port(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{NAME}(port=) must be a number, got {described(value)}. Write 9400.")
    if not 0 <= value <= 65_535:
        raise ValueError(f"{NAME}(port=) must be from 0 to 65535, got {value}. Write 9400.")
    return value


def _checked_labels(value: object) -> dict[str, str]:
    name = f"{NAME}(labels=)"
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(v, str) for v in value.values()):
        raise TypeError(
            f"{name} must be a dict of strings, got {described(value)}. "
            'Write {"run": "lr3e-4"}, for instance.'
        )
    for label in value:
        if not (isinstance(label, str) and _LABEL.match(label)) or label in OWN_LABELS:
            raise ValueError(
                f"{name} got the label {shown(label)}. A label consists of letters, digits and "
                f"underscores, begins with a letter, and is none of {', '.join(OWN_LABELS)}."
            )
    return dict(value)
