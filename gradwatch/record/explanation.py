"""Explanation: where a NaN, an Inf or too large a gradient came from, to the line of code."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from gradwatch.pickles import stable_name
from gradwatch.record.folder.files import plain_data
from gradwatch.record.operations import (
    Facts,
    Operand,
    shown_fields,
    shown_name,
    shown_operand,
    values_of,
)
from gradwatch.record.wording import counted, listed, number, printable, wrapped

__all__ = ["ExplainedKind", "Explanation", "Operand", "Origin", "Phase", "Share"]

NOTHING_BAD = "Nothing bad was found"
ALL_FINITE = "All gradients are finite, and so is the loss."
"""The note of an explanation that was asked for, and found nothing."""
NOT_AGAIN = (
    "Run again, the micro-batch gave finite gradients: something has changed in between, or it "
    "does not give the same numbers each time."
)
"""The note of one that is about bad gradients, and has not found them again."""
NO_ARGUMENT = (
    "It is no argument of the forward, and no parameter or buffer, but another tensor that the "
    "code uses on this line."
)
"""The note of an ``"input"`` that is none."""
ATTRIBUTE = (
    "It is a plain attribute: state_dict() leaves it out, and a step that is skipped does not put "
    "it back. With register_buffer() it would be a buffer."
)
"""The note of ``"weights"`` that are neither a parameter nor a buffer."""

Origin = Literal["operation", "input", "weights", "output_gradient", "not_found"]
Phase = Literal["forward", "backward"]
ExplainedKind = Literal["nan", "inf", "overflow", "spike"]

KINDS = {"nan": "NaN", "inf": "Inf", "overflow": "Overflow", "spike": "Spike"}
TOO_LARGE = {
    "overflow": "the gradients are finite, but their norm is too large for a number",
    "spike": "the step was left out, since its gradient norm is far above those before it",
}
ORIGINS = {
    "input": "it came with the data",
    "weights": "it was in the model before the forward",
    "output_gradient": "it came back from the loss, which is made outside of the model's forward",
    "not_found": "where it was born was not found",
}
OF_A_PART = (
    "it came back to the output of {module}, from what ran after that outside of the forwards that "
    "are kept"
)
OTHER_TENSOR = "it was in another tensor that the forward uses"
FROM_OUTSIDE = "it came with a tensor that was made outside of the forward, or outside of torch"
ORIGINS_OF_LARGE = {
    "input": "It came with the data.",
    "weights": "It was in the model before the forward.",
    "output_gradient": "It came back from the loss, which is made outside of the model's forward.",
}
MOST_EXAMPLES = 8
MOST_OPERANDS = 6
MOST_CANDIDATES = 4


@stable_name
@dataclass(frozen=True, slots=True, eq=False)
class Share:
    """The part that a parameter or an example has in a gradient.

    Two of them are equal if all of their attributes are, where NaN equals NaN.

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

    def __eq__(self, other: object) -> bool:
        return values_of(self) == values_of(other) if isinstance(other, Share) else NotImplemented

    def __hash__(self) -> int:
        return hash(values_of(self))


@stable_name
@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Where bad gradients came from.

    Attributes:
        step: The step, counted from 1; 0 without a watcher.
        optimizer: Label of its optimizer; empty without a watcher.
        rank: Rank of the process whose batch it was.
        micro_batch: The micro-batch in its window, counted from 1; 0 if not known.
        origin: ``"operation"`` of the model or the loss; ``"input"``: the data, or another tensor
            that was made outside of the forward; ``"weights"``: parameters, buffers or other
            tensors of the model that were bad before; ``"output_gradient"``: what came back to
            the output of a module, from the loss or what else is made outside of it;
            ``"not_found"``.
        phase: ``"forward"`` or ``"backward"``, for an operation; else None.
        kind: ``"nan"``, ``"inf"``, ``"overflow"`` (finite gradients whose norm is infinite) or
            ``"spike"`` (a step that ``skip_spikes`` left out).
        module: The module whose code ran the operation, or whose output had the gradient, as in
            ``named_modules()``; ``""`` for the outermost one; None outside of the model.
        module_class: Its class; empty outside of the model.
        operation: torch's name of the operation, without overload: ``"log"``. For an operation of
            the backward that of the forward operation that it belongs to. Empty if none is known.
        file: The file of the user's line; empty if none is known.
        line: Its number, counted from 1; 0 if none is known.
        source: The line itself, stripped.
        argument: The input that was bad, such as ``"x"`` or ``"batch['image']"``; for a tensor that
            is no argument what the line calls it; empty for none.
        parameter: The parameter, buffer or other tensor of the model that was bad; empty for none.
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
        """The explanation in one line.

        For example ``NaN born in the forward of encoder.layers.1 (Attention), model.py:42: softmax
        of a row of -inf, examples 3 and 17``.
        """
        return _summary(self)

    def __repr__(self) -> str:
        return shown_fields(self)

    def __str__(self) -> str:
        return "\n".join(_paragraph(self))

    def as_dict(self) -> dict[str, Any]:
        """Returns plain dicts, lists, strings and numbers, for JSON.

        A NaN or infinity, which JSON does not have, is text: ``"nan"``, ``"inf"`` or ``"-inf"``.
        """
        as_data: dict[str, Any] = plain_data(asdict(self))
        return as_data

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Explanation:
        """Makes an explanation of what :meth:`as_dict` returned, also after a way through JSON.

        Names that are not known are left out, so that a newer gradwatch may have written them. A
        NaN or infinity may be a number or text.

        Raises:
            TypeError: If a value is of another type than that of its field.
        """
        return cls(**_checked(cls, values))


