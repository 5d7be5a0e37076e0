"""Explanation: where a NaN, an Inf or too large a gradient came from, to the line of code."""

from __future__ import annotations

from collections.abc import Mapping
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

    def as_dict(self) -> dict[str, Any]:
        """Returns plain dicts, lists, strings and numbers, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Explanation:
        """Makes an explanation of what :meth:`as_dict` returned, also after a way through JSON.

        Names that are not known are left out, so that a newer gradwatch may have written them.
        """
        known = {one.name for one in fields(cls)}
        kept = {name: value for name, value in values.items() if name in known}
        for name, make in _PARTS.items():
            if kept.get(name) is not None:
                kept[name] = make(kept[name])
        return cls(**kept)


def _operand(values: Mapping[str, Any]) -> Operand:
    return Operand(**{**values, "shape": tuple(values["shape"])})


_PARTS: dict[str, Any] = {
    "examples": tuple,
    "result_shape": tuple,
    "notes": tuple,
    "inputs": lambda rows: tuple(map(_operand, rows)),
    "candidates": lambda rows: tuple(map(Explanation.from_dict, rows)),
    "largest_parameters": lambda rows: tuple(Share(**row) for row in rows),
    "largest_examples": lambda rows: tuple(Share(**row) for row in rows),
    "made_possible_by": Explanation.from_dict,
}
