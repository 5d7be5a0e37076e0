"""ModelBuffers: puts buffers back that a skipped step's forwards have changed, or tells of NaN.

A forward changes buffers before anybody knows what its gradients will be: BatchNorm's running
statistics, the codebook of a vector quantizer, the vectors of a spectral norm. So where steps may
be skipped, the buffers are copied when a window's first forward begins, in one batched copy.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gradwatch.hooks.context import REPLAY, is_replaying
from gradwatch.hooks.holding import ModelReference
from gradwatch.hooks.scripting import NotScripted, hide_from_scripting
from gradwatch.hooks.snapshot import is_looked_at
from gradwatch.measure.deferred import Deferred, Transfer
from gradwatch.measure.devices import sent
from gradwatch.measure.parameters import local_part, named_modules, wraps

MOST_BYTES = 64 * 2**20
"""The most that is copied in all; the largest buffers are left out."""

SMALL_BYTES = 2**20
"""A buffer up to this size is copied in every window, a larger one only if it is seen to change."""

_CONTAINERS = (nn.ModuleList, nn.ModuleDict)

Slot = tuple[Callable[[], Any], str, str]
"""Where a buffer is: a weak reference to its module, its name there, and its name in the model."""


@dataclass(slots=True)
class _Copies:
    """Copies of the buffers of one device and dtype, in one piece of memory."""

    tensors: list[Tensor]
    flat: Tensor
    parts: list[Tensor]
    chosen: tuple[Tensor, list[Tensor]] | None = None

    @classmethod
    def of(cls, tensors: list[Tensor]) -> _Copies:
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        return cls(tensors, flat, _parts(flat, tensors))

    def take(self) -> None:
        torch._foreach_copy_(self.parts, self.tensors)

    def put_back(self) -> None:
        torch._foreach_copy_(self.tensors, self.parts)

    def put_back_where(self, flag: Tensor) -> None:
        if self.chosen is None:
            flat = torch.empty_like(self.flat)
            self.chosen = flat, _parts(flat, self.tensors)
        flat, parts = self.chosen
        torch._foreach_copy_(parts, self.tensors)
        # Not with arithmetic: NaN times 0 is NaN.
        torch.where(flag.to(flat.device), self.flat, flat, out=flat)
        torch._foreach_copy_(self.tensors, parts)


class BufferLook:
    """One look at the buffers, whose answers may still be on their devices."""

    def __init__(self, answers: Sequence[tuple[str, Tensor]]) -> None:
        """Starts to copy for each buffer, by name, whether it is poisoned: a bool tensor ``[]``."""
        self._answers = [(name, Deferred(answer.float())) for name, answer in answers]
        awaited = [answer for _, answer in self._answers if not answer.at_hand]
        self._transfer = Transfer(awaited) if awaited else None

    def arrived(self) -> bool:
        """Returns whether the answers can be read without waiting."""
        return self._transfer is None or self._transfer.arrived()

    def poisoned(self) -> list[str]:
        """Names the buffers that hold a NaN or an Inf; waits for what has not arrived."""
        if self._transfer is not None:
            self._transfer.wait()
        return [name for name, answer in self._answers if answer.value()]


class ModelBuffers:
    """The buffers of a model, as they were before the window under way.

    What is told after a step that held a NaN needs no copy: :meth:`look` looks only then.
    No module is kept alive, and a buffer only while its window is under way.

    Attributes:
        restores: Whether buffers are copied, and put back when a step is skipped.
    """

    def __init__(self, model: ModelReference) -> None:
        """Reads nothing yet."""
        self.restores = self._wanted = False
        self._model = model
        self._handles: list[RemovableHandle] = []
        self._slots: list[Slot] = []
        self._held: list[Tensor | None] = []
        self._always: list[_Copies] = []
        self._seldom: list[_Copies] = []
        self._large: list[Tensor] = []  # those that are not copied in every window
        self._versions: list[int] = []  # theirs
        self._part_of: dict[int, Tensor] = {}  # copies by id of a tensor that _held keeps alive
        self._moving: set[int] = set()  # ids of large buffers that were seen to change
        self._takes = 0
        self._looks = 0
        self._open = self._called = False
        # Whether every window so far has begun with a call of the hooks.
        self._trusts_hooks = True
        self._hooked_inside = False
        # Of each buffer whether all its elements were finite; on its device, as nobody asks yet.
        self._finite_then: dict[int, tuple[weakref.ref[Tensor], Tensor]] = {}

    def attach(
        self,
        restores: bool,
        shield: AbstractContextManager[None],
        left_out: Callable[[], bool],
        busy: Callable[[], bool],
    ) -> None:
        """Begins to follow the buffers.

        Args:
            restores: Whether steps may be skipped, so that buffers must be put back.
            shield: Context in which the hook on the model runs.
            left_out: Returns, once, whether a scaler has left out the step since the last forward.
            busy: Returns whether gradwatch itself calls the model.
        """
        model = self._model.module()
        if model is None:
            return
        self._slots = list(_slots(model))
        with torch.no_grad():
            self._finite_then = {
                id(one): (weakref.ref(one), torch.isfinite(local_part(one)).all())
                for _, one in self._floating()
            }
            self._wanted = restores
            self._shield, self._left_out, self._busy = shield, left_out, busy
            self._start()

    def _start(self) -> None:
        model = self._model.module()
        self.restores = self._wanted and bool(self._slots) and model is not None
        if self.restores and model is not None:
            self._plan()
            self._hook([model])

    def look_again(self) -> None:
        """Begins to copy if the model has buffers by now, and had none before."""
        if self._wanted and not self.restores and (model := self._model.module()) is not None:
            self._slots = list(_slots(model))
            self._start()

    def detach(self) -> None:
        """Removes the hooks, and drops the copies; safe to call again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.let_go()

    def let_go(self) -> None:
        """Drops the buffers and their copies, as the model is gone or nobody needs them."""
        self._always, self._seldom, self._held, self._large = [], [], [], []
        self._part_of, self.restores, self._wanted = {}, False, False

    # -- the copy before a window ------------------------------------------------------------------

    def begin_window(self) -> None:
        """Called before a forward that records a graph; copies if it is the first of a window."""
        if not self.restores or self._busy():
            return
        left_out = self._left_out()
        if self._open and not left_out:
            return
        with self._shield:
            if left_out:
                self.put_back()
            self._take()
        self._open = self._called = True

    def end_step(self, shared: bool) -> None:
        """Called at the end of a step, after :meth:`put_back` if it was skipped.

        Args:
            shared: Whether another optimizer still has a window open, which may be of the same
                batch.
        """
        called, self._called, self._open = self._called, False, False
        self._trusts_hooks = self._trusts_hooks and called
        if self._trusts_hooks:
            return
        # The loop does not call the model itself, but modules in it, or compiled code, in which a
        # hook does nothing. Then the end of a step is the last moment before the next forward.
        if not self._hooked_inside and (model := self._model.module()) is not None:
            self._hooked_inside = True
            if not is_wrapped(model):
                self._hook(list(entries(model)))
                self._trusts_hooks = True
        if not shared:
            self._take()

    def _take(self) -> None:
        self._takes += 1
        # A buffer may have been registered since, or be written to past its version counter.
        if is_looked_at(self._takes):
            model = self._model.module()
            self._slots = list(_slots(model)) if model is not None else []
            self._plan()
            return
        held, versions = self._held, self._versions
        if list(map(id, self._current())) != list(map(id, held)):
            self._plan()
        elif versions != list(map(_version, self._large)):
            moved = zip(self._large, versions, strict=True)
            self._moving.update(id(one) for one, then in moved if one._version != then)
            self._plan()
        else:
            for copies in self._always:
                copies.take()

    def _plan(self) -> None:
        """Decides anew what is copied in every window and what seldom, and copies both."""
        self._held = list(self._current())
        unique = {id(one): one for one in self._held if _can_be_copied(one)}
        chosen, total = [], 0
        for one in sorted(unique.values(), key=_bytes):
            total += _bytes(one)
            if total <= MOST_BYTES:
                chosen.append(one)
        always = [one for one in chosen if _bytes(one) <= SMALL_BYTES or id(one) in self._moving]
        known = set(map(id, always))
        self._always = _copies(always)
        self._seldom = _copies([one for one in chosen if id(one) not in known])
        small = {id(tensor) for copies in self._always for tensor in copies.tensors}
        self._large = [one for one in self._held if _has_version(one) and id(one) not in small]
        self._versions = list(map(_version, self._large))
        self._part_of = {
            id(tensor): part
            for copies in (*self._always, *self._seldom)
            for tensor, part in zip(copies.tensors, copies.parts, strict=True)
        }

    def _current(self) -> list[Tensor | None]:
        return [
            None if (module := one()) is None else module._buffers.get(key)
            for one, key, _ in self._slots
        ]

    # -- a step that is skipped --------------------------------------------------------------------

    def put_back(self) -> list[str]:
        """Restores the buffers as they were before the window.

        Returns:
            The names of those that have changed and are not restored, as they were not copied.
        """
        changed = self._changed_without_copy()
        for copies in (*self._always, *self._seldom):
            copies.put_back()
        for (one, key, _), tensor, now in zip(
            self._slots, self._held, self._current(), strict=True
        ):
            module = one()
            if now is not tensor and module is not None and key in module._buffers:
                module._buffers[key] = tensor
        self._versions = list(map(_version, self._large))
        return changed

    def put_back_where(self, flag: Tensor) -> None:
        """Does so on the device, if a flag there is set; the host does not know, and does not wait.

        Args:
            flag: Tensor ``[]``: above 0 if the step is skipped.
        """
        flag = flag > 0
        for copies in (*self._always, *self._seldom):
            copies.put_back_where(flag)
        for then, now in zip(self._held, self._current(), strict=True):
            part = self._part_of.get(id(then))
            if now is then or part is None or not _can_be_copied(now) or now.shape != part.shape:
                continue
            now.copy_(torch.where(flag.to(now.device), part.to(now.dtype), now))

    def before_window(self) -> dict[int, Tensor]:
        """Returns what buffers held before the window under way; without those not copied.

        Returns:
            The copies, by the ``id()`` of each buffer as it is now.
        """
        if not self.restores:
            return {}
        pairs = zip(self._held, self._current(), strict=True)
        copies = [(now, self._part_of.get(id(then))) for then, now in pairs]
        return {id(now): part for now, part in copies if now is not None and part is not None}

    def _changed_without_copy(self) -> list[str]:
        moved = {
            id(one)
            for one, version in zip(self._large, self._versions, strict=True)
            if one._version != version and id(one) not in self._part_of
        }
        pairs = zip(self._slots, self._held, strict=True)
        return [name for (_, _, name), one in pairs if id(one) in moved]

    # -- NaN in buffers ----------------------------------------------------------------------------

    def look(self) -> BufferLook | None:
        """Looks for buffers that hold a NaN or an Inf by now; called after a step that held one.

        One that was so from the start, as a mask with minus infinity is, is not named. Nothing
        waits for a device until the look is read. None if nobody looks, as this is called often.
        """
        self._looks += 1
        model = self._model.module()
        if model is None or not is_looked_at(self._looks):
            return None
        self._slots = self._slots or list(_slots(model))
        with torch.no_grad():
            return BufferLook([(name, self._is_poisoned(one)) for name, one in self._floating()])

    def _is_poisoned(self, tensor: Tensor) -> Tensor:
        values = local_part(tensor)
        reference, finite = self._finite_then.get(id(tensor), (None, None))
        if finite is None or reference is None or reference() is not tensor:
            # A mask that was made anew may hold an Inf on purpose, but no NaN.
            return torch.isnan(values).any()
        return sent(finite, values.device) & ~torch.isfinite(values).all()

    def _floating(self) -> Iterator[tuple[str, Tensor]]:
        seen: set[int] = set()
        for (_, _, name), one in zip(self._slots, self._current(), strict=True):
            if one is None or id(one) in seen or one.is_meta or one.layout is not torch.strided:
                continue
            if one.is_floating_point() or one.is_complex():
                seen.add(id(one))
                yield name, one

    # -- hooks on the model ------------------------------------------------------------------------

    def _hook(self, modules: Sequence[nn.Module]) -> None:
        hide_from_scripting()
        for module in modules:
            # A hook would be compiled into such a module.
            compiled = module._compiled_call_impl is not None
            if not compiled and not isinstance(module, torch.jit.ScriptModule):
                hook = _BeforeForward(self)
                self._handles.append(module.register_forward_pre_hook(hook))


