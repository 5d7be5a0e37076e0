"""The forwards of a window: what is needed to run one of its micro-batches again.

Nothing is copied, and nothing of it lives longer than it must. Until its backward has ended, a
forward is held by its own graph (the hooks on its outputs refer to it) and by nothing else here, so
that what is never differentiated goes with its outputs. After that it is held until the step.
"""

from __future__ import annotations

import contextlib
import os
import sys
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial
from itertools import chain, filterfalse
from operator import attrgetter, is_
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from gradwatch.errors import described_error
from gradwatch.hooks.buffers import entries, is_wrapped
from gradwatch.hooks.closures import KeptClosures
from gradwatch.hooks.context import REPLAY, ForwardContext, is_replaying
from gradwatch.hooks.data_parallel import fully_sharded
from gradwatch.hooks.holding import ModelReference
from gradwatch.hooks.scripting import NotScripted, hide_from_scripting
from gradwatch.measure.devices import is_capturing

MOST_KEPT = 256
"""The most micro-batches that are held: a loop may never step, and never zero its gradients."""

A_MAPPING = (
    "A mapping of tensors was given to watch(), so there is no module whose forward could be run "
    "again. Give it the module, or call gradwatch.explain(model, *args, loss=...)."
)
SCRIPTED = (
    "The model is a TorchScript module, whose forwards are not kept. Train it as a Python module "
    "to have it explained."
)
COMPILED_IN_PLACE = (
    "The model was compiled by module.compile(), and no hook runs outside of its compiled code, so "
    "nothing was kept of its forwards. Write model = torch.compile(model) and give the result to "
    "watch()."
)
SHARDED = (
    "The parameters are sharded over ranks (FSDP2): to run a micro-batch again all ranks would "
    "have to do it together, which is not done."
)
NOT_SEEN = (
    "Nothing was kept of the forward of this micro-batch: it called neither the watched model nor "
    "a module in it from outside, or ran in compiled code. Give watch() the object that the loop "
    "calls."
)
FIRST_NOT_SEEN = (
    "Nothing was kept of the forward of this micro-batch: the loop does not call the watched model "
    "itself but modules in it, which was not known before. Later micro-batches are kept."
)
BEFORE_A_STEP = (
    "Nothing is left of the forward of this micro-batch: its graph was used again after a step."
)
DROPPED = f"Only the newest {MOST_KEPT} micro-batches are kept, and this one came before them."
CHANGED = (
    "The loop has put other tensors into a list or a dict that the forward was given, so it cannot "
    "be run again as it was."
)
SEVERAL_TIMES = (
    "The gradient of an output arrived more than once in this micro-batch, as with a gradient "
    "penalty: only the last arrival is run again, and not the backward of a backward."
)
CALLED_OTHERWISE = (
    "The framework may have called the model for something else than its forward, which is "
    "therefore not run again by itself."
)
MODULE_GONE = "The program has dropped the module whose forward would have to be run again."
FAILED = "Nothing was kept of the forwards, after an error: {error}"

FOREIGN = tuple(
    f"{folder}{os.sep}" for folder in (Path(torch.__file__).parent, Path(__file__).parents[1])
)
"""Where frames are not those of the user: torch, and gradwatch."""

_TENSORS = {Tensor, nn.Parameter}
_FLAT = {*_TENSORS, type(None), bool, int, float, str}
"""Types of arguments that hold nothing else."""

_NOTHING: tuple[None, tuple[()], Mapping[str, Any], tuple[()], None]
_NOTHING = None, (), MappingProxyType({}), (), None

_version = attrgetter("_version")
_has_graph = attrgetter("requires_grad")


