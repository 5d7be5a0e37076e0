"""LatestTraining: what an adapter shows of the training that it watches, or has watched last."""

from __future__ import annotations

from collections.abc import Sequence

from gradwatch.accumulate.noise_scale import NoiseScale
from gradwatch.history import History
from gradwatch.record.explanation import Explanation
from gradwatch.record.records import Event
from gradwatch.watcher import Watcher


class LatestTraining:
    """Shows what the watcher of the latest training has recorded; a base of adapters.

    A subclass sets ``_watcher`` when a training begins, and says in ``_unwatched()`` why there is
    none.
    """

    _watcher: Watcher | None = None

    @property
    def watcher(self) -> Watcher | None:
        """The watcher of the latest training; None until it starts."""
        return self._watcher

    @property
    def history(self) -> History:
        """The history of the latest training, also after its end.

        Raises:
            RuntimeError: If nothing has been watched yet.
        """
        return self._watched("history").history

    @property
    def events(self) -> Sequence[Event]:
        """The events of the latest training, oldest first, also after its end.

        Raises:
            RuntimeError: If nothing has been watched yet.
        """
        return self._watched("events").events

    @property
    def explanations(self) -> Sequence[Explanation]:
        """Where bad gradients of the latest training came from, newest last, also after its end.

        Raises:
            RuntimeError: If nothing has been watched yet.
        """
        return self._watched("explanations").explanations

    @property
    def noise_scale(self) -> NoiseScale:
        """The gradient noise scale, now or at the end of the latest training, in micro-batches.

        If there is no estimate, ``reason`` says why.

        Raises:
            RuntimeError: If nothing has been watched yet.
        """
        return self._watched("noise_scale").noise_scale

    def _watched(self, name: str) -> Watcher:
        if self._watcher is None:
            raise RuntimeError(f"{type(self).__name__}.{name} was read, but {self._unwatched()}")
        return self._watcher

    def _unwatched(self) -> str:
        """Returns why there is no watcher, as the end of a sentence: ``"the monitor ..."``."""
        raise NotImplementedError
