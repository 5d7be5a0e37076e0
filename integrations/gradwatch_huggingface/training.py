"""Training: one watched ``Trainer.train``, from its begin to its end."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from gradwatch import Watcher
from gradwatch.adapters import LoggerScalars, Options, build_watcher, warn_safely
from gradwatch_huggingface.replays import Replays
from gradwatch_huggingface.rows import Rows
from gradwatch_huggingface.trainer import (
    Wrapped,
    micro_batches_of,
    optimizer_of,
    scaler_of,
    watched_of,
)

STATE = "gradwatch"
"""Where our state is in ``TrainerState.stateful_callbacks``."""

NOT_SAVED = (
    "GradientMonitorCallback saves no state in the checkpoints of this training, because of "
    "{kind}: {error} A training that is resumed from them counts its steps from 1."
)


class Logging(NamedTuple):
    """What the rows of the Trainer get; the arguments of the callback by the same names."""

    log: bool
    log_blocks: bool
    log_statistics: bool


class Training:
    """Watches one training.

    Attributes:
        rows: What the Trainer's rows get.
        position: ``state.global_step`` of the step under way, or the newest; None before any.
    """

    def __init__(self, trainer: Any, options: Options, logging: Logging, trial: int) -> None:
        """Makes the watcher, which is not attached yet.

        Args:
            trainer: The Trainer, which has prepared the model.
            options: Those of the user.
            logging: Those of the callback's own.
            trial: Counts the trials of a hyper-parameter search, from 0.
        """
        self.position: int | None = None
        self._trainer = trainer
        self._state = trainer.state  # the Trainer replaces it only before a training begins
        self._wrapped = Wrapped()
        self._saves = True
        self._window = 0
        model = watched_of(trainer)
        optimizer = optimizer_of(trainer, model, options.acts)
        options = replace(options, scaler=scaler_of(trainer))
        if options.run_dir is not None and self._state.is_hyper_param_search:
            name = (self._state.trial_name or f"run-{trial}").replace(os.sep, "_")
            options = replace(options, run_dir=str(Path(options.run_dir) / name))
        accumulates = trainer.args.gradient_accumulation_steps > 1
        self._options = options
        self._watcher = build_watcher(model, optimizer, options)
        self._watcher.leave_windows(accumulates)
        self._watcher.global_step = self._global_step
        scalars = LoggerScalars(
            accumulates=accumulates, blocks=logging.log_blocks, statistics=logging.log_statistics
        )
        self.rows = Rows(trainer, scalars, options.statistics if logging.log_statistics else ())
        self._replays = Replays(trainer, self._watcher) if options.explain else None
        self._log = logging.log

    def begin(self, fresh: Mapping[str, Any]) -> Watcher:
        """Attaches the watcher, and wraps what the Trainer calls.

        Args:
            fresh: The state of the clipping policy before any training; empty if it has none.
        """
        # Restore before attach(): from then on each backward is counted, on top of this state.
        saved = self._state.stateful_callbacks.get(STATE)
        if saved:
            self._watcher.load_state_dict(saved)
        elif fresh:
            self._options.clip.load_state_dict(copy.deepcopy(fresh))  # type: ignore[union-attr]
        self._watcher.on_each_step(self.rows.expect)
        self._watcher.attach()
        wrap, trainer = self._wrapped.wrap, self._trainer
        wrap(trainer, "get_batch_samples", self._get_batch_samples)
        wrap(trainer, "training_step", self._training_step)
        if self._replays is not None:
            wrap(trainer, "compute_loss", self._replays.compute_loss)
        if self._log:
            wrap(trainer, "log", self.rows.log)
        # It is called whenever a checkpoint is written, and at the right moment.
        wrap(self._state, "save_to_json", self._save)
        self._wrapped.guard(trainer, self.end)
        return self._watcher

    def end(self) -> None:
        """Closes the watcher and unwraps everything; safe to call again."""
        self._wrapped.end()
        try:
            self._watcher.close()
        finally:
            self._keep_state()
            # A callback that is kept for its history keeps no Trainer alive, nor its model.
            self._watcher.on_each_step(None)
            self._watcher.global_step = None

    def _training_step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self._replays is not None:
            with self._replays.noted():
                loss = original(*args, **kwargs)
        else:
            loss = original(*args, **kwargs)
        if isinstance(loss, Tensor):
            scaler = scaler_of(self._trainer)
            scaled = loss if scaler is None else scaler.scale(loss)
            # The Trainer adds up the losses of a window, and this is a mean over them.
            window = self._window or micro_batches_of(self._trainer)
            self._watcher.note_loss(scaled, float(window))
        return loss

    def _get_batch_samples(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        given = original(*args, **kwargs)
        # Before Transformers 4.53 nothing else tells of the short window at the end of an epoch.
        # A Trainer's own method may return something else; nothing may fail for it.
        batches = given[0] if isinstance(given, tuple) and given else None
        self._window = len(batches) if isinstance(batches, list) else 0
        return given

    def _global_step(self) -> int:
        # Not the Trainer's own: it rises after the step, but a step that a GradScaler has left out
        # is only known to be over in the next backward.
        return self._state.global_step + 1 if self.position is None else self.position

    def _save(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._keep_state()
        return original(*args, **kwargs)

    def _keep_state(self) -> None:
        """Puts our state where the Trainer saves that of its callbacks."""
        if not self._saves:
            return
        try:
            # As it will come back: a policy of the user's may have a state that is not for JSON.
            state = json.loads(json.dumps(self._watcher.state_dict()))
        except Exception as error:
            self._saves = False
            self._state.stateful_callbacks.pop(STATE, None)
            warn_safely(NOT_SAVED.format(kind=type(error).__name__, error=error))
        else:
            self._state.stateful_callbacks[STATE] = state
