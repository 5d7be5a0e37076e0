"""The entry to torch's backward engine, through which every backward of a process goes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias
from weakref import ref

import torch

_ENTRY = "_engine_run_backward"

Roots: TypeAlias = Sequence[Any]
"""What a backward begins at: tensors, or edges of the graph."""


class BeforeBackward:
    """Calls a function before each backward of the process, between ``wait()`` and ``stop()``.

    It runs in the thread that calls the backward; hooks on the tensors of an accelerator do not.

    ``torch.autograd.backward()`` and ``grad()`` both look the entry up in ``torch.autograd``
    (private, torch 2.4 to 2.13). It is wrapped only for as long as somebody waits, so that a
    backward costs nothing more afterwards. A global forward hook would be public, but breaks
    models that are compiled.
    """

    def __init__(self, call: Callable[[Roots], Callable[[], None] | None]) -> None:
        """Does not wait yet.

        Args:
            call: Called with the roots of the backward; it may call :meth:`stop`. What it returns
                is called when the backward has ended, or has raised. Nothing here keeps it alive.
        """
        self.call = call

    def wait(self) -> None:
        """Begins to call; safe to call again."""
        if not any(one() is self for one in _waiting):
            _waiting.append(ref(self))
        _wrap()

    def stop(self) -> None:
        """Stops calling; safe to call again."""
        _waiting[:] = [one for one in _waiting if one() not in (self, None)]
        if not _waiting:
            _unwrap()


# Weakly: a watcher that is dropped while it waits must not have the entry wrapped for ever.
_waiting: list[ref[BeforeBackward]] = []


class _Wrapped:
    """The entry as it was, and what stands there instead.

    Attributes:
        before: What was there; None while nothing is wrapped.
        ours: What was put there.
    """

    before: Callable[..., Any] | None = None
    ours: Callable[..., Any] | None = None


def _wrap() -> None:
    there: Callable[..., Any] | None = getattr(torch.autograd, _ENTRY, None)
    if there is None or there is _Wrapped.ours:
        return  # in another torch what waits is found at its first step
    before = there

    @functools.wraps(before)
    def run_backward(t_outputs: Any, *args: Any, **kwargs: Any) -> Any:
        if is_tracing():
            return before(t_outputs, *args, **kwargs)
        after = _call_all(t_outputs)
        try:
            return before(t_outputs, *args, **kwargs)
        finally:
            _end_all(after)

    _Wrapped.before, _Wrapped.ours = before, run_backward
    setattr(torch.autograd, _ENTRY, run_backward)


def _unwrap() -> None:
    # Somebody else may have wrapped ours since: then it stays, and does nothing.
    if _Wrapped.ours is not None and getattr(torch.autograd, _ENTRY, None) is _Wrapped.ours:
        setattr(torch.autograd, _ENTRY, _Wrapped.before)
        _Wrapped.before = _Wrapped.ours = None


def _call_all(t_outputs: Any) -> list[Callable[[], None]]:
    roots = (t_outputs,) if isinstance(t_outputs, torch.Tensor) else tuple(t_outputs)
    called: list[BeforeBackward] = []
    after: list[Callable[[], None]] = []
    # One of them may have a model watched, which then waits for this very backward.
    while new := [one for here in _waiting[:] if (one := here()) and one not in called]:
        for one in new:
            called.append(one)
            try:
                then = one.call(roots)
            except BaseException:
                _end_all(after)
                raise
            if then is not None:
                after.append(then)
    if not called:
        _waiting.clear()
        _unwrap()
    return after


def _end_all(after: list[Callable[[], None]]) -> None:
    for call in reversed(after):
        call()


def is_tracing() -> bool:
    """Returns whether torch traces the running code with tensors that hold no numbers."""
    # torch.compile() differentiates a graph with torch.autograd.grad(). Nothing may be built then.
    return torch._guards.detect_fake_mode() is not None
