"""The entry to torch's backward engine, through which every backward of a process goes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

_ENTRY = "_engine_run_backward"


class BeforeBackward:
    """Calls a function before each backward of the process, between ``wait()`` and ``stop()``.

    ``torch.autograd.backward()`` and ``grad()`` both look the entry up in ``torch.autograd``
    (private, torch 2.4 to 2.13). It is wrapped only for as long as somebody waits, so that a
    backward costs nothing more afterwards. A global forward hook would be public, but breaks
    models that are compiled.
    """

    def __init__(self, call: Callable[[], None]) -> None:
        """Does not wait yet; ``call`` may call :meth:`stop`."""
        self._call = call
        self._before: Callable[..., Any] | None = None
        self._ours: Callable[..., Any] | None = None
        self._waits = False

    def wait(self) -> None:
        """Begins to call; safe to call again."""
        self._waits = True
        if self._ours is not None and getattr(torch.autograd, _ENTRY, None) is self._ours:
            return
        before: Callable[..., Any] | None = getattr(torch.autograd, _ENTRY, None)
        if before is None:
            return  # another torch: what waits is found at its first step

        @functools.wraps(before)
        def run_backward(*args: Any, **kwargs: Any) -> Any:
            if self._waits and not is_tracing():
                self._call()
            return before(*args, **kwargs)

        self._before, self._ours = before, run_backward
        setattr(torch.autograd, _ENTRY, run_backward)

    def stop(self) -> None:
        """Stops calling; safe to call again."""
        self._waits = False
        # Somebody else may have wrapped ours since: then it stays, and does nothing.
        if self._ours is not None and getattr(torch.autograd, _ENTRY, None) is self._ours:
            setattr(torch.autograd, _ENTRY, self._before)
            self._ours = self._before = None


def is_tracing() -> bool:
    """Returns whether torch traces the running code with tensors that hold no numbers."""
    # torch.compile() differentiates a graph with torch.autograd.grad(). Nothing may be built then.
    return torch._guards.detect_fake_mode() is not None
