"""Calls: says when an Accelerator has run a backward, and when it is about to end.

Accelerate has no callbacks, so two public methods of the one object are wrapped. Both do what they
did, and whatever fails here never reaches the loop.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from gradwatch.adapters import warn_safely

if TYPE_CHECKING:
    from accelerate import Accelerator


class Listener(Protocol):
    """Is told what an accelerator does."""

    def before_end(self) -> None:
        """Called before ``end_training()`` finishes the trackers."""

    def after_backward(self, loss: Tensor, divisor: float | None) -> None:
        """Called after ``backward()``, with what ``Watcher.note_loss`` takes."""


class Calls:
    """The listeners of one accelerator, of which it keeps none alive."""

    def __init__(self, accelerator: Accelerator) -> None:
        """Wraps the two methods, until nobody listens."""
        self._listeners: weakref.WeakSet[Listener] = weakref.WeakSet()
        self._accelerator = weakref.ref(accelerator)
        self._before: dict[str, Any] = {}
        self._ours: dict[str, Any] = {}
        self._wrap("end_training", before=self._ends)
        self._wrap("backward", after=self._has_run)

    @classmethod
    def of(cls, accelerator: Accelerator) -> Calls:
        """Returns those of an accelerator, made if need be."""
        known = getattr(vars(accelerator).get("end_training"), "calls", None)
        return known if isinstance(known, cls) else cls(accelerator)

    def add(self, listener: Listener) -> int:
        """Tells a listener from now on, as long as it is there; returns how many others are."""
        self._listeners.add(listener)
        return len(self._listeners) - 1

    def discard(self, listener: Listener) -> None:
        """Tells a listener no more; the last one leaves the accelerator as it was."""
        self._listeners.discard(listener)
        accelerator = self._accelerator()
        if self._listeners or accelerator is None:
            return
        for name, ours in self._ours.items():
            if vars(accelerator).get(name) is not ours:
                continue  # somebody has wrapped ours since; it only passes on now
            delattr(accelerator, name)
            if name in self._before:
                setattr(accelerator, name, self._before[name])

    def _wrap(
        self,
        name: str,
        before: Callable[..., None] | None = None,
        after: Callable[..., None] | None = None,
    ) -> None:
        """Puts a function in the place of a method of this one object."""
        accelerator = self._accelerator()
        if name in vars(accelerator):  # somebody else has replaced it
            self._before[name] = vars(accelerator)[name]
        method = getattr(accelerator, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            _call_safely(before, args, kwargs)
            result = method(*args, **kwargs)
            _call_safely(after, args, kwargs)
            return result

        call.__name__, call.__doc__ = name, method.__doc__
        call.calls = self  # type: ignore[attr-defined]  # by which the next sink finds it
        self._ours[name] = call
        setattr(accelerator, name, call)

    def _ends(self) -> None:
        for one in tuple(self._listeners):
            one.before_end()

    def _has_run(self, loss: Any, *args: Any, **kwargs: Any) -> None:
        accelerator = self._accelerator()
        if accelerator is None or not isinstance(loss, Tensor) or loss.numel() != 1:
            return
        # accelerate divides by this number itself. Where it is 1, the loop may have divided.
        divisor = 1.0 if accelerator.gradient_accumulation_steps > 1 else None
        value = loss.detach().reshape(())
        if accelerator.scaler is not None:
            value = accelerator.scaler.scale(value)
        for one in tuple(self._listeners):
            one.after_backward(value, divisor)


def _call_safely(
    function: Callable[..., None] | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    try:
        if function is not None:
            function(*args, **kwargs)
    except Exception as error:
        warn_safely(f"gradwatch: AcceleratorSink goes on without {error!r}.")
