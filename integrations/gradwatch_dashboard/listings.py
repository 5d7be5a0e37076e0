"""Listings: what TensorBoard holds, asked for once by requests that come together.

The data server takes 45 ms for an answer however small, and a page asks for five things at a time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from gradwatch_dashboard.provider import Listing, Provider

FRESH_SECONDS = 0.5
"""Age up to which a listing still stands: TensorBoard looks at the files once a second at most."""


class Listings:
    """Remembers the newest listings."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """Starts empty.

        Args:
            clock: Seconds that only rise.
        """
        self._clock = clock
        self._lock = threading.Lock()
        self._known: dict[tuple[str, str | None], tuple[float, Listing]] = {}

    def get(self, provider: Provider, run: str | None = None) -> Listing:
        """Lists what there is.

        Args:
            provider: Where to ask.
            run: Only of this run; of all by default.
        """
        whole, key = (provider.experiment, None), (provider.experiment, run)
        with self._lock:
            now = self._clock()
            self._known = {
                k: known for k, known in self._known.items() if now - known[0] <= FRESH_SECONDS
            }
            known = self._known.get(whole) or self._known.get(key)
            if known is None:
                known = self._known[key] = now, provider.listing(run)
            return known[1]
