"""What a stand-in device was asked to do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager


class Counts:
    """What the host asked of the device inside a `with` block; may be read while it is entered.

    Attributes:
        kinds: The number of calls of each kind, as the device names it: "d2h item", "h2d pageable".
    """

    def __init__(self, read: Callable[[], Mapping[str, int]]) -> None:
        self._read = read
        self._before = Counter(read())
        self._after: Counter[str] | None = None

    @property
    def kinds(self) -> Counter[str]:
        after = self._after if self._after is not None else Counter(self._read())
        return after - self._before

    @property
    def waits(self) -> int:
        """How often the host waited for the device: for a number, a copy, an event or all of it."""
        return self.kinds["waits"]

    @property
    def kernels(self) -> int:
        """How many operations ran on the device; a view is none."""
        return self.kinds["kernels"]

    @property
    def copies(self) -> int:
        """How many copies there were between the host and the device, waited for or not."""
        kinds = self.kinds
        return kinds["h2d"] + kinds["d2h"]

    def stop(self) -> None:
        """Count nothing from here on."""
        self._after = Counter(self._read())


@contextmanager
def counted(read: Callable[[], Mapping[str, int]]) -> Iterator[Counts]:
    """Count inside the block, given what reads all counts of the process."""
    counts = Counts(read)
    try:
        yield counts
    finally:
        counts.stop()