def _kind_of_result(explanation: Explanation) -> str:
    """Returns what the operation made: a NaN in a gradient may have begun as an Inf."""
    if explanation.nan_count:
        return "nan"
    return "inf" if explanation.inf_count else explanation.kind


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
    "int | None": _or_none(_integer),
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


def facts_of(explanation: Explanation) -> Facts:
    """Returns what is known of the operation."""
    made_by = explanation.made_possible_by
    return Facts(
        operation=explanation.operation,
        phase=explanation.phase,
        kind=_kind_of_result(explanation),
        inputs=explanation.inputs,
        result_dtype=explanation.result_dtype,
        size=explanation.size,
        source=explanation.source,
        made_by=made_by.operation if made_by else "",
    )


def _summary(it: Explanation) -> str:
    kind = KINDS[it.kind]
    if ALL_FINITE in it.notes:
        return NOTHING_BAD
    if it.candidates:
        places = [_brief_place(one) for one in it.candidates]
        told = f"{kind} born in one of {counted(len(places), 'place')}: {listed(places)}"
    elif it.origin == "operation":
        at, phrase = f", {_at(it)}" if it.file else "", _phrase(it)
        born = "that began" if it.kind in TOO_LARGE else "born"
        told = f"{kind} {born} {_in_module(it)}{at}{f': {phrase}' if phrase else ''}"
    elif it.kind in TOO_LARGE:
        told = f"{kind}: {TOO_LARGE[it.kind]}"
    elif it.origin == "input" and (NO_ARGUMENT in it.notes or not it.argument):
        told = f"{kind} in a tensor from outside of the forward"
        told += f": {printable(it.argument)}" if it.argument else ""
    elif it.origin == "input":
        told = f"{kind} in the data: {printable(it.argument)}"
    elif it.origin == "weights":
        told = f"{kind} in the model before the forward"
        told += f": {printable(it.parameter)}" if it.parameter else ""
        told += f", since step {it.since_step}" if it.since_step else ""
    elif it.origin == "output_gradient":
        told = f"{kind} in the gradient that came back "
        told += (
            f"to the output of {_module(it)}"
            if it.module
            else "from the loss, outside of the model"
        )
    else:
        told = f"{kind}: where it was born was not found"
    told += f", {_examples(it.examples, 3)}" if it.examples else ""
    largest = [printable(one.name) for one in it.largest_parameters[:1]]
    largest += [f"example {printable(one.name)}" for one in it.largest_examples[:1]]
    return told + (f"; largest: {listed(largest)}" if largest else "")


def _paragraph(it: Explanation) -> Iterator[str]:
    yield from _beginning(it)
    yield from _details(it)
    if it.origin == "operation" and (it.argument or it.parameter):
        source = f"input {it.argument}" if it.argument else f"model's {it.parameter}"
        yield wrapped(f"Made possible by what is in the {printable(source)}.", "  ")
    above, depth = it.made_possible_by, 0
    while above is not None and depth < 3:
        named = shown_name(above.operation) if above.operation else "an operation"
        end = ":" if above.file or above.source else "."
        yield wrapped(f"Made possible by {printable(named)} {_in_module(above)}{end}", "  ")
        yield from _location(above)
        above, depth = above.made_possible_by, depth + 1
    for what, shares in (("parameter", it.largest_parameters), ("example", it.largest_examples)):
        if shares:
            told = ", ".join(map(_share_words, shares))
            one_or_many = what if len(shares) == 1 else f"{what}s"
            yield wrapped(f"Largest {one_or_many}: {told}.", "  ")
    said = [("Note", note) for note in it.notes] + [("To try", it.advice)]
    for what, text in said:
        if text.strip():
            yield wrapped(f"{what}: {_sentence(text)}", "  ")


