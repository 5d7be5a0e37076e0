"""MLflowSink: the numbers of each step as metrics of a run of MLflow, and a report at its end."""

from __future__ import annotations

import os
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

try:
    import mlflow
    from mlflow.entities import Metric
except ModuleNotFoundError as error:
    if error.name != "mlflow":
        raise
    raise ModuleNotFoundError(
        "MLflowSink needs MLflow, which is not installed. Run: pip install 'gradwatch[mlflow]'",
        name=error.name,
    ) from error

from gradwatch import RecordBatch, Watcher
from gradwatch.adapters import LoggerScalars, described
from gradwatch_loggers.arguments import (
    Deliver,
    checked_count,
    checked_deliver,
    checked_flag,
    checked_seconds,
)
from gradwatch_loggers.background import CLOSED, Background
from gradwatch_loggers.mlflow_artifacts import artifacts_of
from gradwatch_loggers.mlflow_keys import MetricKeys

NAME = "MLflowSink"
MOST_METRICS = 500
"""Metrics of a request. MLflow takes 1,000, but a database needs 0.3 ms for each."""

EVENTS_TAG = "gradwatch.events"
NO_RUN = (
    "no run of MLflow is active in the thread that trains. Write with mlflow.start_run(): around "
    "the training, or MLflowSink(run_id=...)"
)


class Row(NamedTuple):
    """The metrics of a step: its x, the time in ms since 1970, and values by tag."""

    step: int
    time_ms: int
    values: dict[str, float]


Job = Callable[[mlflow.MlflowClient, str], None]
"""Something else to be done with the client and the id of the run."""