class _BeforeForward(NotScripted):
    """The hook on a module; a copy of the module gets one that does nothing."""

    def __init__(self, buffers: ModelBuffers) -> None:
        self._buffers = buffers

    def __call__(self, module: nn.Module, args: Any) -> None:
        # In a compiled model this is a constant: nothing of the hook is left in its graph.
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        if REPLAY.under_way and is_replaying():
            return
        self._buffers.begin_window()

    def __reduce__(self) -> tuple[Any, ...]:
        # Called with the module and its arguments, this returns the arguments. No gradwatch is
        # needed where a pickled model is loaded.
        return getattr, ({}, "get")


class _Scripted:
    """A weak reference to a scripted module, which has no dict of its buffers: it stands for it."""

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)

    def __call__(self) -> _Scripted | None:
        return None if self._module() is None else self

    @property
    def _buffers(self) -> _Scripted:
        return self

    def __contains__(self, key: str) -> bool:
        return hasattr(self._module(), key)

    def __setitem__(self, key: str, tensor: Tensor) -> None:
        setattr(self._module(), key, tensor)

    def get(self, key: str) -> Any:
        return getattr(self._module(), key, None)


_version = attrgetter("_version")


def _slots(model: nn.Module) -> Iterator[Slot]:
    seen: set[int] = set()  # a module that is used in several places is listed once
    for path, _, module in named_modules(model):
        if id(module) in seen:
            continue
        seen.add(id(module))
        prefix = f"{path}." if path else ""
        plain = isinstance(module._buffers, dict)
        reference: Callable[[], Any] = weakref.ref(module) if plain else _Scripted(module)
        for key in list(module._buffers.keys()):
            yield reference, key, f"{prefix}{key}"


