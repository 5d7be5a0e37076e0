"""Finds where bad gradients came from, in what an observer has seen of a replay.

The *symptom* are the parameters' gradients that are not finite. The observer has noted the roots
that each of them came from. A root that is a meant infinity, as in a mask, is innocent; if one that
is not meant was made NaN later, it is to blame, and not what met it. Of several the first that ran
is the cause. Then the batch runs once more, and this time the values are looked at that the cause
was given, and the operations that these came from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

from gradwatch.record.explanation import (
    ALL_FINITE,
    ATTRIBUTE,
    NO_ARGUMENT,
    NOT_AGAIN,
    ExplainedKind,
    Explanation,
    Operand,
)
from gradwatch.record.operations import LIMITS, name_of_node, plain_name, public_name
from gradwatch.replay.advice import advice_for
from gradwatch.replay.frames import Place, source_of
from gradwatch.replay.observer import NO_ROOTS, Details, Observer, Operation, Root
from gradwatch.replay.stand_ins import ReplayError

Run = Callable[[Observer], list[str]]
"""Runs the same forward and backward under an observer; returns sentences of what to know of it."""

MOST_ANCESTORS = 64  # operations before the cause that are looked at
MOST_MADE_BY = 4  # of these are named
DOUBTFUL = (
    "{name}, which the forward writes to, is bad by now. What it held before is not known, so it "
    "may be the cause, or what the bad forward has left there. A step that is skipped puts back "
    'buffers: make it one with register_buffer(), and use on_nonfinite="explain".'
)
MADE_ELSEWHERE = (
    "It is no argument of the forward: a tensor that was made outside of torch, such as from NumPy "
    "or from numbers of Python, and first used on this line."
)
# They write a constant. If that is infinite, somebody meant it.
_FILLS = frozenset(
    {"fill", "full", "full_like", "new_full", "masked_fill", "index_fill", "scalar_tensor"}
    | {"constant_pad_nd", "lift_fresh", "lift_fresh_copy", "where", "masked_scatter", "scatter"}
)
# Their result holds elements that they were given, as they were.
_PASS_ON = frozenset(
    {"clone", "contiguous", "copy", "to", "reshape", "roll", "flip", "repeat", "tril", "triu"}
    | {"cat", "stack", "gather", "index", "index_select", "index_put", "index_copy", "embedding"}
    | {"masked_fill", "where", "constant_pad_nd", "lift_fresh", "slice_backward", "select_backward"}
)
_KEEP_ZERO = frozenset(
    {"mul", "div", "neg", "abs", "sqrt", "pow", "square", "relu", "clamp", "sin"}
)
_OVERWRITE = frozenset({"copy", "index_put", "index_copy", "put", "scatter", "masked_scatter"})
_ADD_UP = frozenset({"sum", "mean", "cumsum", "amax", "linalg_vector_norm"})  # 0 if all of it is
# What is 0 stays so in them, or only an eps has been added: in the second ones by a number.
_SIGNS = frozenset({"abs", "neg"})
_SCALES = frozenset({"add", "mul", "div"})
_ZERO_IS_AN_EDGE = {
    "log": "self",
    "log2": "self",
    "log10": "self",
    "sqrt": "self",
    "rsqrt": "self",
    "reciprocal": "self",
    "pow": "self",
    "linalg_vector_norm": "self",
    "norm": "self",
    "cdist": "x1",
    "div": "other",
    "xlogy": "other",
    "atan2": "self",
    "remainder": "other",
    "fmod": "other",
}


def explain_run(run: Run, known_bad: bool = True) -> Explanation:
    """Runs a micro-batch again, twice if its gradients are bad, and says where that came from.

    Args:
        run: Runs it; each time exactly alike.
        known_bad: Whether its gradients were bad before, so that finite ones are strange.
    """
    first, notes = _first_run(run)
    cause, kind = _cause_of(first)
    if cause is None:
        if not known_bad:
            return Explanation(origin="not_found", notes=(*notes, ALL_FINITE))
        return _advised(Explanation(origin="not_found", notes=(*notes, NOT_AGAIN)))
    # From the first one on that was read: even a comparison with NaN changes what comes after.
    suspects = {"buffer": first.doubtful, "input": first.changed_inputs}
    doubtful = [one for one in first.roots if one.name in suspects.get(one.source or "", ())]
    if doubtful and doubtful[0].number <= cause.number:
        if doubtful[0].source == "buffer":  # of an input it is among the notes
            notes = [*notes, DOUBTFUL.format(name=doubtful[0].name)]
        return _advised(Explanation(origin="not_found", kind=kind, notes=tuple(notes)))
    if _is_doubtful(first, cause):
        return _advised(Explanation(origin="not_found", kind=kind, notes=tuple(notes)))
    search = _Search(first, cause, kind)
    second = Observer(search.wanted())
    second.earlier = first.earlier
    run(second)
    found = search.explanation(second.details if _is_alike(first, second) else {})
    return _advised(replace(found, notes=(*found.notes, *notes)))


def _first_run(run: Run) -> tuple[Observer, list[str]]:
    """Runs it; once more if numbers that it moves, such as a counter, may have been others then."""
    first = Observer()
    notes = run(first)
    if not first.may_be_earlier:
        return first, notes
    again = Observer()
    again.earlier = first.may_be_earlier
    try:
        others = run(again)
    except ReplayError:
        return first, notes
    # If it does not end where the training did, they were not these.
    return (first, notes) if again.may_be_earlier else (again, others)


def _is_doubtful(seen: Observer, cause: Root) -> bool:
    """Returns whether a cause may come of what the forward has changed in an object."""
    if seen.doubtful_from is None or cause.source not in (None, "constant"):
        return False  # what came in bad from elsewhere is so whatever was computed
    number: int | None = cause.number
    if cause.source is None:
        number = seen.forward_of(cause.number)
    return number is None or number >= seen.doubtful_from


def _advised(explanation: Explanation) -> Explanation:
    return replace(explanation, advice=advice_for(explanation))


def _is_alike(first: Observer, second: Observer) -> bool:
    return [one.name for one in first.operations] == [one.name for one in second.operations]


# -- which root is the cause ---------------------------------------------------------------------


def _cause_of(seen: Observer) -> tuple[Root | None, ExplainedKind]:
    symptom = NO_ROOTS.union(*seen.gradient_roots.values())
    nan = any(seen.bad_gradients.values())
    if not symptom:
        symptom = seen.output_roots
        nan = any(seen.roots[i].nans for i in symptom)
    causes = _first_causes(seen, symptom)
    # A loss outside of the module only passes on what came out of the module.
    from_loss = {i for i in causes if seen.roots[i].source == "output_gradient"}
    if from_loss:
        earlier = _first_causes(seen, seen.output_roots)
        earlier = {i for i in earlier if not _is_meant(seen, seen.roots[i], None)}
        causes = causes - from_loss | earlier if earlier else causes
    if not causes:
        return None, "nan"
    cause = min((seen.roots[i] for i in causes), key=_order)
    return _in_forward(seen, cause), "nan" if nan else "inf"


def _in_forward(seen: Observer, cause: Root) -> Root:
    """Returns the root in the forward, if the operation whose backward went bad did so before."""
    if cause.source is not None or not seen.operations[cause.number].backward:
        return cause
    forward = seen.forward_of(cause.number)
    own = (one for one in seen.roots if one.number == forward and one.source is None)
    return next((one for one in own if not _is_meant(seen, one, None)), cause)


def _order(root: Root) -> tuple[int, bool, bool]:
    # Of what came into one operation: weights, which are there in every step; then data.
    return root.number, root.source is None, root.source not in ("parameter", "buffer")


def _first_causes(seen: Observer, symptom: Collection[int]) -> set[int]:
    causes = set().union(*(_resolved(seen, i) for i in symptom)) if symptom else set()
    guilty = {i for i in causes if not _is_meant(seen, seen.roots[i], None)}
    return guilty or causes


def _resolved(seen: Observer, number: int) -> set[int]:
    """Returns the roots to blame for a root: itself, or those of the infinity that it made NaN."""
    root = seen.roots[number]
    before = {i for one in root.via if one < number for i in _resolved(seen, one)}
    return {i for i in before if not _is_meant(seen, seen.roots[i], root)} or {number}


def _is_meant(seen: Observer, root: Root, met: Root | None) -> bool:
    """Returns whether a root is an infinity that somebody wanted to be there.

    ``met`` is the root of the NaN that an operation made of it; None if there is none.
    """
    if root.nans or not root.infs:
        return False
    if root.source is not None:
        return root.source != "output_gradient" and root.negative and root.masks
    name = _name_of(seen.operations[root.number]).rstrip("_")
    if name in _FILLS:
        return True
    # Other examples have it as well, and are none the worse for it. That is said of a logarithm of
    # 0 or a division by 0, but never of an overflow.
    of_zero = name in _ZERO_IS_AN_EDGE and name != "pow"
    if met is None or root.examples is None or met.examples is None or not of_zero:
        return False
    return bool(set(root.examples) - set(met.examples))


# -- what to say of it ---------------------------------------------------------------------------


class _Search:
    """Describes one cause."""

    def __init__(self, seen: Observer, cause: Root, kind: ExplainedKind) -> None:
        self._seen = seen
        self._cause = cause
        self._kind = kind
        inside = cause.number < len(seen.operations)
        self._operation = seen.operations[cause.number] if inside else None
        self._forward = self._forward_number()

    def _forward_number(self) -> int | None:
        if self._operation is None or self._cause.source is not None:
            return None
        return self._seen.forward_of(self._cause.number)

    def _number(self) -> int:
        """Returns the number of the operation that is told."""
        # In a backward of the user's own, or a hook, it is no gradient of an operation.
        own = (
            self._operation is not None and self._operation.backward and self._operation.place.line
        )
        return self._cause.number if self._forward is None or own else self._forward

    def wanted(self) -> set[int]:
        """Lists the operations whose values are to be looked at."""
        start = self._number()
        wanted = {self._cause.number, start}
        waiting = [start]
        while waiting and len(wanted) < MOST_ANCESTORS:
            number = waiting.pop(0)
            if not 0 <= number < len(self._seen.operations):
                continue
            parents = [one for one in self._seen.operations[number].parents if one >= 0]
            waiting += [one for one in parents if one not in wanted]
            wanted.update(parents)
        for via in self._cause.via:
            wanted.add(self._seen.roots[via].number)
        return wanted

    def explanation(self, details: dict[int, Details]) -> Explanation:
        cause = self._cause
        common: dict[str, Any] = {
            "kind": self._kind,
            "count": cause.nans + cause.infs,
            "nan_count": cause.nans,
            "inf_count": cause.infs,
            "size": cause.size,
            "result_shape": cause.shape,
            "result_dtype": cause.dtype,
            "examples": () if self._seen.examples.unsure else cause.examples or (),
        }
        if cause.source is not None:
            return self._from_outside(common)
        return self._of_operation(common, details)

    def _from_outside(self, common: dict[str, Any]) -> Explanation:
        cause, source = self._cause, self._cause.source
        if source == "output_gradient":
            where = self._where(cause.call or Place())
            if where["module"] is None:
                where |= {"module": "", "module_class": self._outermost()}
            return Explanation(origin="output_gradient", phase="backward", **where, **common)
        place = self._operation.place if self._operation is not None else Place()
        of_model = source in ("parameter", "buffer")
        is_given = source == "input" and cause.name not in self._seen.variables
        if not (of_model or is_given) and self._is_in_model(place):
            common["notes"] = (NO_ARGUMENT if cause.name else MADE_ELSEWHERE,)
        if of_model and cause.name in self._seen.attributes:
            common["notes"] = (ATTRIBUTE,)
        return Explanation(
            origin="weights" if of_model else "input",
            argument="" if of_model else cause.name,
            parameter=cause.name if of_model else "",
            **self._where(place),
            **common,
        )

    def _is_in_model(self, place: Place) -> bool:
        return place.module in self._seen.modules

    def _outermost(self) -> str:
        return next((kind for name, kind in self._seen.modules.values() if not name), "")

    def _where(self, place: Place) -> dict[str, Any]:
        name, kind = self._seen.modules.get(place.module, (None, ""))
        file, line = (place.file, place.line) if place.line else self._seen.caller
        return {
            "module": name,
            "module_class": kind,
            "file": file,
            "line": line,
            "source": source_of(file, line),
        }

    def _of_operation(self, common: dict[str, Any], details: dict[int, Details]) -> Explanation:
        cause, forward = self._cause, self._forward
        operation = self._seen.operations[cause.number]
        name, place = self._name_and_place(operation, forward)
        number = self._number()
        of_forward = details.get(number)
        operands = () if of_forward is None else self._operands(of_forward, details)
        if number != cause.number and cause.number in details:
            here = details[cause.number].operands
            operands += tuple(replace(one, name="gradient") for one in here[:1])
        if forward is None and not place.line:
            # Only the backward is known, and no line that it is of.
            return Explanation(origin="not_found", operation=name, inputs=operands, **common)
        argument, parameter, before, examples = self._made_possible(name, of_forward, details)
        common["examples"] = common["examples"] or examples
        return Explanation(
            origin="operation",
            phase="backward" if operation.backward else "forward",
            operation=name,
            inputs=operands,
            argument=argument,
            parameter=parameter,
            made_possible_by=before,
            **self._where(place),
            **common,
        )

    def _name_and_place(self, operation: Operation, number: int | None) -> tuple[str, Place]:
        """Returns name and place of an operation; ``number`` is that of its forward operation."""
        if not operation.backward:
            return _name_of(operation), operation.place
        forward = None if number is None else self._seen.operations[number]
        if operation.place.line:  # a backward of the user's own, or a hook
            module = operation.place.module or (forward.place.module if forward else 0)
            return _name_of(operation), operation.place._replace(module=module)
        node = name_of_node(operation.node[0]) if operation.node else ""
        if forward is None:
            return node, operation.place
        return _name_of(forward), forward.place

    def _operands(self, of: Details, details: dict[int, Details]) -> tuple[Operand, ...]:
        tensors = zip(of.operands, of.parents, strict=False)
        made = [replace(one, made_by=self._made_by(number, details)) for one, number in tensors]
        return (*made, *of.operands[len(made) :])

    def _made_by(self, number: int, details: dict[int, Details]) -> tuple[str, ...]:
        """Names the operations that a tensor was computed with, along the first operand of each."""
        names: list[str] = []
        seen: set[int] = set()
        while number >= 0 and number not in seen and len(names) < MOST_MADE_BY:
            seen.add(number)
            operation = self._seen.operations[number]
            of = details.get(number)
            name, several = _name_of(operation).rstrip("_"), len(operation.parents) > 1
            kept = name in _PASS_ON or name in _SIGNS or (name in _SCALES and not several)
            if not kept or (name == "to" and of is not None and of.operands[0].dtype not in LIMITS):
                names += [name] if of is None else _computed(name, of)
            first = 1 if operation.writes and name in _OVERWRITE and several else 0
            number = operation.parents[first] if operation.parents else -1
        return tuple(names)

    # -- what made it possible -----------------------------------------------------------------

    def _made_possible(
        self, name: str, details: Details | None, all_details: dict[int, Details]
    ) -> tuple[str, str, Explanation | None, tuple[int, ...]]:
        """Returns what the cause goes back to: argument, parameter, operation and examples."""
        masks = [self._seen.roots[i] for i in self._cause.via]
        if masks:
            return self._by_mask(masks[0], all_details)
        if details is None:
            return "", "", None, ()
        edge = _ZERO_IS_AN_EDGE.get(name.rstrip("_"))
        tensors = details.operands[: len(details.parents)]
        index = next((i for i, one in enumerate(tensors) if one.name == edge), None)
        if index is None:
            return "", "", None, ()
        operand = details.operands[index]
        is_edge = _has_zero if operand.zeros else _is_negative
        if not is_edge(operand):
            return "", "", None, ()
        examples = details.zero_examples[index] or () if operand.zeros else ()
        visited: set[int] = set()
        while True:
            number, origin = details.parents[index], details.origins[index]
            if number < 0 or number in visited or number not in all_details:
                return (*_named(origin), None, examples)
            visited.add(number)
            details = all_details[number]
            operation = self._seen.operations[number]
            onward = _given_by(operation, details, is_edge)
            if onward is None:
                return "", "", self._earlier(number, details), examples
            index = onward

    def _by_mask(
        self, mask: Root, details: dict[int, Details]
    ) -> tuple[str, str, Explanation | None, tuple[int, ...]]:
        if mask.source is not None:
            return (*_named((mask.source, mask.name)), None, ())
        return "", "", self._earlier(mask.number, details.get(mask.number)), ()

    def _earlier(self, number: int, details: Details | None) -> Explanation:
        operation = self._seen.operations[number]
        result = None if details is None else details.result
        forward = self._seen.forward_of(number)
        name, place = self._name_and_place(operation, forward)
        return Explanation(
            origin="operation",
            phase="backward" if operation.backward else "forward",
            kind=self._kind,
            operation=name,
            inputs=() if details is None else details.operands,
            result_shape=() if result is None else result.shape,
            result_dtype="" if result is None else result.dtype,
            **self._where(place),
        )


def _named(origin: tuple[str, str] | None) -> tuple[str, str]:
    if origin is None:
        return "", ""
    source, name = origin
    return ("", name) if source in ("parameter", "buffer") else (name, "")


def _given_by(
    operation: Operation, details: Details, edge: Callable[[Operand], bool]
) -> int | None:
    """Returns the operand that a value at the edge came from; None if the operation has made it."""
    name, result = _name_of(operation).rstrip("_"), details.result
    tensors = details.operands[: len(details.parents)]
    # What is written over is not where the value came from.
    first = 1 if operation.writes and name in _OVERWRITE else 0
    onward = [i for i, one in enumerate(tensors) if i >= first and edge(one)]
    if name in _PASS_ON or not onward:
        return onward[0] if onward else None
    if edge is not _has_zero or result is None:
        return None
    if name in _ADD_UP:
        rows, zeros = details.zero_rows[0], details.zero_results
        by_row = bool(rows and zeros and set(zeros) <= set(rows))
        return 0 if by_row or tensors[0].zeros == math.prod(tensors[0].shape) else None
    if name not in _KEEP_ZERO:
        return None
    return next((i for i in onward if tensors[i].zeros >= result.zeros), None)


def _computed(name: str, details: Details) -> list[str]:
    """Names what an operation computes: roots and squares have several forms."""
    powers = [one.low for one in details.operands if one.is_number] if name == "pow" else []
    if powers[:1] in ([0.5], [2]):
        return ["sqrt" if powers[0] < 1 else "square"]
    same = [*zip(details.parents, details.origins, strict=True)][:2]
    if len(same) == 2 and same[0] == same[1] != (-1, None):
        if name == "mul":
            return ["square"]
        if plain_name(name) == "matmul":
            return ["sum", "square"]
    return [name]


def _has_zero(operand: Operand) -> bool:
    return operand.zeros > 0


def _is_negative(operand: Operand) -> bool:
    return operand.low < 0


def _name_of(operation: Operation) -> str:
    return public_name(operation.name)
