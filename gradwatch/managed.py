"""ManagedLoop: backward and step for a loop that leaves both to gradwatch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from gradwatch.control.clip import check_positive
from gradwatch.errors import AccumulationError
from gradwatch.options import Options
from gradwatch.track import Track

NO_OPTIMIZER = (
    "watcher.{call}() needs to know the optimizer, but none was named. Write "
    "watch(model, optimizer, ...)."
)
NOTHING_ARRIVED = (
    "watcher.backward(loss) left no gradient in any parameter of the optimizer: the loss does not "
    "depend on them, or the backward ran where its hooks cannot be seen (compiled autograd). "
    "Check that the loss was computed by this model, and run the backward uncompiled."
)
WINDOW_FULL = (
    "watcher.backward() was called for micro-batch {next}, but the window of {wanted} "
    "(watch(accumulate={wanted})) is full. Call watcher.step() after every watcher.backward(): it "
    "steps when the window is full, and returns False until then."
)


class ManagedLoop:
    """Accumulates, unscales, measures, clips, steps and zeroes, in that order.

    Losses are divided by the number of micro-batches before their backward; what a short or a
    weighted window lacks is multiplied in together with the clip.
    """

    def __init__(self, options: Options) -> None:
        """Starts with an empty window.

        Args:
            options: What the user asked for.
        """
        self._options = options
        self._first_weight = 1.0
        self.weight = 1.0

    def backward(
        self, tracks: Sequence[Track], loss: Tensor, weight: float | Tensor | None
    ) -> None:
        """Runs the backward of one micro-batch; see :meth:`gradwatch.watcher.Watcher.backward`."""
        filled, wanted = self._filled(tracks, "backward"), self._options.accumulate
        checked = _checked_weight(weight)
        if wanted > 1 and filled >= wanted:
            raise AccumulationError(WINDOW_FULL.format(next=filled + 1, wanted=wanted))
        if filled == 0:
            self._first_weight = checked
        shared = self._shared(loss, None if weight is None else checked)
        self.weight = checked
        before = sum(track.window.micro_batches for track in tracks)
        try:
            self._scaled(shared).backward()  # type: ignore[no-untyped-call]
        finally:
            self.weight = 1.0
        if sum(track.window.micro_batches for track in tracks) == before == 0:
            raise RuntimeError(NOTHING_ARRIVED)
        for track in tracks:
            if track.window.micro_batches:
                track.add_loss(loss, checked)
                if wanted > 1:
                    track.window.expected_weight = wanted * self._first_weight

    def step(self, tracks: Sequence[Track], last: bool) -> bool:
        """Steps when the window is full; see :meth:`gradwatch.watcher.Watcher.step`."""
        filled = self._filled(tracks, "step")
        if filled == 0 or (filled < self._options.accumulate and not last):
            return False
        stepped = [self._step(track) for track in tracks if track.window.micro_batches]
        if self._options.scaler is not None:
            self._options.scaler.update()
        for track in tracks:
            track.require_optimizer().zero_grad()
        return any(stepped)

    def _step(self, track: Track) -> bool:
        optimizer, scaler, before = track.require_optimizer(), self._options.scaler, track.step
        track.last_window = True
        try:
            if scaler is None:
                optimizer.step()
            else:
                scaler.unscale_(optimizer)
                scaler.step(optimizer)
        finally:
            track.last_window = False
        if track.step == before:
            track.abandon_window(left_out=True)
        return track.applied

    def _shared(self, loss: Tensor, weight: float | None) -> Tensor:
        wanted = self._options.accumulate
        if wanted == 1:
            return loss
        if weight is None:
            return loss / wanted
        return loss * (weight / (wanted * self._first_weight))

    def _scaled(self, loss: Tensor) -> Tensor:
        scaler = self._options.scaler
        return loss if scaler is None else scaler.scale(loss)

    def _filled(self, tracks: Sequence[Track], call: str) -> int:
        if not tracks:
            raise RuntimeError(NO_OPTIMIZER.format(call=call))
        return max(track.window.micro_batches for track in tracks)


def _checked_weight(weight: float | Tensor | None) -> float:
    if weight is None:
        return 1.0
    if isinstance(weight, Tensor):
        weight = weight.item()
    check_positive("watcher.backward(weight=)", weight)
    if not math.isfinite(weight):
        raise ValueError(f"watcher.backward(weight=) must be finite, got {weight!r}.")
    return float(weight)
