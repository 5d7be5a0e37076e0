"""What runs without a collection of garbage in between, such as an import."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collection() -> Iterator[None]:
    """Collects no garbage meanwhile: during an import, or what must not be interrupted.

    Beside torch there are a million objects, and a full collection takes longer than the import of
    all of gradwatch. What an import makes is there to stay, so nothing would be found.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
