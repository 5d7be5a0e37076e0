"""Other ways to monitor gradients: a loop of norms, Lightning, ignite, Weights & Biases."""

from __future__ import annotations

import importlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch

from benchmarks.overhead.variants import Loop, Step, Variant, unprepared
from benchmarks.overhead.workloads import Training

LOOP = "a loop of .norm().item()"
PEERS = {
    "Lightning's grad_norm": "lightning",
    "Lightning's grad_norm to TensorBoard": "lightning",
    "ignite's GradsScalarHandler": "ignite",
    "wandb.watch, offline": "wandb",
}
"""The package that each tool is imported from."""

DISTRIBUTIONS = {"lightning": "lightning", "ignite": "pytorch-ignite", "wandb": "wandb"}
"""The distribution to install for each package."""

SETTLE_S = 0.1
"""Pause for the background process of Weights & Biases before the next variant's turn."""


def missing() -> dict[str, str]:
    """Returns the packages that cannot be imported, each with the reason."""
    reasons = {name: _why_missing(name) for name in dict.fromkeys(PEERS.values())}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _why_missing(package: str) -> str | None:
    try:
        importlib.import_module(package)
    except ImportError as error:
        return str(error)
    return None


@contextmanager
def peer_variants(training: Training, failed: dict[str, str]) -> Iterator[list[Variant]]:
    """Starts the other tools for the duration of one setting.

    Args:
        training: The training that they monitor.
        failed: Receives the tools that are installed but cannot be started, with the reason.

    Yields:
        The loop of norms, and each tool that is installed.
    """
    makers: dict[str, Callable[[Training, str, ExitStack], Callable[[], Any]]] = {
        "Lightning's grad_norm": _lightning,
        "Lightning's grad_norm to TensorBoard": _lightning_tensorboard,
        "ignite's GradsScalarHandler": _ignite,
        "wandb.watch, offline": _wandb,
    }
    absent = missing()
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        loop = partial(unprepared, partial(training.step, partial(_loop, training)))
        variants = [Variant(LOOP, loop, precise=False)]
        for name, make in makers.items():
            if PEERS[name] in absent:
                continue
            try:
                variants.append(Variant(name, make(training, folder, stack), precise=False))
            except Exception as error:
                failed[name] = f"{type(error).__name__}: {error}"
        yield variants


def _loop(training: Training) -> list[float]:
    return [p.grad.norm().item() for p in training.parameters if p.grad is not None]


def _lightning(training: Training, folder: str, stack: ExitStack) -> Any:
    from lightning.pytorch.utilities import grad_norm

    return partial(unprepared, partial(training.step, lambda: grad_norm(training.model, 2)))


def _lightning_tensorboard(training: Training, folder: str, stack: ExitStack) -> Any:
    from lightning.pytorch.loggers import TensorBoardLogger
    from lightning.pytorch.utilities import grad_norm

    logger = TensorBoardLogger(folder, name="lightning")
    stack.callback(logger.experiment.close)
    count = _counter()

    def log() -> None:
        logger.log_metrics(grad_norm(training.model, 2), step=count())

    return partial(_flushed, partial(training.step, log), logger.experiment)


def _ignite(training: Training, folder: str, stack: ExitStack) -> Any:
    from ignite.engine import Engine, Events
    from ignite.handlers.tensorboard_logger import GradsScalarHandler, TensorboardLogger

    engine = Engine(lambda engine, batch: None)
    logger = TensorboardLogger(log_dir=f"{folder}/ignite")
    stack.callback(logger.close)
    handler = GradsScalarHandler(training.model, reduction=torch.norm)
    logger.attach(engine, event_name=Events.ITERATION_COMPLETED, log_handler=handler)
    count = _counter()

    def fire() -> None:
        engine.state.iteration = count()
        engine.fire_event(Events.ITERATION_COMPLETED)

    return partial(_flushed, partial(training.step, fire), logger.writer)


def _wandb(training: Training, folder: str, stack: ExitStack) -> Any:
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    settings = wandb.Settings(
        mode="offline", silent=True, console="off", x_disable_stats=True, x_disable_meta=True
    )
    run = wandb.init(project="benchmark", dir=folder, settings=settings, reinit="finish_previous")
    stack.callback(run.finish)

    def step() -> None:
        training.step()
        run.log({"step": 1.0})  # completes the row that the histograms are part of

    @contextmanager
    def prepare() -> Iterator[Loop]:
        run.watch(training.model, log="gradients", log_freq=1)
        try:
            yield Loop(step)
        finally:
            run.unwatch(training.model)
            time.sleep(SETTLE_S)

    return prepare


@contextmanager
def _flushed(step: Step, writer: Any) -> Iterator[Loop]:
    """Yields a loop, and waits for the SummaryWriter's thread before the next variant's turn."""
    yield Loop(step)
    writer.flush()


def _counter() -> Callable[[], int]:
    numbers = iter(range(1, 1 << 62))
    return lambda: next(numbers)
