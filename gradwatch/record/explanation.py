"""Explanation: where a NaN, an Inf or too large a gradient came from, to the line of code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

from gradwatch.pickles import stable_name

Origin = Literal["operation", "input", "weights", "output_gradient", "not_found"]
Phase = Literal["forward", "backward"]
ExplainedKind = Literal["nan", "inf", "overflow", "spike"]


@stable_name
@dataclass(frozen=True, slots=True)
class Operand:
    """One tensor that an operation was given.

    Attributes:
        name: What the operation calls it, such as ``"self"`` or ``"other"``.
        shape: Its shape.
        dtype: Its dtype, such as ``"float32"``.
        low: The smallest of its finite elements; NaN if it has none.
        high: The largest of its finite elements; NaN if it has none.
        zeros: Number of elements that are exactly 0.
        nans: Number of elements that are NaN.
        infs: Number of elements that are plus or minus infinity.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    low: float
    high: float
    zeros: int = 0
    nans: int = 0
    infs: int = 0


@stable_name
@dataclass(frozen=True, slots=True)
class Share:
    """The part that a parameter or an example has in a gradient.

    Attributes:
        name: Name of the parameter, or the index of the example along the batch dimension, as text.
        norm: L2 norm of the parameter's gradient, or of the gradient of the example's loss, in the
            units of the gradient.
        share: Part of the whole: of the squared norm for a parameter; for an example the projection
            of its gradient on the whole one, so that those of all examples add up to 1.
    """

    name: str
    norm: float
    share: float


@stable_name
@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Where bad gradients came from.

    Attributes:
        step: The step, counted from 1; 0 without a watcher.
        optimizer: Label of its optimizer; empty without a watcher.
        rank: Rank of the process whose batch it was.
        micro_batch: The micro-batch in its window, counted from 1; 0 if not known.
        origin: ``"operation"`` of the model or the loss; ``"input"``: the data; ``"weights"``:
            parameters or buffers that were bad before; ``"output_gradient"``: what came back from
            the loss, which is made outside of the module; ``"not_found"``.
        phase: ``"forward"`` or ``"backward"``, for an operation; else None.
        kind: ``"nan"``, ``"inf"``, ``"overflow"`` (finite gradients whose norm is infinite) or
            ``"spike"`` (a step that ``skip_spikes`` left out).
        module: The module whose code ran the operation, as in ``named_modules()``; ``""`` for the
            outermost one; None outside of the model.
        module_class: Its class; empty outside of the model.
        operation: torch's name of the operation, without overload: ``"log"``. For an operation of
            the backward that of the forward operation that it belongs to. Empty if none is known.
        file: The file of the user's line; empty if none is known.
        line: Its number, counted from 1; 0 if none is known.
        source: The line itself, stripped.
        argument: The input that was bad, such as ``"x"`` or ``"batch['image']"``; empty for none.
        parameter: The parameter or buffer that was bad; empty for none.
        since_step: The first step in which the weights were bad; 0 if not known or not asked.
        examples: Indices of the bad examples along the batch dimension; empty if not known.
        count: Number of bad elements in the result.
        nan_count: Those of them that are NaN.
        inf_count: Those of them that are infinite.
        size: Number of elements in the result.
        result_shape: Shape of the result.
        result_dtype: Its dtype, such as ``"float16"``.
        inputs: What the operation was given.
        candidates: Where it is only known that it is one of several: each of them.
        largest_parameters: For ``"overflow"`` and ``"spike"``: the parameters with the largest
            share in the gradient, largest first.
        largest_examples: Likewise the examples of the batch.
        made_possible_by: The operation that made it possible, such as the softmax that gave the 0
            of which a logarithm was taken; None if there is none.
        notes: What else must be known: sentences.
        advice: What to try: one or two sentences.
    """

    step: int = 0
    optimizer: str = ""
    micro_batch: int = 0
    origin: Origin = "not_found"
    phase: Phase | None = None
    kind: ExplainedKind = "nan"
    module: str | None = None
    module_class: str = ""
    operation: str = ""
    file: str = ""
    line: int = 0
    source: str = ""
    argument: str = ""
    parameter: str = ""
    since_step: int = 0
    examples: tuple[int, ...] = ()
    count: int = 0
    nan_count: int = 0
    inf_count: int = 0
    size: int = 0
    result_shape: tuple[int, ...] = ()
    result_dtype: str = ""
    inputs: tuple[Operand, ...] = ()
    candidates: tuple[Explanation, ...] = ()
    largest_parameters: tuple[Share, ...] = ()
    largest_examples: tuple[Share, ...] = ()
    made_possible_by: Explanation | None = None
    notes: tuple[str, ...] = ()
    advice: str = ""
    rank: int = 0

    @property
    def summary(self) -> str:
        """One line that says what made it."""
        # A stand-in: the words are those of gradwatch/replay/words.py.
        return f"{self.operation or self.origin} in {self.module or 'the model'}: {self.kind}"

    def as_dict(self) -> dict[str, Any]:
        """Returns plain dicts, lists, strings and numbers, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Explanation:
        """Makes an explanation of what :meth:`as_dict` returned, also after a way through JSON.

        Names that are not known are left out, so that a newer gradwatch may have written them. A
        NaN or infinity may be text, as JSON has none.

        Raises:
            TypeError: If a value is of another type than that of its field.
        """
        return cls(**_checked(cls, values))


def _checked(of: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields that are there, each of the type that its class says.

    Raises:
        TypeError: If one is of another type, or the values are no mapping.
    """
    if not isinstance(values, Mapping):
        raise TypeError(f"expected a mapping, got {type(values).__name__}")
    return {
        one.name: _READ[str(one.type)](values[one.name]) for one in fields(of) if one.name in values
    }


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected a string, got {type(value).__name__}")
    return value


def _integer(value: Any) -> int:
    # type() and not isinstance(): True would pass as an int. A frame holds no larger ones.
    if type(value) is not int or abs(value) >= 2**63:
        raise TypeError(f"expected an integer of 64 bits, got {type(value).__name__}")
    return value


def _number(value: Any) -> float:
    if isinstance(value, str):  # NaN and infinities, which JSON does not have
        return float(value)
    if type(value) not in (int, float):
        raise TypeError(f"expected a number, got {type(value).__name__}")
    return float(value)


def _or_none(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else read(value)


def _each(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def read_all(values: Any) -> tuple[Any, ...]:
        if not isinstance(values, list | tuple):
            raise TypeError(f"expected a list, got {type(values).__name__}")
        return tuple(map(read, values))

    return read_all


_READ: dict[str, Callable[[Any], Any]] = {
    "int": _integer,
    "str": _text,
    "float": _number,
    "str | None": _or_none(_text),
    "Origin": _text,
    "Phase | None": _or_none(_text),
    "ExplainedKind": _text,
    "tuple[int, ...]": _each(_integer),
    "tuple[str, ...]": _each(_text),
    "tuple[Operand, ...]": _each(lambda row: Operand(**_checked(Operand, row))),
    "tuple[Share, ...]": _each(lambda row: Share(**_checked(Share, row))),
    "tuple[Explanation, ...]": _each(Explanation.from_dict),
    "Explanation | None": _or_none(Explanation.from_dict),
}
"""How a value is read back, by the type of its field as it is written above."""