@dataclass(slots=True)
class ForwardCall:
    """One call of a module, with references to what it was given; nothing is copied.

    Attributes:
        module: The outermost module that was called.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        versions: For each tensor among the arguments, in the order of
            ``torch.utils._pytree.tree_leaves((args, kwargs))``, its version counter at the start;
            -1 for an inference tensor, which has none.
        context: Random generators, autocast and grad mode at the start.
        caller: File and line from which the user's code called the module; ``("", 0)`` if unknown.
        gradients: For each output that requires a gradient, in the order of :func:`output_tensors`,
            what has arrived there: an empty list before its backward, one tensor after.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    versions: list[int]
    context: ForwardContext
    caller: tuple[str, int] = ("", 0)
    gradients: list[list[Tensor]] = field(default_factory=list)


class _Forward:
    """A forward whose graph may be alive; the hooks on its outputs hold it.

    Attributes:
        module: The module, weakly: the loop may keep an output longer than the model. None once the
            forward has been let go.
        tensors: The tensors among the arguments, in their order.
        gradients: For each output that requires a gradient what has arrived since the last look.
        uses: The number of backwards for which it is held.
        serial: Its place in the order of all forwards.
    """

    # Without __init__(), which would be one more Python call in every forward.
    __slots__ = (
        *("__weakref__", "args", "caller", "context", "gradients", "kwargs", "module"),
        *("serial", "tensors", "uses", "versions"),
    )
    module: weakref.ref[nn.Module] | None
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    tensors: Sequence[Tensor]
    versions: list[int]
    context: ForwardContext | None
    caller: tuple[str, int]
    gradients: list[list[Tensor | None]]
    uses: int
    serial: int

    def let_go(self) -> None:
        """Drops what it refers to, though the graph may live on: the loop still has the output."""
        self.module, self.args, self.kwargs, self.tensors, self.context = _NOTHING


_WITHOUT_NONE: Callable[[list[Tensor | None]], Iterator[Tensor]] = partial(
    filterfalse, partial(is_, None)
)


def _detached(gradients: list[list[Tensor]]) -> list[list[Tensor]]:
    return [[one.detach() for one in arrived] for arrived in gradients]


_Differentiated = tuple[_Forward, list[list[Tensor]]]
"""A forward with the gradients of one backward."""


class Measuring(Protocol):
    """Something of gradwatch that calls the model at times."""

    busy: bool
    """Whether it does so now."""


class KeptForwards:
    """The forwards of the micro-batches that no step has used yet.

    It keeps what they were given alive, but no module.

    Attributes:
        measuring: Nothing is kept while it is busy; None for nobody.
        alive: The forwards of which the graph is alive, also those that were let go after a step.
        serial: The number of forwards so far.
        outer: The hooked module that is running, of which modules inside may be hooked too.
        nested: How often it has called itself.
        running: What is kept of its forward.
        by_number: What is held of each backward, by its number.
        closures: The closures of the backwards, where they are known.
        of_framework: Whether an adapter says what can be run again: else it is tried with what the
            loop itself does.
    """

    def __init__(self, model: ModelReference) -> None:
        """Registers no hook yet."""
        self._model = model
        self._never = A_MAPPING if model.module() is None else ""
        self.measuring: Measuring | None = None
        self._handles: list[RemovableHandle] = []
        self.alive: set[weakref.ref[_Forward]] = set()
        self.by_number: dict[int, list[_Differentiated]] = {}
        self.closures = KeptClosures()
        self.of_framework = False
        self.awaited: Collection[int] = ()
        self.on_forward: Callable[[], None] | None = None
        self._reasons: dict[int, str] = {}
        self._looked_inside = False
        self.serial = 0
        self.outer: weakref.ref[nn.Module] | None = None
        self.nested = 0
        self.running: _Forward | None = None

    def attach(self, measuring: Measuring | None = None) -> None:
        """Registers the hooks, once; forwards are not kept while ``measuring`` is busy."""
        self.measuring = measuring
        model = self._model.module()
        if model is None or self._handles:
            return
        if next(fully_sharded(model), None) is not None:
            self._never = SHARDED
            return
        if isinstance(model, nn.ModuleList | nn.ModuleDict):  # cannot be called
            self._looked_inside = True
            self._hook(list(entries(model)))
        else:
            self._hook([model])

    def stop(self) -> None:
        """Removes the hooks; safe to call again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def detach(self) -> None:
        """Removes the hooks, and drops everything; safe to call again."""
        self.stop()
        self.let_go()

    def let_go(self) -> None:
        """Drops everything that is kept, as the model is gone or nobody needs it."""
        self.closures.end()
        self.awaited = ()
        self.keep_only(())
        for reference in list(self.alive):
            one = reference()
            if one is not None and one.module is not None:
                one.let_go()
        self.alive.clear()
        self.outer = self.running = None

    # -- what the steps ask for --------------------------------------------------------------------

    def note_backward(self, number: int) -> None:
        """Notes that a backward has ended: the forwards whose gradients have arrived are its own.

        Args:
            number: :attr:`gradwatch.hooks.backward.Backward.number`.
        """
        self.outer, self.nested = None, 0  # a KeyboardInterrupt may have ended a forward
        found: list[_Differentiated] = []
        # Copied, as the collector may remove one meanwhile.
        for reference in list(self.alive):
            one = reference()
            if one is None or not any(one.gradients):
                continue
            # None arrives where DDP looks for unused parameters, at outputs that the loss leaves
            # out. Without a function or loop of Python's own, which cost each forward a call.
            gradients = list(map(list, map(_WITHOUT_NONE, one.gradients)))
            # Cleared, as a graph of the gradient (create_graph=True) would lead back to here.
            deque(map(list.clear, one.gradients), 0)
            if not any(gradients):
                continue
            if any(map(_has_graph, chain.from_iterable(gradients))):  # all of it would be held
                gradients = _detached(gradients)
            if one.module is None:
                self._reasons[number] = BEFORE_A_STEP
                continue
            one.uses += 1
            found.append((one, gradients))
        if len(found) > 1:
            found.sort(key=_place)
        if found:
            self.by_number.setdefault(number, []).extend(found)
        elif number not in self.by_number and self._look_inside():
            self._reasons[number] = FIRST_NOT_SEEN
        self.closures.note_backward(number, self.by_number)
        if len(self.by_number) > MOST_KEPT:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        oldest, *others = self.by_number
        self.keep_only(others)
        self._reasons[oldest] = DROPPED

    def note_whole(
        self, replay: Callable[..., Tensor] | None, args: tuple[Any, ...], divisor: float, why: str
    ) -> None:
        """Notes what an adapter says of the micro-batch that is about to begin.

        See :meth:`gradwatch.Watcher.note_micro_batch`.
        """
        self.of_framework = True
        if why:
            self.closures.refuse(why)
            return
        try:
            if replay is None:
                self.closures.end()
                self._look_inside()
                return
            # Some frameworks call a wrapper for another function than the forward of the model.
            model = self._model.module()
            wrapped = model is None or is_wrapped(model)
        except Exception as error:
            self.fail(error)
            return
        kept = self.closures.begin(replay, *args, scaled=True, alone=wrapped)
        if kept is not None:
            kept.divisor = divisor

    def keep_only(self, numbers: Collection[int]) -> None:
        """Drops the forwards of all other backwards than these."""
        for number in list(self.by_number):
            if number in numbers or number in self.awaited:
                continue
            if self.closures.by_number:
                self.closures.drop(number)
            for one, _ in self.by_number.pop(number):
                one.uses -= 1
                if one.uses == 0:  # let_go() without its frame, as this runs in every step
                    one.module, one.args, one.kwargs, one.tensors, one.context = _NOTHING
        if self._reasons:
            kept = {*numbers, *self.awaited}
            self._reasons = {one: why for one, why in self._reasons.items() if one in kept}

    def calls_of(self, number: int) -> tuple[list[ForwardCall], list[str]]:
        """Returns the forwards of a backward, in their order, and sentences about them.

        Returns:
            The calls; empty if they cannot be run again, which the sentences then give the reason
            of.
        """
        whole = self.closures.by_number.get(number)
        if isinstance(whole, str):
            return [], [whole]
        if whole is not None and whole.alone:
            return [], [CALLED_OTHERWISE]
        if not self.by_number.get(number):
            return [], [self._never or self._reasons.get(number, NOT_SEEN)]
        calls, notes = [], [self._reasons[number]] if number in self._reasons else []
        for one, gradients in self.by_number[number]:
            now = tensors_given(one.args, one.kwargs)
            if one.module is None or one.context is None or not _same(now, one.tensors):
                return [], [CHANGED]
            module = one.module()
            if module is None:
                return [], [MODULE_GONE]
            if any(len(arrived) > 1 for arrived in gradients):
                notes = [*notes, SEVERAL_TIMES]
            last = [arrived[-1:] for arrived in gradients]
            given = one.args, one.kwargs, one.versions
            calls.append(ForwardCall(module, *given, one.context, one.caller, last))
        return calls, notes

    # -- hooks on the model ------------------------------------------------------------------------

    def _hook(self, modules: Sequence[nn.Module]) -> None:
        hide_from_scripting()
        for module in modules:
            if isinstance(module, torch.jit.ScriptModule):
                self._never = SCRIPTED
            elif module._compiled_call_impl is not None:  # the hooks would be compiled with it
                self._never = COMPILED_IN_PLACE
            else:
                self._handles += (
                    # First, so that it sees the arguments as the loop has given them.
                    module.register_forward_pre_hook(_Before(self), prepend=True, with_kwargs=True),
                    module.register_forward_hook(_After(self), with_kwargs=True, always_call=True),
                )

    def _look_inside(self) -> bool:
        """Hooks the modules in the model, as the loop does not call the model itself.

        Returns whether it has just done so.
        """
        model = self._model.module()
        if model is not None and model._compiled_call_impl is not None:
            self._never = COMPILED_IN_PLACE
        known = self._looked_inside or self.serial > 0  # the loop calls the model, at other times
        if known or model is None or self._never or is_wrapped(model):
            return False
        self._looked_inside = True
        self._hook(list(entries(model)))
        return True

    def fail(self, error: Exception) -> None:
        """Gives up after an error: the training goes on, and a bad step says why."""
        self._never = FAILED.format(error=described_error(error))
        self.detach()


