"""The ways to train that overhead.py compares: bare, with PyTorch's clip, and with gradwatch."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from _overhead_workloads import Training
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import gradwatch
from _overhead_within import METER, metered
from gradwatch.observe.statistics import STATISTICS
from gradwatch_tensorboard import TensorBoardWriter

LIMITS = {"nothing clipped": 1e6, "every step clipped": 1e-3}  # max_norm

BARE = "bare loop"
CLIP = "clip_grad_norm_"
WATCH = "watch()"
WATCH_CLIP = "watch(clip=)"
TENSORBOARD = "watch(clip=) + TensorBoard"
FOLDER = "watch(clip=) + run folder"
BOTH = "watch(clip=) + TensorBoard + run folder"
STATISTICS_ON = "watch(statistics=all of them)"
MANAGED = "watch(clip=, accumulate=), managed loop"

Step = Callable[[], object]
Lend = Callable[[], AbstractContextManager[Step]]


@dataclass(frozen=True)
class Way:
    """A way to train.

    Attributes:
        name: What the table calls it.
        lend: Prepares the training, lends its step, and leaves the training as it was.
        regime: Under which of ``LIMITS`` it clips; empty where it does not clip.
        sinks: Which sinks get its records: ``tensorboard``, ``folder``; None where it has none.
        precise: Whether a target hangs on it, so that it has more turns than the others.
    """

    name: str
    lend: Lend
    regime: str = ""
    sinks: tuple[str, ...] | None = None
    precise: bool = True

    @property
    def key(self) -> tuple[str, str]:
        """Name and regime."""
        return self.name, self.regime

    def label(self) -> Way:
        """Returns the way without the model that it trains, which would live on with it."""
        return replace(self, lend=partial(lend_step, lambda: None))


class DrainedTensorBoard:
    """A TensorBoardWriter whose background thread is waited for.

    Else its work would fall into the steps of another way.
    """

    def __init__(self, folder: str) -> None:
        """Opens the writer.

        Args:
            folder: Where to write.
        """
        self._writer = SummaryWriter(folder)
        self._sink = TensorBoardWriter(self._writer)

    def write(self, batch: gradwatch.RecordBatch) -> None:
        """Writes, and waits until the file has it."""
        self._sink.write(batch)
        self._writer.flush()

    def close(self) -> None:
        """Closes the file."""
        self._sink.close()
        self._writer.close()


def sink_options(sinks: tuple[str, ...], folder: str) -> dict[str, Any]:
    """Makes the options of ``watch`` for some sinks.

    Args:
        sinks: ``tensorboard``, ``folder``.
        folder: Where they may write.
    """
    options: dict[str, Any] = {}
    if "tensorboard" in sinks:
        options["sinks"] = [DrainedTensorBoard(str(Path(folder) / "tensorboard"))]
    if "folder" in sinks:
        options["run_dir"] = Path(folder) / "run"
    return options


@contextmanager
def lend_step(step: Step) -> Iterator[Step]:
    """Lends a step that needs no preparation."""
    yield step


@contextmanager
def watched(training: Training, sinks: tuple[str, ...] = (), **options: Any) -> Iterator[Step]:
    """Lends the bare step while a watcher is attached."""
    with tempfile.TemporaryDirectory() as folder:
        options |= sink_options(sinks, folder)
        with gradwatch.watch(training.model, training.optimizer, **options) as watcher:
            METER.read = lambda: watcher.overhead.seconds
            yield training.step
    METER.read = None  # the watcher, and with it the model, would live on in it


@contextmanager
def clipped(training: Training, max_norm: float) -> Iterator[Step]:
    """Lends the step with PyTorch's clip in it."""
    call = metered(lambda: nn.utils.clip_grad_norm_(training.parameters, max_norm))
    yield lambda: training.step(call)


@contextmanager
def managed(training: Training, max_norm: float) -> Iterator[Step]:
    """Lends a step of gradwatch's own loop."""
    model, optimizer, number = training.model, training.optimizer, training.accumulate
    with gradwatch.watch(model, optimizer, clip=max_norm, accumulate=number) as watcher:

        def step() -> None:
            for _ in range(number):
                watcher.backward(training.loss_of())
                watcher.step()

        yield step


def bare(training: Training) -> Way:
    """Returns the loop that all others are held against."""
    return Way(BARE, lambda: lend_step(training.step))


def clip_ways(training: Training) -> list[Way]:
    """Returns PyTorch's clip, where it does nothing and where it clips every step."""
    return [
        Way(CLIP, partial(clipped, training, limit), regime) for regime, limit in LIMITS.items()
    ]


def gradwatch_ways(training: Training) -> list[Way]:
    """Returns gradwatch alone, with clip, with sinks, and with all that it can take."""
    untouched, clipped = LIMITS
    kinds = [
        (WATCH_CLIP, untouched, ()),
        (WATCH_CLIP, clipped, ()),
        (TENSORBOARD, untouched, ("tensorboard",)),
        (FOLDER, untouched, ("folder",)),
        (BOTH, untouched, ("tensorboard", "folder")),
        (BOTH, clipped, ("tensorboard", "folder")),
    ]
    ways = [Way(WATCH, partial(watched, training), sinks=())]
    for name, regime, sinks in kinds:
        lend = partial(watched, training, sinks, clip=LIMITS[regime])
        ways.append(Way(name, lend, regime, sinks))
    every = partial(watched, training, statistics=STATISTICS)
    ways.append(Way(STATISTICS_ON, every, sinks=(), precise=False))
    if training.accumulate > 1:
        lend = partial(managed, training, LIMITS[untouched])
        ways.append(Way(MANAGED, lend, untouched, (), precise=False))
    return ways
