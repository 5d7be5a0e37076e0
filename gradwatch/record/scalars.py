"""The numbers of a step that loggers get, by the declarations of the step's columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from gradwatch.record.records import StepRecord
from gradwatch.record.schema import Column, Scalar, columns_of

GROUP = "gradwatch"
"""Tags of the first optimizer begin with it."""

STEP_COLUMNS = columns_of(StepRecord)

SCALARS: Mapping[str, Scalar] = {
    name: one.scalar for name, one in STEP_COLUMNS.items() if one.scalar is not None
}
"""How each column is logged that is logged at all, by name."""


def group_of(optimizer: str, first: str) -> str:
    """Names the group of tags of an optimizer: ``gradwatch``, of further ones ``gradwatch-Adam-1``.

    Args:
        optimizer: Its label.
        first: Label of the optimizer whose group has no suffix.
    """
    # Loggers group charts by the text before the first slash. The hyphen sorts the groups behind
    # that of the first optimizer; an underscore would put them in front.
    return GROUP if optimizer == first else f"{GROUP}-{optimizer.replace('/', '_')}"


def sentence(column: Column) -> str:
    """Returns what a column means in one short sentence, for a logger that shows one.

    Example:
        >>> sentence(STEP_COLUMNS["clip_coef"])
        'Factor that the gradients were multiplied with.'
    """
    meaning = column.meaning.partition(";")[0]  # what follows says what the default stands for
    return f"{meaning[:1].upper()}{meaning[1:]}."


class StepScalars:
    """Turns the steps of one optimizer into what is logged of them.

    A value that says nothing is left out: a loss that is not known, a noise scale below its
    standard error. Some are logged from the first step on that has something to say, the loss scale
    say; what has been seen so far is all that is remembered.
    """

    def __init__(self, names: Iterable[str], known: Iterable[str] = ()) -> None:
        """Starts without a step.

        Args:
            names: Columns to log, of :data:`SCALARS`.
            known: Those of them that are logged from the first step on, whatever it says.
        """
        self._scalars = {name: SCALARS[name] for name in names}
        self._seen = set(known)

    @classmethod
    def for_tensorboard(cls) -> StepScalars:
        """Logs what ``TensorBoardWriter`` writes."""
        return cls(name for name, one in SCALARS.items() if one.tensorboard)

    def of(self, record: StepRecord) -> dict[str, float]:
        """Returns the values of one step by column."""
        values = {}
        for name, scalar in self._scalars.items():
            if name in self._seen or scalar.when is None or scalar.when(record):
                values[name] = float(getattr(record, name))
                if scalar.lasting:
                    self._seen.add(name)
        return values


class LoggerScalars:
    """Turns the steps of all optimizers into tags and values, as every logger gets them.

    Each further optimizer has a group of tags of its own, ``gradwatch-Adam-1/grad_norm``.

    Example:
        >>> from gradwatch import StepRecord
        >>> step = StepRecord(1, "SGD", grad_norm=2.0, grad_norm_clipped=2.0)
        >>> LoggerScalars().of(step)  # doctest: +ELLIPSIS
        {'gradwatch/grad_norm': 2.0, 'gradwatch/grad_norm_clipped': 2.0, ...}
    """

    def __init__(self, *, accumulates: bool = False) -> None:
        """Starts without a step.

        Args:
            accumulates: Whether steps may have several micro-batches: then their number is logged
                from the first step on.
        """
        self._known = ["micro_batches"] * accumulates
        self._series: dict[str, StepScalars] = {}

    def of(self, record: StepRecord) -> dict[str, float]:
        """Returns the values of one step by tag; to be given every step, in order."""
        if record.optimizer not in self._series:
            names = [name for name, one in SCALARS.items() if one.loggers]
            self._series[record.optimizer] = StepScalars(names, self._known)
        group = group_of(record.optimizer, first=next(iter(self._series)))
        values = self._series[record.optimizer].of(record)
        return {f"{group}/{name}": value for name, value in values.items()}
