"""GradientMonitor: the Lightning callback that puts a Watcher around the training of a fit."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

import gradwatch
from gradwatch.control.policy import ClipPolicy
from gradwatch.history import History
from gradwatch.observe.parameters import optimizer_parameters
from gradwatch.options import check_options
from gradwatch.record.event import Event
from gradwatch.record.sinks import Sink
from gradwatch.record.step import StepRecord
from gradwatch.watcher import Watcher
from gradwatch_lightning.boards import tensorboard_sinks
from gradwatch_lightning.conflicts import refuse_accumulate, refuse_two_clips
from gradwatch_lightning.scalars import retire_scalars, step_scalars

NOTHING_YET = (
    "GradientMonitor.{name} was read, but the monitor has not watched a training yet. Pass the "
    "monitor to Trainer(callbacks=[...]) and read it after trainer.fit(...)."
)


class GradientMonitor(Callback):
    """Watches the gradients of a training, and on request clips them or skips poisoned steps.

    Automatic and manual optimization, any number of optimizers, any logger: every
    ``Trainer(log_every_n_steps=)`` steps, the :func:`~gradwatch_lightning.scalars.step_scalars` of
    each optimizer that stepped since go out through ``LightningModule.log_dict``. A
    ``TensorBoardLogger`` also gets the norms of module blocks, every non-finite step and the events
    as text, whatever that number is. ``Trainer(gradient_clip_val=)`` and
    ``Trainer(accumulate_grad_batches=)`` are observed: both sides of the clip and the number of
    micro-batches are in the records. Validation, testing and prediction are left alone.

    Args:
        clip: As in :func:`gradwatch.watch`: a number (largest global L2 norm), ``"auto"`` or a
            clipping policy; None only watches. Refused where the Trainer clips too.
        on_nonfinite: ``"record"``, ``"skip"`` or ``"raise"``.
        statistics: Statistics per parameter besides ``"norm"``.
        every: Steps between two takings of the costly statistics.
        buffer_size: Steps that :attr:`history` keeps.
        sinks: Further receivers of the records. They are closed when the fit ends.
        exploding_norm: Norm above which a step is an ``exploding`` event; None for none.
        skip_spikes: Leaves a step out whose norm is so many deviations above the usual; ``"auto"``
            for 6, None to take all.
        max_consecutive_skips: How many steps in a row may be left out.
        log: Whether the loggers of the Trainer get anything.
        accumulate: Refused: use ``Trainer(accumulate_grad_batches=)``.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If an argument is out of bounds, or belongs to the Trainer.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> monitor = GradientMonitor(clip=1.0, on_nonfinite="skip")
        >>> trainer = Trainer(callbacks=[monitor], max_epochs=1)  # doctest: +SKIP
        >>> trainer.fit(model, loader)  # doctest: +SKIP
        >>> monitor.history.steps()  # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        clip: float | str | ClipPolicy | None = None,
        on_nonfinite: str = "record",
        statistics: Iterable[str] = ("norm",),
        every: int = 1,
        buffer_size: int = 1024,
        sinks: Iterable[Sink] = (),
        exploding_norm: float | None = None,
        skip_spikes: float | str | None = None,
        max_consecutive_skips: int = 10,
        log: bool = True,
        accumulate: None = None,
    ) -> None:
        super().__init__()
        refuse_accumulate(accumulate)
        if not isinstance(log, bool):
            raise TypeError(f"GradientMonitor(log=) must be True or False, got {log!r}.")
        self._options = check_options(
            clip=clip,
            on_nonfinite=on_nonfinite,
            statistics=statistics,
            every=every,
            buffer_size=buffer_size,
            sinks=sinks,
            exploding_norm=exploding_norm,
            skip_spikes=skip_spikes,
            max_consecutive_skips=max_consecutive_skips,
            caller="GradientMonitor",
        )
        self._log = log
        self._watcher: Watcher | None = None
        self._state: dict[str, Any] = {}
        self._trainer: weakref.ref[Trainer] | None = None
        self._newest: dict[str, StepRecord] = {}
        self._seen: StepRecord | None = None
        self._first: str | None = None

    @property
    def watcher(self) -> Watcher | None:
        """The watcher of the newest fit; None before the first training step could come."""
        return self._watcher

    @property
    def history(self) -> History:
        """What happened in the newest fit, also after its end.

        Raises:
            RuntimeError: If nothing has been watched yet.
        """
        return self._watched("history").history

    @property
    def events(self) -> Sequence[Event]:
        """The events of the newest fit, oldest first, also after its end.

        Raises:
            RuntimeError: If nothing has been watched yet.
        """
        return self._watched("events").events

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses conflicts, and forgets the fit before unless this Trainer goes on with it."""
        if stage != "fit":
            return
        refuse_two_clips(self._options.clip, trainer, pl_module)
        goes_on = self._trainer is not None and self._trainer() is trainer
        self._state = self.state_dict() if goes_on else {}
        self._trainer = weakref.ref(trainer)
        self._watcher = self._seen = self._first = None
        self._newest = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attaches a watcher: the checkpoint is restored and the sanity check is over by now."""
        options = self._options
        watcher = gradwatch.watch(
            _wrapped(trainer, pl_module),
            _optimizers(trainer, pl_module),
            clip=options.clip,
            on_nonfinite=options.on_nonfinite,
            statistics=options.statistics,
            every=options.every,
            buffer_size=options.buffer_size,
            scaler=_scaler(trainer),
            sinks=[*options.sinks, *(tensorboard_sinks(trainer) if self._log else ())],
            exploding_norm=options.exploding_norm,
            skip_spikes=options.skip_spikes,
            max_consecutive_skips=options.max_consecutive_skips,
        )
        if self._state:
            watcher.load_state_dict(self._state)
        watcher.global_step = _logged_step(trainer)
        watcher.attach()
        self._watcher = watcher

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Takes the record of the optimizer that stepped before this one in the same batch."""
        self._take_newest()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the newest steps at the batches that Lightning writes logs at."""
        self._take_newest()
        # Lightning takes some 0.1 ms per logged number, also where it throws it away afterwards.
        due = trainer._logger_connector.should_update_logs
        if self._log and due and not trainer.barebones:
            scalars = step_scalars(self._newest.values(), self._first or "")
            self._newest = {}
            retire_scalars(trainer, scalars)
            pl_module.log_dict(scalars, on_step=True, on_epoch=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Detaches the watcher."""
        self._detach()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Detaches the watcher, whatever stopped the training."""
        self._detach()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Detaches the watcher where neither of the others was called."""
        self._detach()

    def state_dict(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps: the state of the watcher."""
        return dict(self._state) if self._watcher is None else self._watcher.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes the state of a checkpoint; the watcher gets it when the training starts."""
        self._state = dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        # A copy, or the monitor in a spawned process, watches nothing yet. `log` and `log_dict` are
        # methods of the module, which Lightning hangs on each callback.
        fresh: dict[str, Any] = {
            "_watcher": None,
            "_trainer": None,
            "_seen": None,
            "_newest": {},
            "_first": None,
        }
        kept = {key: self.__dict__[key] for key in self.__dict__ if key not in ("log", "log_dict")}
        return {**kept, **fresh}

    def _take_newest(self) -> None:
        record = None if self._watcher is None else self._watcher.last
        if record is None or record is self._seen or record.optimizer == "none":
            return
        self._seen = self._newest[record.optimizer] = record
        if self._first is None:
            self._first = record.optimizer

    def _watched(self, name: str) -> Watcher:
        if self._watcher is None:
            raise RuntimeError(NOTHING_YET.format(name=name))
        return self._watcher

    def _detach(self) -> None:
        if self._watcher is not None:
            self._watcher.close()


def _optimizers(trainer: Trainer, module: LightningModule) -> list[Optimizer] | None:
    """Lists the optimizers; None, so that they are found at their first step, where none is named.

    Where ``configure_optimizers`` returns nothing, Lightning puts an optimizer there that holds a
    tensor of its own.
    """
    owned = {id(parameter) for parameter in module.parameters()}
    held = [p for optimizer in trainer.optimizers for p in optimizer_parameters(optimizer)]
    return trainer.optimizers if any(id(parameter) in owned for parameter in held) else None


def _wrapped(trainer: Trainer, module: LightningModule) -> nn.Module:
    """Returns the module as the strategy wrapped it, so that a rank's own gradients can be seen."""
    model = trainer.strategy.model
    return model if isinstance(model, DistributedDataParallel) else module


def _scaler(trainer: Trainer) -> torch.amp.GradScaler | None:
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if isinstance(scaler, torch.amp.GradScaler) else None


def _logged_step(trainer: Trainer) -> Callable[[], int]:
    """Returns a function that tells the step under which Lightning logs the batch under way."""
    loop = trainer.fit_loop.epoch_loop
    if not hasattr(loop, "_batches_that_stepped"):  # private: a later Lightning may rename it
        return lambda: trainer.global_step
    return lambda: int(loop._batches_that_stepped)
