"""The state around a forward: random generators, autocast and grad mode."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class ForwardContext:
    """Random generators, autocast and grad mode at one moment, to run a forward again in."""

    @classmethod
    def now(cls) -> ForwardContext:
        """Notes the present state; copies nothing from a device, and never waits."""
        raise NotImplementedError

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Sets that state for a block, and sets back what was there before, also after an error."""
        raise NotImplementedError
        yield
