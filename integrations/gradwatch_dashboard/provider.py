"""What TensorBoard's data provider holds of ours, asked for once by requests that come together."""

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

# The largest int32, as the data server takes it; with 0 it gives nothing.
ALL_SAMPLES = 2**31 - 1

_UNKNOWN = (
    "The Gradients tab leaves out data of run %s: it is damaged, or of a newer gradwatch. Then "
    "pip install --upgrade gradwatch where TensorBoard runs."
)
_DAMAGED = "The Gradients tab leaves out %s of run %s, which cannot be read: %s"
_UNAVAILABLE = "TensorBoard cannot read its data now: {error}. Its log says more."
_TRANSIENT = frozenset({"UNAVAILABLE", "CANCELLED", "DEADLINE_EXCEEDED", "ABORTED"})


class UnavailableError(errors.PublicError):  # type: ignore[misc]  # TensorBoard has no types
    """The data cannot be read now, but perhaps a little later."""

    http_code = 503


class Version(NamedTuple):
    """Changes whenever a tag has grown.

    Attributes:
        max_step: Largest step of its Events.
        max_wall_time: Latest time of them, seconds since 1970; None where it is no number.
    """

    max_step: int | None
    max_wall_time: float | None


class TagSource(NamedTuple):
    """What is to be read.

    Attributes:
        run: Name of the run.
        tag: One of its tags.
    """

    run: str
    tag: Tag


Listing = dict[str, dict[Tag, Version]]
"""Run to tag to its version, of tags that are ours and readable."""


class Provider:
    """TensorBoard's data provider on behalf of one request.

    Attributes:
        experiment: The experiment that the request is about; empty for the one that is local.
    """

    def __init__(self, data_provider: Any, environ: Any) -> None:
        """Holds TensorBoard's data provider and what of the request each call passes on."""
        self._provider = data_provider
        self._context = plugin_util.context(environ)
        self.experiment: str = plugin_util.experiment_id(environ)

    def listing(self, run: str | None = None) -> Listing:
        """Lists what there is of a run, or of all.

        Raises:
            UnavailableError: If TensorBoard cannot tell now.
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
        """Reads tags, in as few calls as go well.

        Returns:
            The ``TensorDatum``s of each in the order of the file. A tag that is gone, damaged or
            too large for a reply has none.

        Raises:
            UnavailableError: If TensorBoard cannot read now.
        """
        # Together, for a call takes the data server 45 ms. Where it fails, in halves: a reply above
        # 256 MiB fails, and so does one with a damaged tag, whose neighbours can still be read.
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
    """Whether it is gRPC that says so: the data server is down, or slow."""
    code = getattr(error, "code", None)
    return callable(code) and getattr(code(), "name", "") in _TRANSIENT


FRESH_SECONDS = 0.5
"""Age up to which a listing still stands: TensorBoard looks at the files once a second at most."""


class ListingCache:
    """Remembers the newest listings."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._known: dict[tuple[str, str | None], tuple[float, Listing]] = {}

    def get(self, provider: Provider, run: str | None = None) -> Listing:
        """Lists what there is of a run, or of all."""
        whole, key = (provider.experiment, None), (provider.experiment, run)
        # Also while it asks: requests that come together wait for one answer.
        with self._lock:
            now = self._clock()
            self._known = {
                k: known for k, known in self._known.items() if now - known[0] <= FRESH_SECONDS
            }
            known = self._known.get(whole) or self._known.get(key)
            if known is None:
                known = self._known[key] = now, provider.listing(run)
            return known[1]
