"""GradientMonitor: the Lightning callback that runs a Watcher during ``Trainer.fit``."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from gradwatch import AccumulatePolicy, Event, History, NoiseScale, StepRecord, Watcher
from gradwatch.adapters import (
    LoggerScalars,
    SharedOptions,
    build_watcher,
    check_options,
    shown,
    with_watch_options,
)
from gradwatch_lightning.tensorboard import (
    NORM_TAG,
    retire_scalars,
    tensorboard_sinks,
)
from gradwatch_lightning.trainer import (
    TrainerAccumulation,
    accumulate_policy_of,
    accumulates,
    logged_step_of,
    optimizers_of,
    refuse_two_clips,
    refuse_two_numbers,
    scaler_of,
    wrapped_of,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

NUMBER = "accumulate_grad_batches"
NOTHING_YET = (
    "GradientMonitor.{name} was read, but the monitor has not watched a fit yet. Pass the "
    "monitor to Trainer(callbacks=[...]) and read it after trainer.fit(...)."
)


class GradientMonitor(Callback):
    """Watches the gradients during a fit and, on request, clips them or skips non-finite steps.

    It works with automatic and manual optimization, any number of optimizers and any logger. Every
    ``Trainer(log_every_n_steps=)`` steps, it logs the :class:`~gradwatch.adapters.LoggerScalars` of
    each optimizer that has stepped since, through ``LightningModule.log_dict``. A
    ``TensorBoardLogger`` also gets the norms of module blocks, every non-finite step and the events
    as text, whatever ``log_every_n_steps`` is. Clipping by ``Trainer(gradient_clip_val=)`` and
    accumulation by ``Trainer(accumulate_grad_batches=)`` are observed: the records hold the norms
    before and after the clip, the number of micro-batches and the gradient noise scale. Validation,
    testing and prediction are not watched.

    With ``accumulate=``, in automatic optimization, the monitor sets
    ``trainer.accumulate_grad_batches``. Lightning steps when the number of the batch in the epoch
    is divisible by it. A new number therefore takes effect only when the number of batches so far
    is divisible by both the old and the new one, or at the end of the epoch. Until then, a few
    steps may still use the old number. As always in Lightning, the last window of an epoch may be
    short, and its losses are still divided by the full number.
    ``trainer.estimated_stepping_batches`` is computed from the first number.

    Args:
        log: Whether to log to the loggers of the Trainer.
        accumulate: How the number of the Trainer's batches per step changes: ``"auto"``, ``{step:
            number}``, a function of the step or a policy such as
            :class:`~gradwatch.AccumulateByNoiseScale`. None leaves the Trainer's number unchanged;
            a number that never changes belongs in the Trainer. Refused in manual optimization, and
            if the Trainer sets a number or has a ``GradientAccumulationScheduler``.
        options: The other options of :func:`gradwatch.watch`, with the same meaning: ``clip``,
            ``on_nonfinite``, ``statistics``, ``run_dir`` and so on. ``clip`` is refused if the
            Trainer clips too. ``sinks`` are closed when the fit ends.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of bounds, or belongs in the Trainer.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> monitor = GradientMonitor(clip=1.0, on_nonfinite="skip")
        >>> trainer = Trainer(callbacks=[monitor], max_epochs=1)  # doctest: +SKIP
        >>> trainer.fit(model, loader)  # doctest: +SKIP
        >>> monitor.history.steps()  # doctest: +SKIP
    """

    @with_watch_options
    def __init__(
        self,
        *,
        log: bool = True,
        accumulate: str | Mapping[int, int] | Callable[[int], int] | AccumulatePolicy | None = None,
        **options: Unpack[SharedOptions],
    ) -> None:
        super().__init__()
        policy = accumulate_policy_of(accumulate)
        if not isinstance(log, bool):
            raise TypeError(f"GradientMonitor(log=) must be True or False, got {shown(log)}.")
        self._options = check_options(
            "GradientMonitor", options, accumulate=1 if policy is None else policy
        )
        self._accumulation = TrainerAccumulation(policy)
        self._log = log
        self._watcher: Watcher | None = None
        self._state: dict[str, Any] = {}
        # Weak: a monitor kept for its history must not keep the Trainer and its model alive.
        self._trainer: weakref.ref[Trainer] | None = None
        self._newest: dict[str, dict[str, float]] = {}
        self._last_record: StepRecord | None = None
        self._scalars = LoggerScalars()

    @property
    def watcher(self) -> Watcher | None:
        """The watcher of the latest fit; None until the training starts."""
        return self._watcher

    @property
    def history(self) -> History:
        """The history of the latest fit, also after its end.

        Raises:
            RuntimeError: If nothing has been watched yet.
        """
        return self._watched("history").history

    @property
    def events(self) -> Sequence[Event]:
        """The events of the latest fit, oldest first, also after its end.

        Raises:
            RuntimeError: If nothing has been watched yet.
        """
        return self._watched("events").events

    @property
    def noise_scale(self) -> NoiseScale:
        """The current gradient noise scale, or that at the end of the latest fit, in micro-batches.

        If there is no estimate, ``reason`` says why.

        Raises:
            RuntimeError: If nothing has been watched yet.
        """
        return self._watched("noise_scale").noise_scale

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses conflicting settings, and forgets the previous fit unless it is resumed."""
        if stage != "fit":
            return
        refuse_two_clips(self._options.clip, trainer, pl_module)
        refuse_two_numbers(self._accumulation.policy, trainer, pl_module)
        goes_on = self._trainer is not None and self._trainer() is trainer
        self._state = self.state_dict() if goes_on else {}
        self._accumulation.prepare(trainer, goes_on)
        self._trainer = weakref.ref(trainer)
        self._watcher = self._last_record = None
        self._newest = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attaches a watcher, after the checkpoint is restored and the sanity check has run."""
        sinks = [*self._options.sinks, *(tensorboard_sinks(trainer) if self._log else ())]
        options = replace(self._options, scaler=scaler_of(trainer), sinks=tuple(sinks))
        watcher = build_watcher(
            wrapped_of(trainer, pl_module), optimizers_of(trainer, pl_module), options
        )
        may_accumulate = self._accumulation.policy is not None or accumulates(trainer)
        self._scalars = LoggerScalars(accumulates=may_accumulate)
        # Restore before attach(): from then on each backward is counted, on top of this state.
        watcher.leave_windows(may_accumulate)
        if self._state:
            watcher.load_state_dict(self._state)
        self._accumulation.start(trainer, self._state.get(NUMBER), watcher.accumulate)
        watcher.global_step = logged_step_of(trainer)
        watcher.attach()
        self._watcher = watcher

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Keeps the record of an optimizer that stepped earlier in the same batch."""
        self._keep_newest()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the latest step of each optimizer, at the batches where Lightning writes logs."""
        self._keep_newest()
        if self._watcher is not None:
            self._accumulation.follow(trainer, self._watcher.accumulate)
        # Lightning spends about 0.1 ms on each logged number, even if it then discards it.
        due = trainer._logger_connector.should_update_logs
        if self._log and due and not trainer.barebones:
            scalars = {tag: value for one in self._newest.values() for tag, value in one.items()}
            self._newest = {}
            retire_scalars(trainer, scalars)
            in_bar = {NORM_TAG: scalars.pop(NORM_TAG)} if NORM_TAG in scalars else {}
            pl_module.log_dict(in_bar, on_step=True, on_epoch=False, prog_bar=True)
            pl_module.log_dict(scalars, on_step=True, on_epoch=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Detaches the watcher."""
        self._detach(trainer)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Detaches the watcher when an exception stops the training."""
        self._detach(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Detaches the watcher if neither of the hooks above was called."""
        self._detach(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state for a checkpoint: that of the watcher, and the accumulation number."""
        if self._watcher is None:
            return dict(self._state)
        return {**self._watcher.state_dict(), NUMBER: self._accumulation.number}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Stores the state of a checkpoint. The watcher loads it when the training starts."""
        self._state = dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        # A copy, or the monitor in a spawned process, watches nothing yet. Lightning sets `log` and
        # `log_dict`, which are methods of the module, on each callback; a copy must not keep them.
        fresh: dict[str, Any] = {
            "_watcher": None,
            "_trainer": None,
            "_last_record": None,
            "_newest": {},
        }
        left_out = ("log", "log_dict", "_scalars")  # the last is made anew when a training starts
        kept = {key: self.__dict__[key] for key in self.__dict__ if key not in left_out}
        return {**kept, **fresh}

    def _keep_newest(self) -> None:
        record = None if self._watcher is None else self._watcher.last
        # Compared by identity: after a rewind, another record may have the same step. The label
        # "none" means backwards without a known optimizer: Lightning's x-axis has no step for them.
        if record is None or record is self._last_record or record.optimizer == "none":
            return
        self._last_record = record
        self._newest[record.optimizer] = self._scalars.of(record)

    def _watched(self, name: str) -> Watcher:
        if self._watcher is None:
            raise RuntimeError(NOTHING_YET.format(name=name))
        return self._watcher

    def _detach(self, trainer: Trainer) -> None:
        if self._watcher is not None:
            self._watcher.close()
        self._accumulation.give_back(trainer)
