"""sink_of: the sink by which one logger of a Fabric gets the steps."""

from __future__ import annotations

from typing import Any

from gradwatch import Sink
from gradwatch.adapters import warn_safely
from gradwatch_loggers import ScalarSink

PLAIN = (
    "gradwatch: FabricSink logs to the {name} as fabric.log_dict() does, because of {kind}: {error}"
)


class LoggerRows(ScalarSink):
    """Logs each step as a row of one logger, in the thread of the training."""

    def __init__(self, logger: Any, prefix: str, *, blocks: bool, statistics: bool) -> None:
        """Starts with a logger of Fabric's or Lightning's; opens nothing.

        Args:
            logger: Has a method ``log_metrics(metrics, step)``.
            prefix: What tags begin with, ``"generator/"``.
            blocks: Whether the norms of blocks are logged.
            statistics: Whether the statistics are logged.
        """

        def log(step: int, scalars: dict[str, float]) -> None:
            tagged = {f"{prefix}{tag}": value for tag, value in scalars.items()}
            logger.log_metrics(tagged, step=step)

        more = {"blocks": blocks, "statistics": statistics}
        super().__init__(log, background=False, deliver="step", **more)
        self._logger = logger

    def close(self) -> None:
        """Has the logger save what it holds back."""
        super().close()
        if callable(save := getattr(self._logger, "save", None)):
            save()


def sink_of(logger: Any, name: str, blocks: bool, statistics: bool) -> Sink:
    """Makes the sink for a logger, by what it writes to.

    Args:
        logger: A logger of Fabric's or Lightning's.
        name: What tags begin with; empty for one watcher alone.
        blocks: Whether the norms of blocks are logged.
        statistics: Whether the statistics are logged.
    """
    prefix = f"{name}/" if name else ""
    rows = LoggerRows(logger, prefix, blocks=blocks, statistics=statistics)
    kinds = {kind.__name__ for kind in type(logger).__mro__}
    try:
        if "WandbLogger" in kinds:
            from gradwatch_loggers import WandbSink

            # W&B drops a row whose step is below its newest; this sink costs the loop none.
            run = logger.experiment
            return WandbSink(run, name=name, blocks=blocks, statistics=statistics)
        if "MLFlowLogger" in kinds and not prefix:
            from gradwatch_loggers import MLflowSink

            # The logger waits for the server at every step.
            return MLflowSink(logger.run_id, blocks=blocks, statistics=statistics)
        if "TensorBoardLogger" in kinds and not (prefix or getattr(logger, "_prefix", "")):
            # The logger writes each number by itself, which takes a millisecond per step.
            return _tensorboard_sink(logger.experiment, blocks) or rows
    except Exception as error:
        values = {"name": type(logger).__name__, "kind": type(error).__name__, "error": error}
        warn_safely(PLAIN.format(**values))
    return rows


def _tensorboard_sink(writer: Any, blocks: bool) -> Sink | None:
    """Makes the sink that writes a step as one Event, and what the Gradients tab shows.

    Returns:
        None if the logger writes to tensorboardX, which takes no Events of ours.
    """
    if not type(writer).__module__.startswith("torch.utils.tensorboard"):
        return None
    from gradwatch_lightning.tensorboard import LoggerSink

    return LoggerSink(writer, block_every=1 if blocks else 10)
