"""Observer: sees every operation of a forward and a backward, and what is not finite in them.

For each operation it notes the user's line and the module, which operations its operands came from,
and, where its result is not finite, the *roots* of that: the operations whose result was not finite
although their operands were, and the tensors that came in bad from outside. Roots are handed on
from result to result only through operations that did not get rid of them, as a ``where`` may.
Values are looked at once, when an operation ends; nothing is kept but numbers.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gradwatch.record.explanation import Operand
from gradwatch.record.operations import name_of_node, public_name
from gradwatch.replay.examples import Examples
from gradwatch.replay.frames import Frames, Place, variable_of
from gradwatch.replay.operands import (
    State,
    can_mask,
    covers,
    dtype_of,
    has_nan,
    is_finite,
    is_opaque,
    memory_of,
    named_arguments,
    numbers_in,
    operand_of,
    state_of,
    tensors_in,
    values_of,
)

Source: TypeAlias = Literal["input", "parameter", "buffer", "output_gradient", "constant"]
Roots: TypeAlias = frozenset[int]

NO_ROOTS: Roots = frozenset()
# Results that hold whatever was in memory before.
_EMPTY = frozenset(
    {"empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"}
    | {"resize_"}
)
# How many of their results are meant for others; the rest is kept for the backward, or is memory to
# work in, of which parts are never written.
_RESULTS = {
    "_ctc_loss": 1,
    "_cudnn_ctc_loss": 1,
    "_thnn_fused_lstm_cell": 2,
    "_thnn_fused_gru_cell": 1,
    "mkldnn_rnn_layer": 3,
    "_cudnn_rnn": 3,
    "miopen_rnn": 3,
}
_ATTENTION = ("_scaled_dot_product_", "_flash_attention_", "_efficient_attention_")
# They look at no value, and their result is one that they were given; after `set_` it is what the
# memory holds that a tensor was given.
_NO_VALUES = frozenset(
    {"detach", "alias", "is_same_size", "set_", "sym_size", "sym_numel", "prim_layout"}
)


@dataclass(slots=True)
class Operation:
    """One operation that was run.

    Attributes:
        name: torch's name, without overload.
        place: The user's line and the module.
        parents: For each operand the number of the operation that made it; -1 for none.
        sequence: The autograd sequence number that the next node would have had.
        node: In the backward, the name and the sequence number of the node that ran it.
        backward: Whether it belongs to a backward.
        views: Whether its result shares memory with an operand, and is not written to.
        writes: Whether it writes to an operand.
    """

    name: str
    place: Place
    parents: tuple[int, ...]
    sequence: int
    node: tuple[str, int] | None
    backward: bool
    views: bool = False
    writes: bool = False


@dataclass(slots=True)
class Root:
    """Where something that is not finite began.

    Attributes:
        number: The number of the operation; that of the first one that used it, for a tensor from
            outside.
        source: Where a tensor from outside came from; None for an operation.
        name: Name of that tensor.
        nans: NaN in the result.
        infs: Infinite elements in it.
        negative: Whether all infinite elements are minus infinity.
        masks: Whether the result can be a mask: nothing but minus infinity, and one other value.
        size: Elements of it.
        shape: Its shape.
        dtype: Its dtype.
        examples: Indices of the bad examples along the batch dimension; None if it has none.
        via: Roots of infinite operands that were made NaN by it.
        call: For a gradient that came back, the module whose output it is of, and its caller.
    """

    number: int
    source: Source | None
    name: str
    nans: int
    infs: int
    negative: bool
    masks: bool
    size: int
    shape: tuple[int, ...]
    dtype: str
    examples: tuple[int, ...] | None
    via: Roots = NO_ROOTS
    call: Place | None = None


@dataclass(slots=True)
class Details:
    """What an operation was given and returned; only for those that were asked for.

    Attributes:
        operands: Its operands, before it ran: the tensors first, then Python's numbers. The other
            attributes are those of the tensors.
        result: Its result.
        zero_examples: For each operand the examples in which it has an exact 0.
        zero_rows: For each operand the examples in which it is nothing but 0.
        zero_results: The examples in which the result has an exact 0; None if it has none.
        origins: For each operand where it came in from, if it came from outside.
        parents: For each operand the number of the operation that made it; -1 for none.
    """

    operands: tuple[Operand, ...]
    result: Operand | None = None
    zero_examples: tuple[tuple[int, ...] | None, ...] = ()
    zero_rows: tuple[tuple[int, ...] | None, ...] = ()
    zero_results: tuple[int, ...] | None = None
    origins: tuple[tuple[Source, str] | None, ...] = ()
    parents: tuple[int, ...] = ()


@dataclass(slots=True)
class _Bad:
    """An operand or a result that is not finite, while its operation is looked at."""

    tensor: Tensor
    roots: Roots
    nan: bool
    mask: Tensor | None = None


class Observer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Watches one replay; see the module.

    Attributes:
        caller: File and line from which the user's code calls the model.
        operations: All operations, in the order in which they ran.
        roots: All roots, in the order in which they were seen.
        modules: Name and class of each module, by ``id()``.
        details: Of the operations that are wanted, by number.
        output_roots: Roots of outputs that are not finite.
        gradient_roots: Roots of each parameter's gradient that is not finite, by name.
        bad_gradients: Whether such a gradient holds a NaN, by name.
        variables: Names of those inputs that are variables of the functions, and no arguments.
        attributes: Names of those buffers that are none, but other tensors of the model.
        examples: Which example of the batch elements belong to.
        doubtful_from: Number of the first operation that reads what the forward has changed in an
            object, so that from there on nobody knows what the training has computed; None for
            none.
        earlier: Numbers to run it with, in place of what the forward has left in objects; see
            :class:`gradwatch.replay.changes.Changed`.
        may_be_earlier: Numbers that may have been there before the forward.
        changed_inputs: Names of inputs that were written to after the forward had begun.
        doubtful: Names of buffers that the forward writes to, and of which nobody knows what they
            held before: what is bad there may be what the same forward has left in the training.
    """

    def __init__(self, wanted: Collection[int] = ()) -> None:
        """Starts with nothing known of any tensor.

        Args:
            wanted: Numbers of operations of which :attr:`details` are wanted, after a first look at
                the same replay. Nothing else is looked at then, so there are no roots.
        """
        super().__init__()  # type: ignore[no-untyped-call]
        self.caller: tuple[str, int] = ("", 0)
        self.operations: list[Operation] = []
        self.roots: list[Root] = []
        self.modules: dict[int, tuple[str, str]] = {}
        self.details: dict[int, Details] = {}
        self.output_roots: Roots = NO_ROOTS
        self.gradient_roots: dict[str, Roots] = {}
        self.bad_gradients: dict[str, bool] = {}
        self.variables: Collection[str] = ()
        self.attributes: Collection[str] = ()
        self.changed_inputs: Collection[str] = ()
        self.doubtful: Collection[str] = ()
        self.examples = Examples()
        self.doubtful_from: int | None = None
        self.earlier: Mapping[tuple[object, ...], float] = {}
        self.may_be_earlier: Mapping[tuple[object, ...], float] = {}
        self._unread_yet: set[int | None] = set()
        self._reads: dict[int | None, int] = {}
        self._wanted = wanted
        self._is_idle = False  # what is done to look at a tensor is no operation of the run
        self._kept: list[object] = []  # ids are only good while what they are of is there
        self._named: dict[int, tuple[Source, str]] = {}
        self._calls: dict[int, Place] = {}
        self._producers: dict[int, int] = {}
        self._tainted: dict[int, Roots] = {}
        self._good: set[int] = set()
        self._not_looked_at: set[int] = set()
        self._time_first: set[int] = set()  # ids of modules
        self._unread: frozenset[int | None] = frozenset()  # operands of the one that is running
        self._frames = Frames(self.modules)
        self._sequences: list[int] = []

    # -- what the runner tells -----------------------------------------------------------------

    def name_module(self, module: nn.Module, name: str) -> None:
        """Says what a module is called; ``""`` for the outermost one."""
        self.modules.setdefault(id(module), (name, type(module).__name__))
        if getattr(module, "batch_first", None) is False:
            self._time_first.add(id(module))
        self._kept.append(module)

    def name_parameter(self, tensor: Tensor, name: str) -> None:
        """Says of which parameter a tensor is the stand-in."""
        self._name(tensor, "parameter", name)

    def name_buffer(self, tensor: Tensor, name: str) -> None:
        """Says of which buffer a tensor is the stand-in."""
        self._name(tensor, "buffer", name)

    def name_input(self, tensor: Tensor, argument: str) -> None:
        """Says which argument a tensor is; the first one with a dimension has the batch in it."""
        self._name(tensor, "input", argument)
        self.examples.note_input(tensor)

    def note_reads(self, tensors: Iterable[Tensor]) -> None:
        """Has it noted when these tensors are read first; see :meth:`first_read`."""
        for tensor in tensors:
            key = memory_of(tensor)
            if key is not None:
                self._unread_yet.add(key)
                self._kept.append(tensor)

    def first_read(self, tensors: Iterable[Tensor]) -> int | None:
        """Returns the number of the first operation that was given one of these tensors."""
        keys = set(map(memory_of, tensors))
        return min((number for key, number in self._reads.items() if key in keys), default=None)

    def begin_backward(
        self,
        outputs: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        calls: Sequence[tuple[nn.Module, tuple[str, int]]] = (),
    ) -> None:
        """Notes the end of the forward.

        Args:
            outputs: Its outputs.
            gradients: Those that the backward starts from, one for each output.
            calls: For each output the module that returned it, and file and line of its caller.
        """
        self._is_idle = True
        with torch.no_grad():
            for output in outputs:
                self.output_roots |= self._roots_of(output)
        self._is_idle = False
        for output, gradient, call in zip_longest(outputs, gradients, calls):
            if gradient is not None:
                self._name(gradient, "output_gradient", "")
                self.examples.note_like(gradient, output)
                key = memory_of(gradient)
                if key is not None and call is not None:
                    module, (file, line) = call
                    self._calls[key] = Place(file, line, id(module))

    def end(self, gradients: Mapping[str, Tensor | None]) -> None:
        """Looks at the gradients of the parameters, by name."""
        self._is_idle = True
        for name, gradient in gradients.items():
            if gradient is not None and not is_finite(gradient):
                self.gradient_roots[name] = self._roots_of(gradient)
                self.bad_gradients[name] = has_nan(gradient)

    def _name(self, tensor: Tensor, source: Source, name: str) -> None:
        key = memory_of(tensor)
        if key is None:
            return
        self._named.setdefault(key, (source, name))
        self._kept.append(tensor)
        # Something that is gone by now may have had the same memory.
        self._producers.pop(key, None)
        self._tainted.pop(key, None)

    # -- the operations ------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Runs an operation, and looks at its result."""
        kwargs = kwargs or {}
        if types and any(map(is_opaque, tensors_in((*args, *kwargs.values())))):
            return NotImplemented  # what their class makes of the operation is seen instead
        packet = getattr(func, "overloadpacket", None)  # operators of higher order have none
        name = "" if packet is None else packet.__name__
        if packet is None or name in _NO_VALUES or self._is_idle:
            return func(*args, **kwargs)
        with torch.no_grad():
            operands = list(tensors_in((*args, *kwargs.values())))
            place = self._frames.place()
            number = len(self.operations)
            norm = "batch_norm" in name
            self._unread = _unread(named_arguments(func, args, kwargs)) if norm else frozenset()
            bad = [] if self._wanted else self._bad_operands(func, operands, number, place)
            if number in self._wanted:
                self.details[number] = self._details(func, operands, args, kwargs)
        result = func(*args, **kwargs)
        with torch.no_grad():
            self._note(func, name, args, kwargs, place, operands, result, bad)
        return result

    def _note(
        self,
        func: Any,
        name: str,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        place: Place,
        operands: list[Tensor],
        result: Any,
        bad: list[_Bad],
    ) -> None:
        number = len(self.operations)
        keys = [memory_of(one) for one in operands]
        node: Any = torch._C._current_autograd_node()  # None outside of a backward
        operation = Operation(
            name,
            place,
            tuple(-1 if key is None else self._producers.get(key, -1) for key in keys),
            torch._C._autograd._get_sequence_nr(),
            None if node is None else (node.name(), node._sequence_nr()),
            backward=node is not None and not place.recomputed,
        )
        self.operations.append(operation)
        read = self._unread_yet.intersection(keys)
        self._unread_yet -= read
        self._reads.update(dict.fromkeys(read, number))
        self._sequences.append(operation.sequence)
        pairs = list(zip(keys, operands, strict=True))
        if place.module in self._time_first:
            self.examples.note_time_first(pairs)
        results = list(tensors_in((result,)))
        operation.writes = bool(func._schema.is_mutable)
        self._note_results(func, args, kwargs, pairs, results)
        wanted = _RESULTS.get(name, 1 if name.startswith(_ATTENTION) else len(results))
        self._not_looked_at.update(key for one in results[wanted:] if (key := memory_of(one)))
        self._not_looked_at.difference_update(map(memory_of, results[:wanted]))
        if name in _EMPTY:
            for one in results:
                self._tainted.pop(memory_of(one) or 0, None)
            return
        if name == "copy_" and _is_of_bytes(operands):
            self._note_same(keys[0], keys[1])
            return
        if self._wanted:
            if number in self._wanted and results:
                details, first = self.details[number], results[0]
                details.result = operand_of("result", first)
                details.zero_results = self.examples.of(first, values_of(first) == 0)
            return
        for one in results[:wanted]:
            self._look(func, number, one, operands, bad)

    def _note_results(
        self,
        func: Any,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        operands: Sequence[tuple[int | None, Tensor]],
        results: Sequence[Tensor],
    ) -> None:
        """Notes which memory an operation has written, and which examples are in it."""
        operation, shared = self.operations[-1], {key for key, _ in operands}
        for one in results:
            key = memory_of(one)
            if key is None:
                continue
            if key in shared and not operation.writes:
                operation.views = True
                continue
            if key not in shared:
                self.examples.note_result(func, args, kwargs, operands, (key, one))
            self._producers[key] = len(self.operations) - 1

    def _note_same(self, key: int | None, other: int | None) -> None:
        """Notes that a piece of memory holds what another one holds."""
        if key is None or other is None:
            return
        self._good.discard(key)
        everything: list[dict[int, Any]] = [self._named, self._producers, self._tainted]
        for known in everything:
            if other in known:
                known[key] = known[other]
            else:
                known.pop(key, None)
        self.examples.note_same(key, other)

    def _unseen(self, operands: list[Tensor], number: int) -> list[_Bad]:
        """Returns bad operands in which nobody wrote anything, or something other than torch."""
        operation, found = self.operations[number], []
        for one in [] if operation.writes else operands:  # what is written over is gone
            key, state = memory_of(one), state_of(one)
            if key is None or key in self._unread or state is State.FINITE:
                continue
            made = self._producers.get(key)
            if made is not None and self.operations[made].name in _EMPTY:
                self.roots.append(self._root_of(made, one, None, "", None))
                self._tainted[key] = roots = frozenset({len(self.roots) - 1})
            else:
                roots = self._from_outside(key, one, number, operation.place)
            found.append(_Bad(one, roots, state is State.NAN))
        return found

    def _look(
        self, func: Any, number: int, result: Tensor, operands: list[Tensor], bad: list[_Bad]
    ) -> None:
        key = memory_of(result)
        # The roots of a view are those of what it is a view of.
        if key is None or self.operations[number].views:
            return
        state = state_of(result)
        if state is State.FINITE:
            if not self.operations[number].writes or covers(result):
                self._tainted.pop(key, None)
            return
        bad = bad or self._unseen(operands, number)
        roots = self._roots_at(func, number, result, state is State.NAN, bad)
        before = self._tainted.get(key, NO_ROOTS) if self.operations[number].writes else NO_ROOTS
        self._tainted[key] = roots | (before if not covers(result) else NO_ROOTS)

    def _roots_at(
        self, func: Any, number: int, result: Tensor, nan: bool, bad: list[_Bad]
    ) -> Roots:
        """Returns the roots of a result that is not finite; makes a new one if it began here."""
        if not bad:
            return frozenset({self._new_root(number, result, ())})
        new = self._new_elements(func, result, bad)
        if nan and not any(one.nan for one in bad):
            # Infinite operands made it NaN, or finite ones did, or both in different elements.
            via = NO_ROOTS.union(*(one.roots for one in bad))
            if new is None or not _is_nan_at(result, new):
                return frozenset({self._new_root(number, result, via)})
            here = {self._new_root(number, result, (), new)}
            if _is_nan_at(result, ~new):
                here.add(self._new_root(number, result, via, ~new))
            return frozenset(here)
        chosen = [one for one in bad if one.nan] if nan else bad
        roots = NO_ROOTS.union(*(one.roots for one in chosen))
        if new is not None and bool(new.any()):
            roots |= {self._new_root(number, result, (), new)}
        return roots

    def _new_elements(self, func: Any, result: Tensor, bad: list[_Bad]) -> Tensor | None:
        """Returns which elements of a result are bad though those that it is made of are not."""
        if torch.Tag.pointwise not in func.tags or result.layout is not torch.strided:
            return None
        new = ~torch.isfinite(result)
        for one in bad:
            mask = one.mask
            if mask is None:
                mask = ~torch.isfinite(one.tensor)
            try:
                new = new & ~mask.to(new.device).expand_as(new)
            except RuntimeError:  # not one element for each of the result
                return None
        return new

    def _new_root(
        self, number: int, result: Tensor, via: Iterable[int], at: Tensor | None = None
    ) -> int:
        root = self._root_of(number, result, None, "", at)
        root.via = frozenset(via)
        self.roots.append(root)
        return len(self.roots) - 1

    def _root_of(
        self, number: int, tensor: Tensor, source: Source | None, name: str, at: Tensor | None
    ) -> Root:
        values = values_of(tensor)
        nan, inf = torch.isnan(values), torch.isinf(values)
        if at is not None:
            nan, inf = nan & at, inf & at
        real = not values.is_complex()
        return Root(
            number=number,
            source=source,
            name=name,
            nans=int(nan.sum()),
            infs=int(inf.sum()),
            negative=real and bool((values[inf] < 0).all()),
            masks=real and can_mask(values),
            size=values.numel(),
            shape=tuple(tensor.shape),
            dtype=dtype_of(tensor),
            examples=self.examples.of(tensor, nan | inf),
        )

    # -- operands ------------------------------------------------------------------------------

    def _bad_operands(
        self, func: Any, operands: list[Tensor], number: int, place: Place
    ) -> list[_Bad]:
        bad = []
        for one in operands:
            key = memory_of(one)
            if key is None or key in self._unread:
                continue
            roots = self._tainted.get(key)
            if roots is None and (key in self._producers or key in self._good):
                continue
            state = state_of(one)
            if state is State.FINITE:
                # Of a view it is not known whether the rest is finite as well.
                if roots is None and covers(one):
                    self._good.add(key)
                    self._kept.append(one)
                continue
            if roots is None:
                roots = self._from_outside(key, one, number, place)
            # What is written to is not there any more when the operation has run.
            mask = ~torch.isfinite(values_of(one)) if func._schema.is_mutable else None
            bad.append(_Bad(one, roots, state is State.NAN, mask))
        return bad

    def _from_outside(self, key: int, tensor: Tensor, number: int, place: Place) -> Roots:
        source, name = self._named.get(key, ("constant", ""))
        if source == "constant":
            name = variable_of(tensor, place.file, place.line)
            self.examples.note_given(tensor)  # targets, most likely
        self.roots.append(self._root_of(number, tensor, source, name, None))
        self.roots[-1].call = self._calls.get(key)
        self._kept.append(tensor)
        roots = self._tainted[key] = frozenset({len(self.roots) - 1})
        return roots

    def _roots_of(self, tensor: Tensor) -> Roots:
        """Returns the roots of a tensor at the end of the forward, or of the backward."""
        if is_finite(tensor):
            return NO_ROOTS
        key = memory_of(tensor)
        if key is None:
            return NO_ROOTS
        roots = self._tainted.get(key)
        if roots is None and key not in self._producers:
            roots = self._from_outside(key, tensor, len(self.operations), Place())
        return roots or NO_ROOTS

    def _details(
        self, func: Any, operands: list[Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Details:
        given = named_arguments(func, args, kwargs)
        names = [name for name, value in given.items() for _ in tensors_in((value,))]
        pairs = list(zip(names, operands, strict=False))
        described = [operand_of(name, one) for name, one in pairs]
        zeros_of = [(one, values_of(one) == 0) for _, one in pairs]
        return Details(
            (*described, *numbers_in(given)),
            zero_examples=tuple(self.examples.of(*zeros) for zeros in zeros_of),
            zero_rows=tuple(self.examples.wholly(*zeros) for zeros in zeros_of),
            origins=tuple(self._named.get(memory_of(one) or 0) for _, one in pairs),
            parents=tuple(self._producers.get(memory_of(one) or 0, -1) for _, one in pairs),
        )

    # -- which forward operation a backward operation belongs to --------------------------------

    def forward_of(self, number: int) -> int | None:
        """Returns the number of the operation whose backward an operation is part of.

        None if it is not known. What a second derivative differentiates is followed to the forward.
        """
        seen: set[int] = set()
        while True:
            operation = self.operations[number]
            if not operation.backward or operation.node is None:
                return number
            if number in seen:
                return None
            seen.add(number)
            found = self._made(*operation.node)
            if found is None or found >= number:
                return None
            number = found

    def _made(self, node: str, sequence: int) -> int | None:
        """Returns the number of the operation that a node of the graph was made for."""
        if sequence >= 2**63:  # AccumulateGrad has none
            return None
        if node.rpartition("::")[2] in ("CopySlices", "AsStridedBackward0"):
            # Made after an operation has written to a view, not before it runs.
            found = bisect_right(self._sequences, sequence) - 1
        else:
            found = bisect_left(self._sequences, sequence + 1)
            # An operation in place may have copies made first, for its backward.
            base = name_of_node(node)
            named = (
                number
                for number in range(found, min(found + 4, len(self.operations)))
                if public_name(self.operations[number].name).rstrip("_") == base
            )
            found = next(named, found)
        return found if 0 <= found < len(self.operations) else None


def _unread(given: Mapping[str, Any]) -> frozenset[int | None]:
    """Returns the running statistics of a batch normalization that takes those of the batch.

    It only updates them. Where the batch was bad, the training's own forward has spoiled them.
    """
    reads = False in (given.get(name) for name in ("training", "train", "update"))
    running = () if reads else (given.get("running_mean"), given.get("running_var"))
    return frozenset(memory_of(one) for one in running if isinstance(one, Tensor))


def _is_of_bytes(operands: Sequence[Tensor]) -> bool:
    """Returns whether one tensor is copied into another byte by byte.

    So the memory of a tensor of any dtype is copied by `copy.deepcopy()` and `share_memory_()`.
    """
    return len(operands) == 2 and all(one.dtype is torch.uint8 and covers(one) for one in operands)


def _is_nan_at(tensor: Tensor, where: Tensor) -> bool:
    return bool((torch.isnan(tensor) & where).any())