class _Hook(NotScripted):
    """A hook on a module; a copy of the module gets one that does nothing."""

    def __init__(self, kept: KeptForwards) -> None:
        self._kept = kept

    def __reduce__(self) -> tuple[Any, ...]:
        # Takes any arguments and returns None. No gradwatch is needed where a pickled model is
        # loaded.
        return getattr, (contextlib.nullcontext(), "__exit__")


class _Before(_Hook):
    """Keeps what a forward is given, and the state around it."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # In a compiled model this is a constant: nothing of the hook is left in its graph.
        if torch.compiler.is_compiling():
            return
        kept = self._kept
        if kept.outer is not None:
            kept.nested += module is kept.outer()
            return
        busy = kept.measuring is not None and kept.measuring.busy
        if busy or not torch.is_grad_enabled() or (REPLAY.under_way and is_replaying()):
            return
        if kept.on_forward is not None:
            kept.on_forward()
        try:
            one = _Forward()
            leaves = [*args, *kwargs.values()]
            if _TENSORS.issuperset(map(type, leaves)):  # without a Python call, as most often
                one.tensors = leaves
            else:
                one.tensors = tensors_given(args, kwargs)
            first = one.tensors[0] if one.tensors else None
            if first is not None and not first.is_cpu and is_capturing(first.device):
                return  # the random state cannot be asked for, and nothing of it will be replayed
            try:
                one.versions = list(map(_version, one.tensors))
            except RuntimeError:
                one.versions = list(map(_version_or_none, one.tensors))
            one.module, one.args, one.kwargs, one.uses = weakref.ref(module), args, kwargs, 0
            # Not the frame itself, which would keep all of its variables alive.
            frame = sys._getframe(1)
            while frame.f_code.co_filename.startswith(FOREIGN) and frame.f_back is not None:
                frame = frame.f_back
            one.caller = frame.f_code.co_filename, frame.f_lineno
            one.context = ForwardContext.now()
            kept.outer, kept.running = one.module, one
        except Exception as error:
            kept.fail(error)


class _After(_Hook):
    """Has the gradients noted that will arrive at the outputs of a forward."""

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        # Compiled, this is the same constant as in the hook before: none is running.
        kept = self._kept
        if kept.outer is None or module is not kept.outer():
            return
        if kept.nested:  # it has called itself
            kept.nested -= 1
            return
        one, kept.outer, kept.running = kept.running, None, None
        if one is None or output is None:  # the forward has raised
            return
        try:
            outputs = [output] if isinstance(output, Tensor) else output_tensors(output)
            one.gradients = []
            seen: set[int] = set()
            for tensor in outputs:
                if not tensor.requires_grad:
                    continue
                arrived: list[Tensor | None] = []
                one.gradients.append(arrived)
                # A hook on a leaf, such as a parameter that is returned as it is, would stay; and a
                # tensor that is returned twice has one gradient.
                if tensor.is_leaf or id(tensor) in seen:
                    continue
                seen.add(id(tensor))
                # A C function, so that no Python runs in the backward.
                hook = partial(arrived.append)
                hook.forward = one  # type: ignore[attr-defined]
                tensor.register_hook(hook)  # type: ignore[no-untyped-call]
            kept.serial += 1
            one.serial = kept.serial
            if one.gradients:
                kept.alive.add(weakref.ref(one, kept.alive.discard))
        except Exception as error:
            kept.fail(error)


def tensors_given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Lists the tensors among arguments, in the order of ``tree_leaves``."""
    leaves: list[Any] = [*args, *kwargs.values()]
    if not _FLAT.issuperset(map(type, leaves)):
        leaves = tree_leaves((args, kwargs))
    return [one for one in leaves if isinstance(one, Tensor)]


def output_tensors(output: Any) -> list[Tensor]:
    """Lists the tensors in what a forward has returned, also in objects that torch does not know.

    Of such an object these are its items, if it is a mapping, or else its attributes.
    """
    found: list[Tensor] = []
    for leaf in tree_leaves(output):
        if not isinstance(leaf, Tensor):
            leaves = tree_leaves(_inside(leaf))
            found += [one for one in leaves if isinstance(one, Tensor)]
        else:
            found.append(leaf)
    return found


def _inside(value: object) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    if isinstance(value, (nn.Module, type)) or callable(value):
        return []
    if is_dataclass(value):
        return [getattr(value, one.name, None) for one in fields(value)]
    return list(getattr(value, "__dict__", {}).values())


def _version_or_none(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _place(pair: _Differentiated) -> int:
    return pair[0].serial


def _same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return list(map(id, some)) == list(map(id, others))
