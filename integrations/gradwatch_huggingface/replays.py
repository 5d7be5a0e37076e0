"""Replays: how a micro-batch of the Trainer is run again, and what must not see that."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from gradwatch import Watcher
from gradwatch_huggingface.trainer import divides_loss, micro_batches_of

_GATHERS = ("gather", "gather_for_metrics", "reduce", "pad_across_processes")
"""Methods of an Accelerator that ask other ranks, and return what they are given on one."""


class Replays:
    """Notes each ``compute_loss`` of a training for the watcher, so that it can be run again.

    Not ``training_step``, which also runs the backward, and in which TRL makes new completions.
    """

    def __init__(self, trainer: Any, watcher: Watcher) -> None:
        """Notes nothing yet."""
        self._trainer, self._watcher = trainer, watcher
        self._trains = False

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Notes what is computed in a block; an evaluation computes losses as well."""
        self._trains = True
        try:
            yield
        finally:
            self._trains = False

    def compute_loss(
        self, original: Callable[..., Any], model: Any, inputs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Notes a micro-batch, and computes its loss."""
        if self._trains:
            self._trains = False  # one that calls itself again is run again whole
            divides = divides_loss(self._trainer, kwargs.get("num_items_in_batch"))
            divisor = float(micro_batches_of(self._trainer)) if divides else 1.0
            again = _made_again(self._trainer, original, model, args, kwargs)
            # Copies, as it takes the labels out of what it is given.
            self._watcher.note_micro_batch(again, copy.copy(inputs), divisor=divisor)
        return original(model, inputs, *args, **kwargs)


def _made_again(
    trainer: Any, original: Callable[..., Any], model: Any, args: Any, kwargs: Any
) -> Callable[..., Any]:
    """Returns a function that computes the loss, unheard by the Trainer and by other ranks."""

    def compute_loss(inputs: Any) -> Any:
        with _unheard(trainer):
            loss = original(model, copy.copy(inputs), *args, **kwargs)
        return loss[0] if isinstance(loss, tuple) else loss

    return compute_loss


@contextmanager
def _unheard(trainer: Any) -> Iterator[None]:
    """Makes what is logged, and what is gathered from other ranks, go nowhere for a block."""
    accelerator = trainer.accelerator
    stand_ins: list[tuple[dict[str, Any], str, Any]] = [(vars(trainer), "log", _nothing)]
    if accelerator.num_processes > 1:
        stand_ins += [(vars(accelerator), name, _own) for name in _GATHERS]
    before = [inside.get(name) for inside, name, _ in stand_ins]
    try:
        for inside, name, stand_in in stand_ins:
            inside[name] = stand_in
        yield
    finally:
        for (inside, name, _), had in zip(stand_ins, before, strict=True):
            if had is None:
                inside.pop(name, None)
            else:
                inside[name] = had


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Stands for a method that tells somebody else."""


def _own(value: Any, *args: Any, **kwargs: Any) -> Any:
    """Stands for a method that adds what other ranks have."""
    return value