def _beginning(it: Explanation) -> Iterator[str]:
    kind, located = f"{KINDS[it.kind]}{_when(it)}", bool(it.file or it.source)
    if ALL_FINITE in it.notes:
        yield f"{NOTHING_BAD}."
    elif it.candidates:
        yield wrapped(f"{kind}, born in one of these places:", "  ")
        for one in it.candidates[:MOST_CANDIDATES]:
            named = f"{printable(shown_name(one.operation))} " if one.operation else ""
            end = ":" if one.file or one.source else ""
            yield wrapped(f"  {named}{_in_module(one)}{end}", "  ")
            yield from _location(one, "    ")
        if (more := len(it.candidates) - MOST_CANDIDATES) > 0:
            yield f"  and {more:,} more"
    elif it.kind in TOO_LARGE:
        yield wrapped(f"{kind}: {TOO_LARGE[it.kind]}.", "  ")
        if it.origin == "operation":
            yield wrapped(f"It began {_in_module(it)}{':' if located else '.'}", "  ")
            yield from _location(it)
        elif it.origin in ORIGINS_OF_LARGE:
            told = f"I{OF_A_PART[1:]}.".format(module=_module(it)) if _of_a_part(it) else ""
            yield wrapped(told or ORIGINS_OF_LARGE[it.origin], "  ")
    elif it.origin == "operation":
        yield wrapped(f"{kind}, born {_in_module(it)}{':' if located else '.'}", "  ")
        yield from _location(it)
    else:
        yield wrapped(f"{kind}: {_origin(it)}.", "  ")
        yield from _location(it)


def _of_a_part(it: Explanation) -> bool:
    return it.origin == "output_gradient" and bool(it.module)


def _origin(it: Explanation) -> str:
    if _of_a_part(it):
        return OF_A_PART.format(module=_module(it))
    if it.origin != "input":
        return ORIGINS[it.origin]
    if NO_ARGUMENT in it.notes:
        return OTHER_TENSOR
    return ORIGINS["input"] if it.argument else FROM_OUTSIDE


def _details(it: Explanation) -> Iterator[str]:
    """Yields what was bad, how much of it and where in the batch, and what it was made of."""
    if it.candidates or it.origin == "not_found":
        if it.examples:
            yield wrapped(f"It is in {_examples(it.examples)}.", "  ")
        return
    if told := _extent(it):
        yield wrapped(f"{told}.", "  ")
    if it.inputs:
        if it.origin == "operation":
            yield f"Its {'input' if len(it.inputs) == 1 else 'inputs'}:"
        for one in it.inputs[:MOST_OPERANDS]:
            yield wrapped(f"  {_operand_words(one, it.operation)}", "      ")
        if (more := len(it.inputs) - MOST_OPERANDS) > 0:
            yield f"  and {more:,} more"


def _extent(it: Explanation) -> str:
    """Returns the sentence that says what was bad, how much of it, and where in the batch."""
    phrase = _phrase(it) if it.origin == "operation" else ""
    bad = _bad_elements(it)
    where = f", in {_examples(it.examples)}" if it.examples else ""
    if it.origin == "weights" and it.since_step:
        where += f", since step {it.since_step:,}"
    if phrase:
        return f"This is {phrase}{f': {bad}' if bad else ''}{where}"
    if not bad and (where or it.argument or it.parameter):
        bad = f"{_owner(it)} {'is bad' if it.kind in TOO_LARGE else f'has {KINDS[it.kind]}'}"
    # A name stays as it is.
    begins = bad.startswith(("all ", "the ", "a "))
    return f"{bad[:1].upper() if begins else bad[:1]}{bad[1:]}{where}"


def _when(it: Explanation) -> str:
    told = f"step {it.step:,}" if it.step else ""
    if it.micro_batch:
        told = f"micro-batch {it.micro_batch:,}{f' of {told}' if told else ''}"
    if not told:
        return ""
    rank = f" on rank {it.rank}" if it.rank else ""
    return f" in {told}{f' (optimizer {printable(it.optimizer)})' if it.optimizer else ''}{rank}"


def _module(it: Explanation) -> str:
    kind = f" ({printable(it.module_class)})" if it.module_class else ""
    return f"{printable(it.module) if it.module else 'the model'}{kind}"


def _in_module(it: Explanation) -> str:
    if it.module is None:
        return f"in the {it.phase}, outside of the model" if it.phase else "outside of the model"
    return f"in the {it.phase} of {_module(it)}" if it.phase else f"in {_module(it)}"


