"""Reads this plugin's data from TensorBoard's data provider; concurrent requests share listings."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tensorboard import errors, plugin_util
from tensorboard.data import provider

from gradwatch_dashboard.untrusted import note, shown
from gradwatch_dashboard.wire import PLUGIN, Tag, is_readable

# The data server takes an int32, and returns nothing for 0; so the largest int32 means all.
ALL_SAMPLES = 2**31 - 1

_UNKNOWN = (
    "The Gradients tab leaves out data of run %s: it is damaged, or of a newer gradwatch. Then "
    "pip install --upgrade gradwatch where TensorBoard runs."
)
_DAMAGED = "The Gradients tab leaves out %s of run %s, which cannot be read: %s"
_UNAVAILABLE = "TensorBoard cannot read its data now: {error}. Its log says more."
_TRANSIENT = frozenset({"UNAVAILABLE", "CANCELLED", "DEADLINE_EXCEEDED", "ABORTED"})


class UnavailableError(errors.PublicError):  # type: ignore[misc]  # TensorBoard has no types
    """The data cannot be read now; a later attempt may succeed. Sent as HTTP 503."""

    http_code = 503


class Version(NamedTuple):
    """Identifies how far a tag has been written; changes whenever it grows.

    Attributes:
        max_step: The largest step of its Events.
        max_wall_time: The latest wall time of its Events, in seconds since 1970; None if it is not
            finite.
    """

    max_step: int | None
    max_wall_time: float | None


class TagSource(NamedTuple):
    """A tag of a run."""

    run: str
    tag: Tag


Listing = dict[str, dict[Tag, Version]]
"""Run to tag to version, for the tags of this plugin that are readable."""


class Provider:
    """TensorBoard's data provider, for the duration of one request.

    Attributes:
        experiment: The experiment ID of the request; empty for local data.
    """

    def __init__(self, data_provider: Any, environ: Any) -> None:
        """Extracts from the WSGI ``environ`` the context that each call has to pass on."""
        self._provider = data_provider
        self._context = plugin_util.context(environ)
        self.experiment: str = plugin_util.experiment_id(environ)

    def listing(self, run: str | None = None) -> Listing:
        """Lists the tags of a run, or of all runs for None.

        Raises:
            UnavailableError: If TensorBoard cannot list its data now.
        """
        wanted = None if run is None else provider.RunTagFilter(runs=[run])
        try:
            found = self._provider.list_tensors(
                self._context,
                experiment_id=self.experiment,
                plugin_name=PLUGIN,
                run_tag_filter=wanted,
            )
        except errors.PublicError:
            raise
        except Exception as error:
            raise UnavailableError(_UNAVAILABLE.format(error=shown(error))) from error
        return {name: ours for name, tags in found.items() if (ours := _readable(name, tags))}

    def read(self, wanted: Sequence[TagSource]) -> dict[TagSource, list[Any]]:
        """Reads tags, in as few calls as possible.

        Returns:
            The ``TensorDatum``s of each tag, in file order. The list is empty for a tag that is
            gone, damaged or too large for a reply.

        Raises:
            UnavailableError: If TensorBoard cannot read its data now.
        """
        # One call for all tags, because each call to the data server takes 45 ms. If it fails, try
        # again in halves: a reply above 256 MiB fails, and so does one with a damaged tag, but the
        # other tags of that reply can still be read.
        try:
            found = self._read(wanted)
        except Exception as error:
            if _is_transient(error):
                raise UnavailableError(_UNAVAILABLE.format(error=shown(error))) from error
            if len(wanted) == 1:
                run, tag = wanted[0]
                note(_DAMAGED, str(tag), run, type(error).__name__)
                return {wanted[0]: []}
            middle = len(wanted) // 2
            return self.read(wanted[:middle]) | self.read(wanted[middle:])
        return {
            source: list(found.get(source.run, {}).get(str(source.tag), ())) for source in wanted
        }

    def _read(self, wanted: Sequence[TagSource]) -> dict[str, dict[str, Sequence[Any]]]:
        if not wanted:
            return {}
        found: dict[str, dict[str, Sequence[Any]]] = self._provider.read_tensors(
            self._context,
            experiment_id=self.experiment,
            plugin_name=PLUGIN,
            downsample=ALL_SAMPLES,
            run_tag_filter=provider.RunTagFilter(
                runs={source.run for source in wanted}, tags={str(source.tag) for source in wanted}
            ),
        )
        return found


def _readable(run: str, tags: dict[str, Any]) -> dict[Tag, Version]:
    ours: dict[Tag, Version] = {}
    for name, series in tags.items():
        tag = Tag.parse(name)
        if tag is None:
            continue
        if not is_readable(series.plugin_content):
            note(_UNKNOWN, run)
            continue
        time = series.max_wall_time
        ours[tag] = Version(
            series.max_step, time if time is not None and math.isfinite(time) else None
        )
    return ours


def _is_transient(error: Exception) -> bool:
    """Whether this is a gRPC error that may go away: the data server is down or slow."""
    code = getattr(error, "code", None)
    return callable(code) and getattr(code(), "name", "") in _TRANSIENT


FRESH_SECONDS = 0.5
"""Age up to which a listing is reused: TensorBoard checks the files at most once a second."""


class ListingCache:
    """Caches listings for :data:`FRESH_SECONDS`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._known: dict[tuple[str, str | None], tuple[float, Listing]] = {}

    def get(self, provider: Provider, run: str | None = None) -> Listing:
        """Lists the tags of a run, or of all runs for None."""
        whole, key = (provider.experiment, None), (provider.experiment, run)
        # Locked during the call too, so that concurrent requests share one listing.
        with self._lock:
            now = self._clock()
            self._known = {
                k: known for k, known in self._known.items() if now - known[0] <= FRESH_SECONDS
            }
            known = self._known.get(whole) or self._known.get(key)
            if known is None:
                known = self._known[key] = now, provider.listing(run)
            return known[1]
