"""What a finding says of an explanation: where in the code, in which examples, and how large."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gradwatch.record.explanation import Explanation, Share
from gradwatch.report.finding import named

_MOST_EXAMPLES = 10


def is_found(explanation: Explanation | None) -> bool:
    """Tells whether an explanation names a cause."""
    return explanation is not None and explanation.origin != "not_found"


def evidence_told(explanation: Explanation) -> str:
    """Returns what was seen in a replay, as phrases with semicolons between them."""
    return "; ".join(_phrases(explanation))


def _phrases(of: Explanation) -> Iterator[str]:
    yield from _where(of)
    if of.made_possible_by is not None:
        yield f"made possible by {', '.join(_where(of.made_possible_by))}"
    if of.candidates:
        # Without a line of its own, it is one of those that are known.
        yield "one of: " + " | ".join(", ".join(_where(one)) for one in of.candidates)
    if of.examples:
        word = "example" if len(of.examples) == 1 else "examples"
        yield f"{word} {named([str(one) for one in of.examples], _MOST_EXAMPLES)} of the batch"
    if of.largest_parameters:
        yield f"largest: {_shares(of.largest_parameters)}"
    if of.largest_examples:
        yield f"largest examples: {_shares(of.largest_examples)}"


def _where(of: Explanation) -> Iterator[str]:
    """Yields the operation, its module, and its line."""
    if of.operation:
        operation = f"the backward of {of.operation}" if of.phase == "backward" else of.operation
        yield f"{operation}{_module(of)}"
    for name in (of.argument, of.parameter):
        if name:
            yield name
    if of.line:
        yield f"{of.file}:{of.line}: {of.source}"


def _module(of: Explanation) -> str:
    if of.module is None:
        return ""
    kind = f" ({of.module_class})" if of.module_class else ""
    return f" in {of.module or 'the outermost module'}{kind}"


def _shares(shares: Sequence[Share]) -> str:
    return ", ".join(f"{one.name} ({100 * one.share:.3g} %)" for one in shares)
