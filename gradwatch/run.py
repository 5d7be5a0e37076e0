"""Run: what all parts of a watcher share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from gradwatch.accumulation import Accumulation
from gradwatch.control.loss_scale import LossScale
from gradwatch.observe.data_parallel import DataParallel
from gradwatch.observe.model_hooks import ModelHooks
from gradwatch.observe.parameters import ParameterTable
from gradwatch.observe.shards import Shards
from gradwatch.options import Options
from gradwatch.overhead import Stopwatch
from gradwatch.recorder import Recorder


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
    """

    table: ParameterTable
    shards: Shards | None
    options: Options
    scale: LossScale
    recorder: Recorder
    stopwatch: Stopwatch
    hooks: ModelHooks
    accumulation: Accumulation
    data_parallel: DataParallel | None
    global_step: Callable[[int], int]
