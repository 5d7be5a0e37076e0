"""What goes to the Trainer's TensorBoardLoggers, besides the scalars that all loggers get.

The module's name does not shadow the ``tensorboard`` package, because imports are absolute.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from gradwatch import RecordBatch, Sink
from gradwatch.adapters import warn_safely

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


NO_SINK = (
    "GradientMonitor writes nothing to a TensorBoardLogger, because of {kind}: {error} The fit "
    "and its other loggers go on."
)


def tensorboard_sinks(trainer: Trainer, has_blocks: bool) -> list[Sink]:
    """Makes a sink for each TensorBoardLogger, on the global rank 0 only.

    With ``has_blocks`` the logger is given the norms of module blocks, and the sink leaves them.

    The sink shares the logger's event file, so both appear as one run, and leaves the step scalars
    to the logger. A logger that fell back to tensorboardX gets no sink: its writer does not accept
    our Events.
    """
    loggers = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
    if not loggers or not trainer.is_global_zero:
        return []
    # Imported here: torch's writer needs TensorBoard, which users of other loggers may not have.
    try:
        from torch.utils.tensorboard import SummaryWriter

        import gradwatch_tensorboard  # noqa: F401 - whether it can be
    except ModuleNotFoundError as exc:
        if exc.name not in ("tensorboard", "gradwatch_tensorboard"):
            raise
        return []
    writers = [logger.experiment for logger in loggers]
    sinks = [_sink_of(one, not has_blocks) for one in writers if isinstance(one, SummaryWriter)]
    return [sink for sink in sinks if sink is not None]


def _sink_of(writer: SummaryWriter, blocks: bool) -> Sink | None:
    try:
        return LoggerSink(writer, step_scalars=False, blocks=blocks)
    except Exception as error:  # a disk that is full, say: the fit goes through all the same
        warn_safely(NO_SINK.format(kind=type(error).__name__, error=error))
        return None


class LoggerSink:
    """Writes into the event file of a TensorBoardLogger, which opens and closes it as it likes.

    Lightning closes it at the end of each fit, validation, test and prediction, those of other
    Trainers with the same logger among them, and goes on logging into a new file of the same run.
    """

    def __init__(self, writer: SummaryWriter, **options: Any) -> None:
        """Starts with the ``SummaryWriter`` of the logger, open or closed.

        ``options`` are those of :class:`~gradwatch_tensorboard.TensorBoardWriter`.
        """
        from gradwatch_tensorboard import TensorBoardWriter

        self._shared = writer
        self._open()
        self._writer = TensorBoardWriter(writer, **options)

    def write(self, batch: RecordBatch) -> None:
        """Writes a batch of steps."""
        self._open()
        self._writer.write(batch)

    def close(self) -> None:
        """Writes the rest; closing the file is left to the logger."""
        self._open()
        self._writer.close()

    def _open(self) -> None:
        if self._shared.file_writer is None:
            # What each of torch's own add_...() methods begins with (private, torch 2.4 to 2.13).
            self._shared._get_file_writer()  # type: ignore[no-untyped-call]  # torch's
