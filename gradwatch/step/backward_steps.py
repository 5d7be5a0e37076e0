"""The backwards of parameters of which it is not known yet which optimizer steps them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from gradwatch.hooks.backward import Backward
from gradwatch.hooks.scaler import LossScale
from gradwatch.hooks.snapshot import WeightSnapshot
from gradwatch.measure.deferred import FloatOrDeferred
from gradwatch.record.events import nonfinite_error
from gradwatch.step.pending import PendingStep
from gradwatch.step.run import Run
from gradwatch.step.steps import Steps
from gradwatch.step.window import Window

MOVES = 16  # changes of the weights, without a step, after which each backward counts as one


class EndedWindow(NamedTuple):
    """A window that ended without a step, while no optimizer was known.

    Attributes:
        window: The backwards and their measurement.
        scale: The loss scale at its last backward.
        by_scaler: Whether a scaler has skipped the step; if not, the gradients were thrown away.
        asked: The ids of the optimizers that it was asked to step.
    """

    window: Window
    scale: FloatOrDeferred
    by_scaler: bool
    asked: frozenset[int] = frozenset()


class BackwardSteps(Steps):
    """The backwards of parameters of which it is not known yet which optimizer steps them.

    If no optimizer ever steps, each backward counts as a step. This is known when the weights have
    changed :data:`MOVES` times without an optimizer step, or at the end of the run. Until then the
    backwards are held. So are windows that ended without a step: an optimizer that is found later
    would have stepped with them, so they are recorded as its own (:meth:`ended_of`).

    Attributes:
        moved: Whether the weights have ever moved between two backwards.
        are_steps: Whether it is certain that each backward is a step.
    """

    def __init__(self, run: Run, window: Window) -> None:
        """Starts with an empty window over all watched parameters."""
        # Only a scaler that the user named: without an optimizer step nothing shows whether one
        # that was found is in use.
        super().__init__("none", window, run, LossScale(run.options.scaler))
        self._found = run.scale
        # Not with a scaler: it provokes overflows while it searches for its scale, and skips those
        # steps.
        self._raises = run.options.on_nonfinite == "raise" and run.options.scaler is None
        self.are_steps = False
        self.moved = False
        self._versions, self._moves = -1, 0
        self._ended: deque[EndedWindow] = deque(maxlen=run.options.buffer_size)
        self._found_scale: FloatOrDeferred = 1.0

    def let_go(self) -> None:
        """Drops the parameters and their gradients; see :meth:`Steps.let_go`."""
        super().let_go()
        for one in self._ended:
            one.window.let_go()

    def begin_backward(self, first: int) -> None:
        """Looks, when a backward begins, whether the window has ended without a step."""
        if self.are_steps:
            return
        if self._scaler_has_updated():
            # As long as none has stepped, a scaler that was asked for a step has left it out.
            asked = self._found.asked_to_step(self._generation)
            known = asked and not self._run.joint_steps.any_followed
            by_scaler = known or self._run.scale.lowered_since(self._found_scale)
            self._end_window(bool(by_scaler), asked)
        elif self.window.left_before(first) == 0.0:
            self._end_window(by_scaler=False)
        elif gone := self.window.thrown_before(first):
            self._end_part(gone)

    def discard(self) -> None:
        """Notes that the gradients of the window were thrown away."""
        self._end_window(by_scaler=False)

    @property
    def scale_at_backward(self) -> FloatOrDeferred:
        """The loss scale at the newest backward, if it is that of the optimizer to be found."""
        return self._found_scale

    def ended_of(self, indices: Sequence[int]) -> list[EndedWindow]:
        """Returns the windows without a step, with some of the parameters only."""
        parts = [
            one._replace(window=one.window.part(sorted(set(indices) & set(one.window.indices))))
            for one in self._ended
        ]
        return [one for one in parts if one.window.arrivals]

    def _end_part(self, indices: Sequence[int]) -> None:
        """Notes that the gradients of some parameters were thrown away, as of one optimizer.

        Which parameters an optimizer has is not known before its first step.
        """
        part = self.window.part(sorted(indices))
        if part.arrivals and not self._run.used.issuperset(part.backwards):
            self._ended.append(EndedWindow(part, self._found_scale, by_scaler=False))
        self.window.forget(indices)

    def _end_window(self, by_scaler: bool, asked: frozenset[int] = frozenset()) -> None:
        norms = self.window.unused_norms(1.0, together=False)
        if norms is not None and (by_scaler or not self._used_otherwise(norms)):
            ended = EndedWindow(self.window.copy(), self._found_scale, by_scaler, asked)
            self._ended.append(ended)
        self.window.reset()

    def add_alone(self, backward: Backward, weight: FloatOrDeferred, alone: bool) -> None:
        """Adds a backward that has ended.

        ``alone`` says that no optimizer has been found at all, so the backward may be a step.
        """
        if not self.moved:
            self.moved = self.weights_then is not None and self.weights_then.moved()
        if self.are_steps or backward.freed:
            self.window.reset()  # an optimizer inside the backward has used what was there before
        measured = self.add(backward, weight)
        if not self.are_steps and self._run.scale.scaler is not None:
            self._found_scale = self._run.scale.value()
        if not measured or not alone:
            return
        self._find_out_what_steps_are()
        explains = self._run.explaining is not None and (self.are_steps or self._raises)
        pending = self._step_of_newest(explains)
        if self.are_steps:
            self._run.recorder.expect(pending)
        elif self._run.recorder.hold(pending) >= self._options.buffer_size:
            self.commit()
        if self._raises and pending.entry().record.nonfinite_parameters:
            error = nonfinite_error(pending.entry().record, pending.entry().events)
            explaining = self._run.explaining
            raise error if explaining is None else error.explained(explaining.newest_of(self.label))

    def release(self, indices: Sequence[int]) -> None:
        """Leaves parameters to an optimizer that has been found and is about to step them."""
        if not self.are_steps:
            self._run.recorder.retract()
            self.step = 0
        self.window.leave(indices)
        self.weights_then = None  # the optimizer moves the weights of its own
        if self.window.arrivals:
            self.weights_then = WeightSnapshot(self._parameters())

    @property
    def seem_steps(self) -> bool:
        """Whether the weights have moved more than once, as they do in a loop without optimizer."""
        return self._moves > 1

    def commit(self) -> None:
        """Decides that each backward was a step."""
        self.are_steps = True
        self._ended.clear()
        self._run.recorder.commit()

    def _step_of_newest(self, explains: bool) -> PendingStep:
        whole, self.window = self.window, self.window.latest()
        self.step += 1
        # Whatever the loop does with the gradients from here on is not seen.
        norms = self.window.step_norms(self._scale, 1.0)._replace(clip_known=False)
        if (explains or self._raises) and not norms.after.total.at_hand:
            norms = self.window.look_closer(norms, norms.unit_after)
        if explains and self._run.explaining is not None:
            self._run.explaining.look_at(self.label, self.step, self.window, norms)
        pending = self._pending(norms, self.step)
        self.window = whole
        return pending

    def _find_out_what_steps_are(self) -> None:
        tensors = self._run.table.tensors
        versions = sum(tensor._version for tensor in tensors if not tensor.is_inference())
        if not self.are_steps and 0 <= self._versions < versions:
            # Once is no proof: SAM moves the weights before its optimizer takes the first step.
            self._moves += 1
            if self._moves >= MOVES:
                self.commit()
        self._versions = versions
