"""Closures: micro-batches that can be run again whole, with the loss that they ended in.

A managed loop, an optimizer's step and an adapter each have a function that computes the loss of a
micro-batch. References to it and to its arguments are held until the step, and nothing else. By the
time of a replay the loop may have gone on to the next batch, so the values that the function's
variables have now are held with it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from types import FunctionType
from typing import Any

from torch import Tensor

from gradwatch.errors import described_error
from gradwatch.hooks.context import ForwardContext
from gradwatch.hooks.draws import Variables, drawn_by, variables_of
from gradwatch.measure.deferred import FloatOrDeferred, resolve

_NO_KWARGS: Mapping[str, Any] = {}
_MOST_ITEMS = 64  # of a container that is looked into: a batch, and not a data set

DRAWS = (
    "The function that computes the loss has an iterator in a variable, which running it again "
    "would move on, so it was not run again whole. Take the batch from the iterator before it."
)
FAILED = "The closure could not be kept, after an error: {error}"
CHANGED_IN_PLACE = (
    "A tensor that the micro-batch was computed from was changed in place after that, so the "
    "replay was given other values than the training."
)


class KeptClosure:
    """A function that computes the loss of one micro-batch.

    Attributes:
        args: What it is called with.
        kwargs: What it is called with by name.
        context: Random generators, autocast and grad mode when it was called.
        weight: Weight of the micro-batch.
        divisor: What weight times loss was divided by before the backward.
        scaled: Whether the loss was multiplied by the loss scale, too, before the backward. A
            closure that calls the backward does so itself.
        alone: Whether nothing else may be run again in its place.
    """

    __slots__ = (
        *("_function", "_tensors", "_variables", "_versions"),
        *("alone", "args", "context", "divisor", "kwargs", "scaled", "weight"),
    )

    def __init__(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        scaled: bool,
        alone: bool,
        kwargs: Mapping[str, Any] = _NO_KWARGS,
    ) -> None:
        """Notes how things are now; copies no tensor."""
        self._function = function
        self._variables = variables_of(function)
        self.args, self.kwargs = args, kwargs
        self.context = ForwardContext.now()
        self.weight: FloatOrDeferred = 1.0
        self.divisor: FloatOrDeferred = 1.0
        self.scaled = scaled
        self.alone = alone
        self._tensors = list(_tensors([*args, *kwargs.values(), *_values(self._variables)]))
        self._versions = [_version(tensor) for tensor in self._tensors]

    def bound(self) -> Callable[[], Any]:
        """Returns a function without arguments whose variables have the values of that time."""
        function = self._function
        if isinstance(function, FunctionType):
            cells, variables = self._variables
            bound = FunctionType(
                function.__code__,
                {**function.__globals__, **variables},
                function.__name__,
                function.__defaults__,
                cells,
            )
            bound.__kwdefaults__ = function.__kwdefaults__
            vars(bound).update(vars(function))  # a signature, for one
            function = bound
        if not (self.args or self.kwargs):
            return function
        return partial(function, *self.args, **self.kwargs)

    def factor(self) -> float:
        """Returns what the loss was multiplied by, apart from a loss scale; waits for a device."""
        return resolve(self.weight) / resolve(self.divisor)

    def notes(self) -> list[str]:
        """Returns sentences: what is not as it was."""
        now = [_version(tensor) for tensor in self._tensors]
        return [CHANGED_IN_PLACE] if now != self._versions else []


class KeptClosures:
    """The closures of the micro-batches that no step has used yet.

    Attributes:
        by_number: By number of a backward its closure, or why there is none.
        losses_given: Whether a managed loop was given a loss, and not a function that returns it.
    """

    def __init__(self) -> None:
        """Holds nothing."""
        self.by_number: dict[int, KeptClosure | str] = {}
        self.losses_given = False
        self._current: KeptClosure | str | None = None

    def begin(
        self,
        function: Callable[..., Any],
        *args: Any,
        kwargs: Mapping[str, Any] = _NO_KWARGS,
        scaled: bool = False,
        alone: bool = False,
    ) -> KeptClosure | None:
        """Notes that a function is about to compute the loss of the next backwards.

        Args:
            function: The function.
            args: What it is called with.
            kwargs: What it is called with by name.
            scaled: See :class:`KeptClosure`.
            alone: See :class:`KeptClosure`.

        Returns:
            What is kept; None after an error, which must not end a training.
        """
        try:
            kept = KeptClosure(function, args, scaled, alone, kwargs)
        except Exception as error:
            self._current = FAILED.format(error=described_error(error))
            return None
        self._current = kept
        return kept

    def refuse(self, reason: str) -> None:
        """Notes that the next backwards cannot be run again at all."""
        self._current = reason

    def end(self) -> None:
        """Notes that the next backward is of something else."""
        self._current = None

    def forget(self, kept: KeptClosure | None) -> None:
        """Drops a closure that will not be run again, as its gradients were looked at."""
        self._current = None
        for number in [number for number, one in self.by_number.items() if one is kept]:
            del self.by_number[number]

    def drop(self, number: int) -> None:
        """Drops what is known of a backward."""
        dropped = self.by_number.pop(number, None)
        # A framework does not say when a micro-batch ends, but it has: its gradients were used.
        if dropped is self._current and isinstance(dropped, KeptClosure):
            self._current = None

    def note_backward(self, number: int, held: dict[int, list[Any]]) -> None:
        """Notes that a backward has ended.

        Args:
            number: Its number.
            held: What else is held of each backward; to be told which to :meth:`drop`.
        """
        if self._current is not None:
            self.by_number[number] = self._current
            held.setdefault(number, [])


def why_not_again(function: Callable[..., Any]) -> str:
    """Returns why a function must not be called once more; empty if it may.

    What takes a batch from an iterator would take that of the next step.
    """
    return DRAWS if next(drawn_by(function), None) else ""


def _values(variables: Variables) -> Iterator[Any]:
    cells, named = variables
    for cell in cells:
        with contextlib.suppress(ValueError):
            yield cell.cell_contents
    yield from named.values()


def _tensors(values: Iterable[Any], depth: int = 0) -> Iterator[Tensor]:
    """Yields the tensors among values, and in the containers among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif depth < 3 and isinstance(value, tuple | list | Mapping):
            inner = value.values() if isinstance(value, Mapping) else value
            if len(value) <= _MOST_ITEMS:
                yield from _tensors(inner, depth + 1)


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
