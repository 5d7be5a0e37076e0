"""GradientMonitor: the Lightning callback that runs a Watcher during ``Trainer.fit``."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from gradwatch import AccumulatePolicy
from gradwatch.adapters import (
    LatestTraining,
    SharedOptions,
    check_options,
    warn_safely,
    with_watch_options,
)
from gradwatch_lightning.arguments import (
    accumulate_policy_of,
    check_flags,
    refuse_two_clips,
    refuse_two_numbers,
)
from gradwatch_lightning.loggers import LoggedSteps
from gradwatch_lightning.replays import TrainingSteps
from gradwatch_lightning.tensorboard import tensorboard_sinks
from gradwatch_lightning.trainer import (
    TrainerAccumulation,
    accumulates,
    is_watchable,
    loss_divisor_of,
)
from gradwatch_lightning.watchers import watcher_of

if TYPE_CHECKING:
    from typing_extensions import Unpack

NUMBER = "accumulate_grad_batches"
NOTHING_YET = (
    "the monitor has not watched a fit yet. Pass the monitor to Trainer(callbacks=[...]) and read "
    "it after trainer.fit(...)."
)
NOTHING_TO_WATCH = (
    "in the latest fit there was nothing to watch: no parameter of the module required a gradient."
)
NOT_WATCHED = (
    "GradientMonitor does not watch this fit, because of {kind}: {error} The fit goes on as it "
    "would without the monitor."
)


class GradientMonitor(LatestTraining, Callback):
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
        log_blocks: Whether every logger also gets the norms of up to 20 parts of the module, before
            the clip, and what ``statistics=`` measures of them, where Lightning writes logs. A
            ``TensorBoardLogger`` has them anyway: each 10th step, with the largest value since.
        prog_bar: Whether the progress bar shows the norm of the first optimizer, ``grad_norm``.
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

    # On the class, as pickles of earlier versions do not have them.
    _loss: Tensor | None = None
    _waits = False  # for something to watch
    _training_steps: TrainingSteps | None = None
    _log_blocks, _prog_bar = False, True

    @with_watch_options
    def __init__(
        self,
        *,
        log: bool = True,
        log_blocks: bool = False,
        prog_bar: bool = True,
        accumulate: str | Mapping[int, int] | Callable[[int], int] | AccumulatePolicy | None = None,
        **options: Unpack[SharedOptions],
    ) -> None:
        super().__init__()
        policy = accumulate_policy_of(accumulate)
        check_flags(log=log, log_blocks=log_blocks, prog_bar=prog_bar)
        self._options = check_options(
            "GradientMonitor", options, accumulate=1 if policy is None else policy
        )
        self._accumulation = TrainerAccumulation(policy)
        self._log, self._log_blocks, self._prog_bar = log, log_blocks, prog_bar
        self._state: dict[str, Any] = {}
        # Weak: a monitor kept for its history must not keep the Trainer and its model alive.
        self._trainer: weakref.ref[Trainer] | None = None
        self._logged = LoggedSteps()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses conflicting settings, and forgets the previous fit unless it is resumed."""
        if stage != "fit":
            return
        refuse_two_clips(self._options.clip, trainer, pl_module)
        refuse_two_numbers(self._accumulation.policy, trainer, pl_module)
        if self._watcher is not None:
            self._watcher.close()  # the end of the previous fit may have failed in another callback
        goes_on = self._trainer is not None and self._trainer() is trainer
        self._state = self.state_dict() if goes_on else {}
        self._accumulation.prepare(trainer, goes_on)
        self._trainer = weakref.ref(trainer)
        self._watcher = self._loss = None
        self._waits = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attaches a watcher, after the checkpoint is restored and the sanity check has run."""
        self._waits = True
        # A lazy module gets its parameters inside the first step, when it is too late to act.
        self._attach(trainer, pl_module, with_lazy=self._options.acts)
        if self._watcher is not None:
            self._accumulation.start(trainer, self._state.get(NUMBER), self._watcher.accumulate)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Attaches a watcher if there was nothing to watch before: all was frozen, or lazy."""
        if self._waits:
            self._attach(trainer, pl_module, with_lazy=self._options.acts)

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Keeps the loss until its backward has ended."""
        if self._waits:
            self._attach(trainer, pl_module, with_lazy=True)
        self._loss = loss.detach()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes the loss of the backward, as ``training_step`` returned it."""
        loss, self._loss = self._loss, None
        if self._watcher is not None and loss is not None:
            self._watcher.note_loss(loss, loss_divisor_of(trainer, pl_module))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs what has arrived: the latest step of each optimizer, where Lightning writes logs."""
        if self._watcher is None:
            return
        self._accumulation.follow(trainer, self._watcher.accumulate)
        if self._log or self._prog_bar:
            self._logged.log(trainer, pl_module)

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
        if stage == "fit":
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
        names = ("_watcher", "_trainer", "_loss", "_training_steps")
        fresh = {**dict.fromkeys(names), "_waits": False}
        left_out = ("log", "log_dict", "_logged")  # the last is made anew when a training starts
        kept = {key: self.__dict__[key] for key in self.__dict__ if key not in left_out}
        return {**kept, **fresh}

    def _unwatched(self) -> str:
        return NOTHING_TO_WATCH if self._waits else NOTHING_YET

    def _attach(self, trainer: Trainer, module: LightningModule, with_lazy: bool) -> None:
        """Attaches a watcher, unless there is nothing to watch yet."""
        if not is_watchable(module, with_lazy):
            return
        self._waits = False
        try:
            several = self._accumulation.policy is not None or accumulates(trainer)
            sinks = tensorboard_sinks(trainer, self._log_blocks) if self._log else ()
            self._watcher = watcher_of(trainer, module, self._options, sinks, several)
            self._logged = LoggedSteps(
                log=self._log, blocks=self._log_blocks, bar=self._prog_bar, accumulates=several
            )
            # Restore before attach(): from then on each backward is counted, on top of this state.
            if self._state:
                self._watcher.load_state_dict(self._state)
            if self._log or self._prog_bar:
                self._watcher.on_each_step(self._logged.expect)
            self._watcher.attach()
            if self._options.explain:
                self._training_steps = TrainingSteps(trainer, module, self._watcher)
        except Exception as error:
            self._detach(trainer)
            self._watcher = None
            if self._options.acts:  # without its clip, it would silently be another training
                raise
            warn_safely(NOT_WATCHED.format(kind=type(error).__name__, error=error))

    def _detach(self, trainer: Trainer) -> None:
        # A Trainer that only validates may have the same callbacks, in the middle of a fit.
        if self._trainer is None or self._trainer() is not trainer:
            return
        if self._training_steps is not None:
            self._training_steps.end()
            self._training_steps = None
        try:
            if self._watcher is not None:
                self._watcher.close()
        finally:
            if self._watcher is not None:
                self._logged.end(trainer)  # only now have all numbers arrived
            self._accumulation.give_back(trainer)
