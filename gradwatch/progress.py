"""WindowProgress: how far a managed loop has come in its window, and in a batch that is split."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from gradwatch.errors import AccumulationError

TWICE = (
    "watcher.backward() was called again before the loop over watcher.micro_batches() had gone on "
    "to its next part, so it is not clear which part the loss is of, and what it weighs. Add the "
    "losses of a part up, and call watcher.backward() once for each."
)
LEFT_OUT = (
    "watcher.backward() was called after the loop over watcher.micro_batches() had handed out "
    "parts without a backward, so it is not clear which part the loss is of, and what it weighs. "
    "Call watcher.backward() inside the loop, before the next part is taken: make no list of the "
    "parts, do not read ahead, and give a part that shall not count watcher.backward(loss, "
    "weight=0)."
)
NOT_ALONE = (
    "The loop over watcher.micro_batches() went on after another one had begun inside it, or after "
    "watcher.step(last=True) had ended its window, so that its parts no longer count as one batch. "
    "End one loop before the next begins, and call watcher.step() after it."
)


@dataclass(slots=True)
class Split:
    """A batch that is run in parts; together they count as one.

    Attributes:
        parts: How many there are.
        examples: Examples in all of them.
        current: Examples in the one under way.
        taken: Parts that were handed out since the newest backward.
        done: Parts whose backward is over.
    """

    parts: int
    examples: int
    current: int = 0
    taken: int = 0
    done: int = 0


class WindowProgress:
    """Counts the batches of a window; a batch that is split counts once.

    Attributes:
        units: Batches so far.
        split: The batch that is being split; None where none is.
    """

    def __init__(self) -> None:
        """Starts with an empty window."""
        self.units = 0
        self.split: Split | None = None
        self._left_out: Split | None = None  # a loop that ended before the last backward

    def restart(self) -> None:
        """Counts from the start: nothing is in the window."""
        self.units = 0

    def end(self) -> None:
        """Ends the window: its step was taken."""
        self.units, self.split, self._left_out = 0, None, None

    def forgive(self) -> None:
        """Forgets parts that were handed out without a backward: the loop has gone on."""
        self._left_out = None

    def count(self, restarted: bool) -> None:
        """Counts a backward.

        Args:
            restarted: Whether the loop has thrown away what was in the window before it.
        """
        if restarted:
            self.units = 0
        if self.split is None:
            self.units += 1
            return
        self.split.taken = 0
        self.split.done += 1
        if self.split.done == self.split.parts:
            self.units += 1
            self.split = None

    def is_last(self, wanted: int) -> bool:
        """Tells whether the next backward ends the window.

        Args:
            wanted: Batches that make a window.
        """
        split = self.split
        finishes = split is None or split.done + 1 == split.parts
        return finishes and self.units + 1 >= wanted

    def check_turn(self, weighs: bool) -> None:
        """Refuses a loss of which it is not clear to what part of a batch it belongs.

        Args:
            weighs: Whether the loop gives its weight.

        Raises:
            AccumulationError: If it is not.
        """
        split = self.split
        if split is not None and split.taken == 0:
            raise AccumulationError(TWICE)
        read_ahead = split is not None and split.taken > 1 and not weighs
        if read_ahead or self._left_out is not None:
            raise AccumulationError(LEFT_OUT)

    def parts(self, parts: Sequence[tuple[Any, int]]) -> Iterator[Any]:
        """Hands out the parts of a batch.

        Args:
            parts: Each with its number of examples.

        Raises:
            AccumulationError: If another loop has begun, or the window has ended, in between.
        """
        split = self.split = Split(len(parts), sum(count for _, count in parts))
        try:
            for part, count in parts:
                if self.split is not split:
                    raise AccumulationError(NOT_ALONE)
                split.current = count
                split.taken += 1
                yield part
            if self.split is split:
                self._left_out = split
        finally:
            if self.split is split:  # the loop was left before the last backward
                self.split = None
                self.units += split.done > 0

    def mark(self) -> Callable[[], None]:
        """Returns a function that puts the progress back as it is now, outside of a split batch."""
        units, left_out = self.units, self._left_out

        def put_back() -> None:
            self.units, self._left_out, self.split = units, left_out, None

        return put_back