def is_wrapped(model: nn.Module) -> bool:
    """Returns whether a model is a wrapper of torch's around the user's module."""
    return wraps(model, "module") or wraps(model, "_orig_mod")


def entries(model: nn.Module) -> Iterator[nn.Module]:
    """Lists the modules that a loop may call where it does not call the model: those in it."""
    for module in model.children():
        if isinstance(module, _CONTAINERS):
            yield from entries(module)
        else:
            yield module


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _has_version(tensor: Tensor | None) -> TypeGuard[Tensor]:
    return tensor is not None and not tensor.is_inference()


def _is_plain(tensor: Tensor) -> bool:
    """Returns whether a tensor is no wrapper around others, as sharded and quantized ones are."""
    if type(tensor) in (Tensor, nn.Parameter):
        return True
    # A device that is written in Python has tensors of a class of its own.
    overrides: Any = type(tensor).__torch_function__
    plain = overrides is torch._C._disabled_torch_function_impl
    return plain and not hasattr(tensor, "__tensor_flatten__")


def _can_be_copied(tensor: Tensor | None) -> TypeGuard[Tensor]:
    """Returns whether a buffer can be copied, and the copy be written back in place."""
    if not _has_version(tensor) or not _is_plain(tensor):
        return False
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
        return False
    if tensor.is_conj() or tensor.is_neg():  # a view that batched copies do not write to
        return False
    # Elements of an expanded tensor share their memory, so it cannot be written to.
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return tensor.numel() > 0 and all(stride or length < 2 for length, stride in pairs)


def _copies(tensors: Sequence[Tensor]) -> list[_Copies]:
    """Copies tensors, in one piece for each device and dtype."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    return [_Copies.of(group) for group in groups.values()]


def _parts(flat: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Returns the views of a flat tensor that have the shapes of others."""
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
