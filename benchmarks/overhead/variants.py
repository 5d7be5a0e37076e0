"""The training loops that are compared: bare, with PyTorch's clip, and with gradwatch.

There is also a floor: the least that any tool must do to measure and clip as gradwatch does.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter, setitem
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

import gradwatch
from benchmarks.overhead.workloads import Training
from gradwatch.measure.statistics import STATISTICS
from gradwatch_tensorboard import TensorBoardWriter

NOTHING_CLIPPED = "nothing clipped"
EVERY_STEP_CLIPPED = "every step clipped"
MAX_NORMS = {NOTHING_CLIPPED: 1e6, EVERY_STEP_CLIPPED: 1e-3}  # by regime

BARE = "bare loop"
CLIP = "clip_grad_norm_"
FLOOR = "hooks, one norm, multiply if needed"
WATCH = "watch()"
WATCH_CLIP = "watch(clip=)"
TENSORBOARD = "watch(clip=) + TensorBoard"
FOLDER = "watch(clip=) + run folder"
BOTH = "watch(clip=) + TensorBoard + run folder"
STATISTICS_ON = "watch(statistics=all of them)"
EXPLAIN = "watch(explain=True)"
MANAGED = "watch(clip=, accumulate=), managed loop"

Step = Callable[[], object]
Key = tuple[str, str]  # name and regime of a variant


@dataclass(frozen=True)
class Loop:
    """A training loop that is ready to run.

    Attributes:
        step: Runs one step of the loop.
        own_seconds: Returns the seconds that the variant has spent in its own calls so far; None
            if it does not measure them.
    """

    step: Step
    own_seconds: Callable[[], float] | None = None


@dataclass(frozen=True)
class Variant:
    """One way to train a model.

    Attributes:
        name: Name in the tables.
        prepare: Prepares the training, yields its loop, and restores the training.
        regime: Key of ``MAX_NORMS`` for the limit of its clip; empty if it does not clip.
        sinks: The sinks that receive its records: ``tensorboard``, ``folder``; None if it makes no
            records.
        precise: Whether it has a target, and so more turns than the others.
    """

    name: str
    prepare: Callable[[], AbstractContextManager[Loop]]
    regime: str = ""
    sinks: tuple[str, ...] | None = None
    precise: bool = True

    @property
    def key(self) -> Key:
        """Name and regime."""
        return self.name, self.regime

    def label(self) -> Variant:
        """Returns the variant without the model that it trains, so that the model can be freed."""
        return replace(self, prepare=partial(unprepared, lambda: None))


class DrainedTensorBoard:
    """A TensorBoardWriter that waits for its background thread.

    Otherwise the thread would work during the steps of another variant.
    """

    def __init__(self, folder: str) -> None:
        """Opens a writer in a folder."""
        self._writer = SummaryWriter(folder)
        self._sink = TensorBoardWriter(self._writer)

    def write(self, batch: gradwatch.RecordBatch) -> None:
        """Writes a batch, and waits until it is in the file."""
        self._sink.write(batch)
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._sink.close()
        self._writer.close()


def sink_options(sinks: tuple[str, ...], folder: str) -> dict[str, Any]:
    """Makes the options of ``watch`` for ``tensorboard`` and ``folder`` sinks in a folder."""
    options: dict[str, Any] = {}
    if "tensorboard" in sinks:
        options["sinks"] = [DrainedTensorBoard(str(Path(folder) / "tensorboard"))]
    if "folder" in sinks:
        options["run_dir"] = Path(folder) / "run"
    return options


@contextmanager
def unprepared(step: Step) -> Iterator[Loop]:
    """Yields the loop of a step that needs no preparation."""
    yield Loop(step)


@contextmanager
def watched(training: Training, sinks: tuple[str, ...] = (), **options: Any) -> Iterator[Loop]:
    """Yields the bare loop while a watcher is attached."""
    with tempfile.TemporaryDirectory() as folder:
        options |= sink_options(sinks, folder)
        with gradwatch.watch(training.model, training.optimizer, **options) as watcher:
            yield Loop(training.step, lambda: watcher.overhead.seconds)


@contextmanager
def managed(training: Training, max_norm: float) -> Iterator[Loop]:
    """Yields gradwatch's managed loop."""
    model, optimizer, number = training.model, training.optimizer, training.accumulate
    with gradwatch.watch(model, optimizer, clip=max_norm, accumulate=number) as watcher:

        def step() -> None:
            for _ in range(number):
                watcher.backward(training.loss_of())
                watcher.step()

        yield Loop(step)


