"""sinks_of: the sinks by which one tracker of an Accelerator gets the steps."""

from __future__ import annotations

from typing import Any

from gradwatch import Sink
from gradwatch.adapters import warn_safely
from gradwatch_loggers import ScalarSink

PLAIN = (
    "AcceleratorSink logs to the tracker {name} as accelerator.log() does, because of {kind}: "
    "{error}"
)


def name_of(tracker: Any) -> str:
    """Returns what a tracker is called in ``Accelerator(log_with=)``."""
    return str(getattr(tracker, "name", type(tracker).__name__))


def sinks_of(tracker: Any, prefix: str, *, blocks: bool, statistics: bool) -> list[Sink]:
    """Makes the sinks for a tracker, by what it writes to.

    Args:
        tracker: A ``GeneralTracker`` that has been started.
        prefix: What tags begin with, ``"generator/"``; empty for one watcher alone.
        blocks: Whether the norms of blocks are logged.
        statistics: Whether the statistics are logged.
    """
    more = {"blocks": blocks, "statistics": statistics}
    try:
        run = tracker.tracker
    except Exception:  # a tracker of the user's own need not have one
        run = None
    home = type(run).__module__.partition(".")[0]
    try:
        if home == "wandb":
            from gradwatch_loggers import WandbSink

            # W&B drops a row whose step is below its newest; this sink costs the loop none.
            return [WandbSink(run, name=prefix.rstrip("/"), **more)]
        if home == "mlflow":
            from gradwatch_loggers import MLflowSink

            # It does not wait for the server at every step, as the tracker does.
            run_id = run.info.run_id
            return [MLflowSink(run_id, prefix=prefix, blocks=blocks, statistics=statistics)]
        tab = _gradients_tab(run, every=1 if any(more.values()) else 10) if not prefix else []
        # The writer of the tab has the blocks and the statistics anyway, under the same tags.
        return [_rows_of(tracker, prefix, **({} if tab else more)), *tab]
    except Exception as error:
        text = PLAIN.format(name=name_of(tracker), kind=type(error).__name__, error=error)
        warn_safely(f"gradwatch: {text}")
    return [_rows_of(tracker, prefix, **more)]


def _rows_of(tracker: Any, prefix: str, **more: bool) -> Sink:
    """Makes the sink that logs each step as a row, in the thread of the training."""

    def log(step: int, scalars: dict[str, float]) -> None:
        tracker.log({prefix + tag: value for tag, value in scalars.items()}, step=step)

    return ScalarSink(log, background=False, deliver="step", **more)


def _gradients_tab(writer: Any, every: int) -> list[Sink]:
    """Makes the sink for what TensorBoard's Gradients tab shows.

    Args:
        writer: What the tracker writes to: tensorboardX's takes no Events of ours.
        every: Steps between two values of a block.
    """
    if not type(writer).__module__.startswith("torch.utils.tensorboard"):
        return []
    from gradwatch_tensorboard import TensorBoardWriter

    return [TensorBoardWriter(writer, block_every=every, step_scalars=False)]
