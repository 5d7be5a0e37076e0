"""Run: what all parts of a watcher share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from gradwatch.accumulate.policies import AccumulationPlan
from gradwatch.guard import Stopwatch
from gradwatch.hooks.data_parallel import DataParallel, rank
from gradwatch.hooks.model import ModelHooks
from gradwatch.hooks.scaler import LossScale
from gradwatch.measure.parameters import ParameterTable
from gradwatch.measure.sharded import Shards
from gradwatch.options import Options
from gradwatch.record.events import changed_event
from gradwatch.record.recorder import Recorder, RingBuffer, SinkHub
from gradwatch.record.records import Event, Layout


@dataclass(frozen=True, slots=True)
class Run:
    """A run being watched.

    Attributes:
        table: The watched tensors.
        shards: Knows which of them this rank holds a part of; None where all are whole.
        options: What the user asked for.
        scale: The loss scale.
        recorder: Takes what has happened.
        stopwatch: Measures what gradwatch itself takes.
        hooks: What hangs on the model.
        accumulation: How many micro-batches make a step.
        data_parallel: The ranks that average their gradients; None where there is one only.
        global_step: Gives the x-axis of loggers for a step.
        note: Takes an event that belongs to no finished step.
    """

    table: ParameterTable
    shards: Shards | None
    options: Options
    scale: LossScale
    recorder: Recorder
    stopwatch: Stopwatch
    hooks: ModelHooks
    accumulation: AccumulationPlan
    data_parallel: DataParallel | None
    global_step: Callable[[int], int]
    note: Callable[[Event], None]

    @classmethod
    def begin(
        cls,
        table: ParameterTable,
        options: Options,
        hooks: ModelHooks,
        data_parallel: DataParallel | None,
        global_step: Callable[[int], int],
    ) -> Run:
        """Begins a run in which nothing has happened yet.

        Args:
            table: The watched tensors.
            options: What the user asked for.
            hooks: What hangs on the model.
            data_parallel: The ranks that average their gradients; None where there is one only.
            global_step: Gives the x-axis of loggers for a step.
        """
        layout = Layout(
            names=table.names,
            modules=table.modules,
            shapes=tuple(tuple(tensor.shape) for tensor in table.tensors),
            aliases=table.aliases,
        )
        sinks = options.sinks if rank() == 0 else ()  # the ranks would write the same numbers
        hub = SinkHub(sinks, options.buffer_size)
        recorder = Recorder(RingBuffer(layout, options.buffer_size), hub)

        def note(event: Event) -> None:
            recorder.note((replace(event, global_step=global_step(event.step)),))

        return cls(
            table=table,
            shards=Shards.of(table.tensors),
            options=options,
            scale=LossScale(options.scaler),
            recorder=recorder,
            stopwatch=Stopwatch(),
            hooks=hooks,
            accumulation=AccumulationPlan(
                options.accumulate, lambda *change: note(changed_event(*change))
            ),
            note=note,
            data_parallel=data_parallel,
            global_step=global_step,
        )