@contextmanager
def clipped(training: Training, max_norm: float) -> Iterator[Loop]:
    """Yields the loop with PyTorch's clip in it."""
    seconds = 0.0

    def clip() -> None:
        nonlocal seconds
        start = time.perf_counter()
        nn.utils.clip_grad_norm_(training.parameters, max_norm)
        seconds += time.perf_counter() - start

    yield Loop(partial(training.step, clip), lambda: seconds)


_engine = torch.autograd.Variable._execution_engine
_grad = attrgetter("grad")


class _Marks(dict[int, Tensor]):
    """Parameters whose gradient has arrived; the first one queues a callback at the end."""

    measure: Any

    def __setitem__(self, index: int, tensor: Tensor) -> None:
        if not self:
            _engine.queue_callback(self.measure)
        super().__setitem__(index, tensor)


@contextmanager
def floor(training: Training, max_norm: float) -> Iterator[Loop]:
    """Yields the bare loop with a minimal tool attached.

    It marks arriving gradients, takes one batched norm at the end of the backward, and clips by
    that norm before the step. Nothing else: no records, no check for NaN, no check of what the loop
    does to the gradients. What gradwatch adds beyond this floor is its own cost; no rewrite could
    get below the floor.
    """
    parameters, total = training.parameters, torch.zeros(())
    marks = _Marks()

    def measure() -> None:
        nonlocal total
        marks.clear()
        norms = torch._foreach_norm(list(map(_grad, parameters)), 2.0, torch.float32)
        total = torch.linalg.vector_norm(torch.stack(norms))

    def clip(*_: object) -> None:
        if total.item() > max_norm:
            factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)
            torch._foreach_mul_(list(map(_grad, parameters)), factor)

    marks.measure = measure
    handles: list[Any] = [training.optimizer.register_step_pre_hook(clip)]
    for index, parameter in enumerate(parameters):
        mark = partial(setitem, marks, index)
        handles.append(parameter.register_post_accumulate_grad_hook(mark))
    try:
        yield Loop(training.step)
    finally:
        for handle in handles:
            handle.remove()


def bare(training: Training) -> Variant:
    """Returns the loop that all others are compared with."""
    return Variant(BARE, partial(unprepared, training.step))


def clip_variants(training: Training) -> list[Variant]:
    """Returns PyTorch's clip, with nothing to clip and clipping every step."""
    return [
        Variant(CLIP, partial(clipped, training, limit), regime)
        for regime, limit in MAX_NORMS.items()
    ]


def floor_variants(training: Training) -> list[Variant]:
    """Returns the floor, with nothing to clip and clipping every step."""
    return [
        Variant(FLOOR, partial(floor, training, limit), regime)
        for regime, limit in MAX_NORMS.items()
    ]


def gradwatch_variants(training: Training) -> list[Variant]:
    """Returns gradwatch alone, with a clip, sinks, all statistics, explaining, and managed."""
    kinds = [
        (WATCH_CLIP, NOTHING_CLIPPED, ()),
        (WATCH_CLIP, EVERY_STEP_CLIPPED, ()),
        (TENSORBOARD, NOTHING_CLIPPED, ("tensorboard",)),
        (FOLDER, NOTHING_CLIPPED, ("folder",)),
        (BOTH, NOTHING_CLIPPED, ("tensorboard", "folder")),
        (BOTH, EVERY_STEP_CLIPPED, ("tensorboard", "folder")),
    ]
    variants = [Variant(WATCH, partial(watched, training), sinks=())]
    for name, regime, sinks in kinds:
        prepare = partial(watched, training, sinks, clip=MAX_NORMS[regime])
        variants.append(Variant(name, prepare, regime, sinks))
    every = partial(watched, training, statistics=tuple(STATISTICS))
    variants.append(Variant(STATISTICS_ON, every, sinks=(), precise=False))
    kept = partial(watched, training, explain=True)
    variants.append(Variant(EXPLAIN, kept, sinks=(), precise=False))
    if training.accumulate > 1:
        prepare = partial(managed, training, MAX_NORMS[NOTHING_CLIPPED])
        variants.append(Variant(MANAGED, prepare, NOTHING_CLIPPED, (), precise=False))
    return variants
