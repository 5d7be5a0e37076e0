"""GradientMonitorCallback: the callback that runs a Watcher during ``Trainer.train``."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ModuleNotFoundError as exc:
    if exc.name != "transformers":
        raise
    raise ModuleNotFoundError(
        "GradientMonitorCallback needs Transformers, which is not installed. "
        "Run: pip install 'gradwatch[huggingface]'",
        name="transformers",
    ) from exc

from gradwatch import Watcher
from gradwatch.adapters import (
    LatestTraining,
    SharedOptions,
    check_options,
    shown,
    warn_safely,
    with_watch_options,
)
from gradwatch_huggingface.trainer import refuse_two_clips, trainer_that_calls
from gradwatch_huggingface.training import Logging, Training

if TYPE_CHECKING:
    from typing_extensions import Unpack

NOTHING_YET = (
    "the callback has not watched a training yet. Pass it to Trainer(callbacks=[...]) and read it "
    "after trainer.train()."
)
NOT_THIS_ONE = "the latest training was not watched, because of {why}"
NOT_WATCHED = (
    "GradientMonitorCallback does not watch this training, because of {why} The training goes on "
    "as it would without the callback."
)
NO_TRAINER = (
    "no Trainer was found that calls the callback. Pass it to Trainer(callbacks=[...]) or to "
    "trainer.add_callback()."
)
BELONGS_TO_TRAINER = {
    "accumulate": (
        "GradientMonitorCallback(accumulate={value}) was given, but the Trainer decides how many "
        "micro-batches a step has. Write TrainingArguments(gradient_accumulation_steps={value}) "
        "instead; the callback records how many micro-batches are in each step."
    ),
    "scaler": (
        "GradientMonitorCallback(scaler=) was given, but the Trainer makes its GradScaler itself, "
        "and the callback finds it. Leave scaler out."
    ),
}


class GradientMonitorCallback(LatestTraining, TrainerCallback):
    """Watches the gradients during ``Trainer.train`` and, on request, clips or skips steps.

    It works with every ``Trainer`` of Transformers, those of TRL among them, wherever they log to:
    into each row that the Trainer logs about its training, it puts the
    :class:`~gradwatch.adapters.LoggerScalars` of the newest step, as the Trainer does with its own
    ``grad_norm``. Clipping by ``max_grad_norm`` and accumulation by
    ``gradient_accumulation_steps`` are observed: the records hold the norms before and after the
    clip, the number of micro-batches, and the loss of the step as the Trainer computes it, of this
    process. Evaluation and prediction are not watched.

    Each ``train()`` has a watcher of its own. With ``resume_from_checkpoint`` it goes on where the
    checkpoint was written: its state is in ``trainer_state.json``.

    Args:
        log: Whether the rows that the Trainer logs get our scalars.
        log_blocks: Whether they also get the norms of at most 20 parts of the model,
            ``gradwatch_blocks/<part>``.
        log_statistics: Whether they also get what ``statistics=`` measures of these parts, in the
            steps where it was taken.
        options: The other options of :func:`gradwatch.watch`, with the same meaning: ``clip``,
            ``on_nonfinite``, ``statistics``, ``run_dir`` and so on. ``clip`` is refused if the
            Trainer clips too, which it does by default. ``sinks`` are closed when the training
            ends. In a hyper-parameter search, each trial has a folder of its own in ``run_dir``.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of bounds, or belongs in ``TrainingArguments``.

    Example:
        >>> from transformers import Trainer
        >>> monitor = GradientMonitorCallback(on_nonfinite="skip")
        >>> trainer = Trainer(model, args, callbacks=[monitor])  # doctest: +SKIP
        >>> trainer.train()  # doctest: +SKIP
        >>> monitor.history.steps()  # doctest: +SKIP
    """

    @with_watch_options
    def __init__(
        self,
        *,
        log: bool = True,
        log_blocks: bool = False,
        log_statistics: bool = False,
        **options: Unpack[SharedOptions],
    ) -> None:
        super().__init__()
        for name, text in BELONGS_TO_TRAINER.items():
            if name in options:
                raise ValueError(text.format(value=shown(options[name])))  # type: ignore[literal-required]
        self._logging = Logging(log, log_blocks, log_statistics)
        for name, value in self._logging._asdict().items():
            if not isinstance(value, bool):
                raise TypeError(
                    f"GradientMonitorCallback({name}=) must be True or False, got {shown(value)}."
                )
        self._options = check_options("GradientMonitorCallback", options, accumulate=1)
        # A policy learns while it runs, and the callback may be used for an unrelated training.
        state_of = getattr(self._options.clip, "state_dict", dict)
        self._fresh: dict[str, Any] = copy.deepcopy(state_of())
        self._watcher: Watcher | None = None
        self._training: Training | None = None
        self._last: _Last | None = None
        self._why = ""
        self._trials = -1

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuses conflicting settings, and has the watcher attached.

        The model and the optimizer are prepared by now, and a checkpoint is loaded.
        """
        self._end()  # the previous training may have been left in a way that nobody can see
        self._watcher, self._why = None, ""
        refuse_two_clips(self._options.clip, args)
        trainer = trainer_that_calls(self)
        if trainer is None:
            self._tell(RuntimeError(NO_TRAINER))
            return
        self._trials += bool(state.is_hyper_param_search)
        # Only once all other callbacks have begun: if one of them fails, nobody tells us.
        self._last = _Last(self, trainer)
        trainer.callback_handler.callbacks.append(self._last)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Notes the position on the x-axis of the step that comes."""
        if self._training is not None:
            self._training.position = state.global_step + 1

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Reads the numbers that have arrived."""
        if self._training is not None:
            self._training.rows.read(wait=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Detaches the watcher."""
        self._end()

    def __getstate__(self) -> dict[str, Any]:
        # A copy, or the callback in a spawned process, has the record and watches nothing.
        return {**self.__dict__, "_training": None, "_last": None}

    def _begin(self, trainer: Any) -> None:
        """Attaches a watcher."""
        try:
            self._training = Training(trainer, self._options, self._logging, self._trials)
            self._watcher = self._training.begin(self._fresh)
        except Exception as error:
            self._end()
            self._watcher = None
            self._tell(error)

    def _end(self) -> None:
        training, self._training = self._training, None
        if training is not None:
            training.end()

    def _tell(self, error: Exception) -> None:
        if self._options.acts:  # without its clip, it would silently be another training
            raise error
        self._why = f"{type(error).__name__}: {error}"
        warn_safely(NOT_WATCHED.format(why=self._why))

    def _unwatched(self) -> str:
        return NOT_THIS_ONE.format(why=self._why) if self._why else NOTHING_YET


class _Last(TrainerCallback):
    """Stands last in the list of callbacks, for as long as ``on_train_begin`` is called."""

    def __init__(self, monitor: GradientMonitorCallback, trainer: Any) -> None:
        self._monitor, self._trainer = monitor, trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        handler = self._trainer.callback_handler
        # A new list: the present one is gone through, and others may come after us in it.
        handler.callbacks = [one for one in handler.callbacks if one is not self]
        if self._monitor._last is self:  # and not one that was left of a training that failed
            self._monitor._last = None
            self._monitor._begin(self._trainer)
