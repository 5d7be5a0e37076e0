"""GradientMonitor: the Lightning callback that puts a Watcher around the training of a fit."""

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
    "GradientMonitor.{name} was read, but the monitor has not watched a training yet. Pass the "
    "monitor to Trainer(callbacks=[...]) and read it after trainer.fit(...)."
)


class GradientMonitor(Callback):
    """Watches the gradients of a training, and on request clips them or skips poisoned steps.

    Automatic and manual optimization, any number of optimizers, any logger: every
    ``Trainer(log_every_n_steps=)`` steps, the :class:`~gradwatch.adapters.LoggerScalars` of each
    optimizer that stepped since go out through ``LightningModule.log_dict``. A
    ``TensorBoardLogger`` also gets the norms of module blocks, every non-finite step and the events
    as text, whatever that number is. ``Trainer(gradient_clip_val=)`` and
    ``Trainer(accumulate_grad_batches=)`` are observed: both sides of the clip, the number of
    micro-batches and the gradient noise scale are in the records. Validation, testing and
    prediction are left alone.

    With ``accumulate=`` the monitor sets ``trainer.accumulate_grad_batches``, in automatic
    optimization. Lightning steps at the batches of an epoch that are divisible by it, so a new
    number waits until the batches so far are, or until the epoch ends: a few steps may still have
    the old one. As always in Lightning, the last window of an epoch may be short, and its losses
    are divided by the whole number. ``trainer.estimated_stepping_batches`` goes by the first one.

    Args:
        log: Whether the loggers of the Trainer get anything.
        accumulate: Batches of the Trainer per step, where they change: ``"auto"``, ``{step:
            number}``, a function of the step or a policy such as
            :class:`~gradwatch.AccumulateByNoiseScale`. None leaves the Trainer's number alone;
            one that never changes belongs there. Refused where the Trainer has a number or a
            ``GradientAccumulationScheduler``, and in manual optimization.
        options: All others of :func:`gradwatch.watch`, as there: ``clip``, ``on_nonfinite``,
            ``statistics``, ``run_dir`` and so on. ``clip`` is refused where the Trainer clips too;
            ``sinks`` are closed when the fit ends.

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
            "GradientMonitor", {**options, "accumulate": 1 if policy is None else policy}
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

    @property
    def noise_scale(self) -> NoiseScale:
        """The gradient noise scale at the end of the newest fit, or so far; in micro-batches.

        Where there is none, its ``reason`` says why.

        Raises:
            RuntimeError: If nothing has been watched yet.
        """
        return self._watched("noise_scale").noise_scale

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses conflicts, and forgets the fit before unless this Trainer goes on with it."""
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
        """Attaches a watcher: the checkpoint is restored and the sanity check is over by now."""
        sinks = [*self._options.sinks, *(tensorboard_sinks(trainer) if self._log else ())]
        options = replace(self._options, scaler=scaler_of(trainer), sinks=tuple(sinks))
        watcher = build_watcher(
            wrapped_of(trainer, pl_module), optimizers_of(trainer, pl_module), options
        )
        may_accumulate = self._accumulation.policy is not None or accumulates(trainer)
        self._scalars = LoggerScalars(accumulates=may_accumulate)
        # All of this before attach(), after which a backward would count from the wrong state.
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
        """Keeps the record of the optimizer that stepped before this one in the same batch."""
        self._keep_newest()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the newest steps at the batches that Lightning writes logs at."""
        self._keep_newest()
        if self._watcher is not None:
            self._accumulation.follow(trainer, self._watcher.accumulate)
        # Lightning spends some 0.1 ms per logged number, also where it throws it away afterwards.
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
        """Detaches the watcher, whatever stopped the training."""
        self._detach(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Detaches the watcher where neither of the others was called."""
        self._detach(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Returns what a checkpoint keeps: the state of the watcher, and the Trainer's number."""
        if self._watcher is None:
            return dict(self._state)
        return {**self._watcher.state_dict(), NUMBER: self._accumulation.number}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Keeps the state of a checkpoint; the watcher gets it when the training starts."""
        self._state = dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        # A copy, or the monitor in a spawned process, watches nothing yet. `log` and `log_dict` are
        # methods of the module, which Lightning hangs on each callback.
        fresh: dict[str, Any] = {
            "_watcher": None,
            "_trainer": None,
            "_last_record": None,
            "_newest": {},
            "_scalars": LoggerScalars(),
        }
        kept = {key: self.__dict__[key] for key in self.__dict__ if key not in ("log", "log_dict")}
        return {**kept, **fresh}

    def _keep_newest(self) -> None:
        record = None if self._watcher is None else self._watcher.last
        # By identity: after a rewind another record may have the same step. "none" is the label
        # of backwards where no optimizer is known: Lightning's x-axis has no step for them.
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