def _phrase(it: Explanation) -> str:
    """Returns what the operation was, and on what; empty if no operation is known."""
    facts = facts_of(it)
    if not facts.operation:
        return ""
    from gradwatch.record.circumstances import circumstance  # few runs need it

    if (known := circumstance(facts)) is not None:
        return known.told(facts)
    named = printable(shown_name(it.operation))
    return f"the gradient of {named}" if facts.backward else named


def _owner(it: Explanation) -> str:
    """Returns what has the bad elements."""
    if it.origin == "input" and NO_ARGUMENT in it.notes and it.argument:
        return printable(it.argument)
    if it.origin == "input":
        return f"the input {printable(it.argument)}" if it.argument else "the tensor"
    if it.origin == "weights":
        return f"the model's {printable(it.parameter) or 'weights'}"
    if it.origin == "output_gradient":
        return f"the gradient at the output of {_module(it)}"
    return "the gradient" if facts_of(it).backward else "the result"


def _bad_elements(it: Explanation) -> str:
    kind = _kind_of_result(it)
    if not it.count or kind not in ("nan", "inf"):
        return ""
    owner = _owner(it)
    kind = "NaN or Inf" if it.nan_count and it.inf_count else KINDS[kind]
    if it.kind == "overflow":  # they are finite: what is too large counts as infinite in the search
        kind = "too large"
    dtype = printable(it.result_dtype)
    shape = str(list(it.result_shape)) if it.result_shape else ""
    form = f" ({', '.join(filter(None, (dtype, shape)))})" if dtype or shape else ""
    if it.size == 1:
        return f"{owner}{form} is {kind}"
    if it.count == it.size:
        return f"all {it.size:,} elements of {owner}{form} are {kind}"
    of = f" of {it.size:,} elements" if it.size else f" element{'' if it.count == 1 else 's'}"
    return f"{it.count:,}{of} of {owner}{form} {'is' if it.count == 1 else 'are'} {kind}"


def _operand_words(one: Operand, operation: str) -> str:
    name = printable(shown_operand(one.name, operation))
    if one.is_number:
        infinite = "-inf" if one.negative_infs else "inf"
        return f"{name}: {number(one.low) if not one.infs else infinite}"
    told = f"{name}: {f'{printable(one.dtype)} {list(one.shape)}'.strip()}"
    if 0 in one.shape:
        return f"{told}, empty"
    if math.isnan(one.low):
        told += ", no finite element"
    elif one.low == one.high and (one.nans or one.infs):
        told += f", {number(one.low)} where finite"
    elif one.low == one.high:
        told += f", all {number(one.low)}" if one.size > 1 else f", {number(one.low)}"
    else:
        told += f", {number(one.low)} to {number(one.high)}"
    minus = one.negative_infs
    infinite = "-inf" if minus == one.infs else "+inf" if minus == 0 else "Inf"
    bad = [(one.zeros, "0"), (one.nans, "NaN"), (one.infs, infinite)]
    if one.low == one.high == 0:
        bad = bad[1:]
    return told + "".join(
        f", {count:,} {'is' if count == 1 else 'are'} {what}" for count, what in bad if count
    )


def _examples(indices: Sequence[int], most: int = MOST_EXAMPLES) -> str:
    if len(indices) > 3 and list(indices) == list(range(indices[0], indices[-1] + 1)):
        return f"examples {indices[0]:,} to {indices[-1]:,}"
    noun = "example" if len(indices) == 1 else "examples"
    return f"{noun} {listed([f'{one:,}' for one in indices], most)}"


def _share_words(one: Share) -> str:
    share = [] if math.isnan(one.share) else [f"{100 * one.share:.3g} %"]
    norm = [] if math.isnan(one.norm) else [f"norm {one.norm:.4g}"]
    numbers = ", ".join(share + norm)
    return f"{printable(one.name)}{f' ({numbers})' if numbers else ''}"


def _location(it: Explanation, indent: str = "  ") -> Iterator[str]:
    """Yields file and source, each on a line of its own that is never wrapped."""
    if it.file:
        yield f"{indent}{_at(it)}"
    if it.source:
        yield f"{indent}{'  ' if it.file else ''}{printable(it.source.strip())}"


def _at(it: Explanation) -> str:
    return f"{printable(_shown_path(it.file))}{f':{it.line}' if it.line else ''}"


def _brief_place(it: Explanation) -> str:
    return _at(it) if it.file else _in_module(it)


def _shown_path(path: str) -> str:
    """Returns the path as seen from the current directory, if it is below that."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except (OSError, ValueError):  # the directory is gone, or does not hold the file
        return path


def _sentence(text: str) -> str:
    """Returns the text on one line, with a full stop."""
    text = printable(" ".join(text.split()))
    return text if text.endswith((".", "!", "?", ":")) else f"{text}."
