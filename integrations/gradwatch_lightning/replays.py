"""TrainingSteps: how a micro-batch of the Trainer is run again, and what must not see that."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.profilers import PassThroughProfiler

from gradwatch import Watcher

STEPS_ITSELF = (
    "In manual optimization training_step() steps the optimizers itself, so it cannot be run again "
    "whole, and {strategy} calls it in place of the forward of the model. Train on one device to "
    "have it explained, or in automatic optimization."
)
_SILENT = ("log", "log_dict", "print")
"""Methods of a LightningModule that tell somebody else, and return nothing."""


class TrainingSteps:
    """Notes each ``training_step`` of a fit for the watcher, so that it can be run again."""

    def __init__(self, trainer: Trainer, module: LightningModule, watcher: Watcher) -> None:
        """Comes before the strategy's ``training_step``, until :meth:`end`.

        No hook of a callback would do: those of other callbacks and of the module come after ours,
        and may draw random numbers.
        """
        self._trainer, self._module, self._watcher = trainer, module, watcher
        self._again = _made_again(trainer, module)
        self._original: Callable[..., Any] = trainer.strategy.training_step
        vars(trainer.strategy)["training_step"] = self._training_step

    def end(self) -> None:
        """Leaves the strategy as it was; safe to call again."""
        inside = vars(self._trainer.strategy)
        if inside.get("training_step") == self._training_step:
            del inside["training_step"]

    def _training_step(self, *args: Any, **kwargs: Any) -> Any:
        trainer, module = self._trainer, self._module
        if module.automatic_optimization:
            divisor = float(trainer.accumulate_grad_batches)
            self._watcher.note_micro_batch(self._again, *args, divisor=divisor)
        else:
            # A wrapper, such as that of DDP, is called for training_step and not for its forward.
            direct = trainer.strategy.model is module
            name = type(trainer.strategy).__name__
            reason = "" if direct else STEPS_ITSELF.format(strategy=name)
            self._watcher.note_micro_batch(None, reason=reason)
        return self._original(*args, **kwargs)


def _made_again(trainer: Trainer, module: LightningModule) -> Callable[..., Any]:
    """Returns a function that runs ``training_step`` and returns its loss, unheard by the Trainer.

    It does not call the strategy's, which may communicate with other ranks.
    """

    def training_step(*args: Any) -> Any:
        with _unheard(trainer, module), trainer.precision_plugin.train_step_context():
            output = module.training_step(*args)
        return output["loss"] if isinstance(output, Mapping) else output

    # So that a bad input is told by the name that the user has for it.
    signature = inspect.signature(module.training_step)
    training_step.__signature__ = signature  # type: ignore[attr-defined]
    return training_step


@contextmanager
def _unheard(trainer: Trainer, module: LightningModule) -> Iterator[None]:
    """Makes what a module logs, prints and profiles go nowhere for a block."""
    modules = [one for one in module.modules() if isinstance(one, LightningModule)]
    before = [(vars(one), {name: vars(one).get(name) for name in _SILENT}) for one in modules]
    loggers = trainer.loggers
    of_trainer = vars(trainer)
    profiler = of_trainer.get("profiler")  # Lightning's types do not know it
    try:
        for inside, _ in before:
            inside.update(dict.fromkeys(_SILENT, _nothing))
        trainer.loggers = [DummyLogger() for _ in loggers]
        of_trainer["profiler"] = PassThroughProfiler()
        yield
    finally:
        trainer.loggers, of_trainer["profiler"] = loggers, profiler
        for inside, had in before:
            for name, value in had.items():
                if value is None:
                    del inside[name]
                else:
                    inside[name] = value


def _nothing(*args: Any, **kwargs: Any) -> None:
    """Stands for a method that tells somebody else."""