class MLflowSink:
    """Logs the numbers of each step to a run of MLflow, and a report at the end.

    Everything is sent by a thread of its own, many steps with one request. If the server is slow
    or away, records are lost and counted, and the training goes on at its speed. A run that has
    been ended by then takes them all the same.

    Metrics are named as in every other logger, ``gradwatch/grad_norm``; characters that MLflow
    does not take become underscores. NaN is NaN there too; MLflow holds no Inf and stores
    1.8e308 in its place. The tag ``gradwatch.events`` counts events by kind. At the end the run
    has the artifacts ``gradwatch/report.txt``, ``gradwatch/events.jsonl`` and, with matplotlib,
    ``gradwatch/norms.png``, a heat map of the newest steps.

    Attributes:
        deliver: When the watcher hands records over.
    """

    def __init__(
        self,
        run_id: str | None = None,
        *,
        prefix: str = "",
        blocks: bool = False,
        statistics: bool = False,
        artifacts: bool = True,
        deliver: Deliver = "batch",
        most_waiting: int = 4_096,
        wait_s: float = 30.0,
    ) -> None:
        """Makes a sink; the thread starts with the first step.

        Args:
            run_id: The run; None for the one that is active in the thread that trains at the first
                step. Without one the watcher warns and tries again later.
            prefix: What every name begins with, ``"generator/"``: for several models in one run.
            blocks: Whether to log the norm of each part of the model, too.
            statistics: Whether to log what ``watch(statistics=)`` measures of each part, in the
                steps in which it was taken.
            artifacts: Whether to log the report, the events and the heat map at the end.
            deliver: ``"batch"``: up to 64 steps or 5 seconds at a time; ``"step"``: each step.
            most_waiting: The most records that are kept for a server that is slow or away; the
                oldest are lost beyond that.
            wait_s: The longest time, in seconds, that the end of the run waits for what is kept.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If a number is out of bounds, or the id is empty.
        """
        self._run_id = _checked_run(run_id)
        if not isinstance(prefix, str):
            raise TypeError(
                f"{NAME}(prefix=) must be a string, got {described(prefix)}. "
                'Write "generator/", for instance.'
            )
        self._prefix = prefix
        self._scalars = LoggerScalars(
            blocks=checked_flag(f"{NAME}(blocks=)", blocks),
            statistics=checked_flag(f"{NAME}(statistics=)", statistics),
        )
        self._artifacts = checked_flag(f"{NAME}(artifacts=)", artifacts)
        self._deliver: Deliver = checked_deliver(NAME, deliver)
        self._make = partial(
            Background[Row | Job],
            self._send,
            NAME,
            at_once=64,
            most=checked_count(f"{NAME}(most_waiting=)", most_waiting, "Write 4096, say."),
            wait_s=checked_seconds(f"{NAME}(wait_s=)", wait_s),
        )
        self._background: Background[Row | Job] | None = None
        self._client: mlflow.MlflowClient | None = None
        self._keys = MetricKeys()
        self._watcher: weakref.ref[Watcher] | None = None
        self._events: Counter[str] = Counter()
        self._closed = False

    @property
    def deliver(self) -> Deliver:
        """When the watcher hands records over; at once until the run is known.

        Later another one may be active: short stages have a run each.
        """
        return self._deliver if self._background is not None else "step"

    def attached(self, watcher: Watcher) -> None:
        """Notes whose steps come; the report and the heat map are those of it."""
        self._watcher = weakref.ref(watcher)

    def write(self, batch: RecordBatch) -> None:
        """Passes a batch on.

        Raises:
            RuntimeError: If no run is active, or this is closed.
        """
        if self._closed:
            raise RuntimeError(CLOSED.format(name=NAME))
        if self._background is None:
            self._background = self._begun()
        items = self._rows(batch)
        if batch.events:
            self._events.update(event.kind for event in batch.events)
            text = ", ".join(f"{number:,} {kind}" for kind, number in self._events.items())
            items.append(partial(_tag, key=self._keys[self._prefix + EVENTS_TAG], text=text))
        self._background.put(items)

    def flush(self, seconds: float = 30.0) -> bool:
        """Waits until MLflow has all that was handed over.

        ``watcher.flush()`` hands records over, and does not wait for MLflow.

        Returns:
            Whether it has, within the time.
        """
        return self._background is None or self._background.flush(seconds)

    def close(self) -> None:
        """Sends what waits and the artifacts, for a limited time; says how much is lost."""
        if self._closed:
            return
        self._closed = True
        if self._background is not None:
            watcher = self._watcher() if self._watcher is not None else None
            if self._artifacts and watcher is not None:
                self._background.put(self._report(watcher))
            self._background.close()

    def _begun(self) -> Background[Row | Job]:
        # The active run is that of a thread, and the URI may be another one later.
        self._run_id, self._uri = self._run_id or _active_run(), mlflow.get_tracking_uri()
        return self._make()

    def _rows(self, batch: RecordBatch) -> list[Row | Job]:
        began = time.time() - (batch.steps[-1].time_s if batch.steps else 0.0)
        return [
            Row(record.global_step, int((began + record.time_s) * 1000), values)
            for record, values in self._scalars.rows(batch)
        ]

    def _send(self, group: Sequence[Row | Job]) -> None:
        """Sends rows and does jobs, in the thread; safe to repeat: MLflow keeps no row twice."""
        if self._client is None:
            # Before MLflow waits to try again, it draws from the generator that the training may
            # use: its data would be others because a server was away.
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER", "0")
            self._client = mlflow.MlflowClient(tracking_uri=self._uri)
        run_id = self._run_id or ""
        metrics = [metric for row in group if isinstance(row, Row) for metric in self._metrics(row)]
        for start in range(0, len(metrics), MOST_METRICS):
            part = metrics[start : start + MOST_METRICS]
            self._client.log_batch(run_id, metrics=part, synchronous=True)
        for job in group:
            if not isinstance(job, Row):
                job(self._client, run_id)

    def _metrics(self, row: Row) -> Iterator[Metric]:
        for tag, value in row.values.items():
            yield Metric(self._keys[self._prefix + tag], value, row.time_ms, row.step)

    def _report(self, watcher: Watcher) -> list[Row | Job]:
        folder = self._keys[f"{self._prefix}gradwatch"]
        return [
            partial(_artifact, folder=folder, name=name, data=data)
            for name, data in artifacts_of(watcher).items()
        ]


def _tag(client: mlflow.MlflowClient, run_id: str, key: str, text: str) -> None:
    client.set_tag(run_id, key, text, synchronous=True)


def _artifact(
    client: mlflow.MlflowClient, run_id: str, folder: str, name: str, data: bytes
) -> None:
    with TemporaryDirectory() as here:
        file = Path(here) / name
        file.write_bytes(data)
        client.log_artifact(run_id, str(file), folder)


def _active_run() -> str:
    run: Any = mlflow.active_run()
    if run is None:
        raise RuntimeError(NO_RUN)
    return str(run.info.run_id)


def _checked_run(value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise TypeError(
            f"{NAME}(run_id) must be the id of a run, got {described(value)}. "
            "Write run.info.run_id, or leave it out for the active run."
        )
    if not value.strip():
        raise ValueError(f"{NAME}(run_id) must not be empty. Leave it out for the active run.")
    return value
