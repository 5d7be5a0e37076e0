"""Managed loops, which leave backward and step to gradwatch, and batches split to fit in memory."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gradwatch.accumulate.splitting import batch_length, largest_part, split_batch
from gradwatch.checks import described, shown
from gradwatch.errors import AccumulationError
from gradwatch.hooks.data_parallel import GradientSync, broadcast_buffers, can_hold
from gradwatch.hooks.holding import ModelReference
from gradwatch.measure.deferred import (
    FloatOrDeferred,
    as_operand,
    defer,
    defer_copy,
    is_at_hand,
)
from gradwatch.measure.devices import as_exact, in_exact
from gradwatch.measure.gathering import multiplied, operand_on, together
from gradwatch.out_of_memory import Rollback, forget, is_out_of_memory, release_memory
from gradwatch.record.events import loop_event, out_of_memory_event
from gradwatch.step.mistakes import NO_STEPS
from gradwatch.step.optimizer_steps import OptimizerSteps
from gradwatch.step.run import Run
from gradwatch.step.skip_rule import StepOutcome
from gradwatch.step.taken import StepTaken, taken

if TYPE_CHECKING:
    from gradwatch.hooks.closures import KeptClosure

TWICE = (
    "watcher.backward() was called again before the loop over watcher.micro_batches() had gone on "
    "to its next part, so it is not clear which part the loss belongs to, and what its weight is. "
    "Add the losses of a part up, and call watcher.backward() once for each."
)
LEFT_OUT = (
    "watcher.backward() was called after the loop over watcher.micro_batches() had handed out "
    "parts without a backward, so it is not clear which part the loss belongs to, and what its "
    "weight is. Call watcher.backward() inside the loop, before the next part is taken: make no "
    "list of the parts, do not read ahead, and call watcher.backward(loss, weight=0) for a part "
    "that must not count."
)
NOT_ALONE = (
    "The loop over watcher.micro_batches() went on after another one had begun inside it, or after "
    "watcher.step(last=True) had ended its window, so its parts no longer count as one batch. "
    "End one loop before the next begins, and call watcher.step() after it."
)


@dataclass(slots=True)
class Split:
    """A batch that is run in parts, which together count as one batch of the window.

    Attributes:
        parts: The number of parts.
        examples: The number of examples in all parts together.
        current: The number of examples in the current part.
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
        split: The batch that is currently run in parts; None if there is none.
    """

    def __init__(self) -> None:
        """Starts with an empty window."""
        self.units = 0
        self.split: Split | None = None
        self._left_out: Split | None = None  # a loop that ended before the last backward

    def restart(self) -> None:
        """Counts from zero again, as the window is empty."""
        self.units = 0

    def end(self) -> None:
        """Ends the window, after its step."""
        self.units, self.split, self._left_out = 0, None, None

    def forgive(self) -> None:
        """Ignores parts that were handed out without a backward, as the loop has moved on."""
        self._left_out = None

    def count(self, restarted: bool) -> None:
        """Counts a backward.

        Args:
            restarted: Whether the loop has reset the gradients of the window before it.
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
        """Returns whether the next backward ends a window of ``wanted`` batches."""
        split = self.split
        finishes = split is None or split.done + 1 == split.parts
        return finishes and self.units + 1 >= wanted

    def check_turn(self, weighs: bool) -> None:
        """Refuses a loss if it is not clear to which part of a batch it belongs.

        Args:
            weighs: Whether the loop has given the weight of the loss.

        Raises:
            AccumulationError: If it is not clear.
        """
        split = self.split
        if split is not None and split.taken == 0:
            raise AccumulationError(TWICE)
        read_ahead = split is not None and split.taken > 1 and not weighs
        if read_ahead or self._left_out is not None:
            raise AccumulationError(LEFT_OUT)

    def parts(self, parts: Sequence[tuple[Any, int]]) -> Iterator[Any]:
        """Yields the parts of a batch.

        Args:
            parts: Each part with its number of examples.

        Raises:
            AccumulationError: If another loop has begun in the meantime, or the window has ended.
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
        """Returns a function that restores the present progress; call it outside a split batch."""
        units, left_out = self.units, self._left_out

        def put_back() -> None:
            self.units, self._left_out, self.split = units, left_out, None

        return put_back


NO_CLOSURE = (
    "watcher.run_batch(closure=) must be a function of a micro-batch that returns its loss, got "
    "{value}. Write watcher.run_batch(lambda part: criterion(model(part[0]), part[1]), batch)."
)
WEIGHT = (
    "watcher.backward(weight=) must be a finite number of at least 0, or a tensor of one, got "
    "{weight}. Pass the number of examples, or tokens, that the loss is the mean of."
)


def checked_weight(weight: float | Tensor) -> FloatOrDeferred:
    """Checks a weight that the user gave.

    Args:
        weight: A number, or a tensor of one number on any device.

    Raises:
        TypeError: If it is something else.
        ValueError: If it is negative or not finite; not checked on a device.
    """
    if isinstance(weight, Tensor):
        if weight.numel() != 1 or weight.is_complex() or weight.dtype == torch.bool:
            raise TypeError(WEIGHT.format(weight=shown(weight)))
        if not is_at_hand(weight):  # checking the value would wait for the device
            # Converted, because dividing integers would give the default dtype, float32.
            return defer_copy(in_exact(weight.reshape(())))
        weight = weight.item()
    if isinstance(weight, bool) or not isinstance(weight, Real):  # NumPy's numbers are Real, too
        raise TypeError(WEIGHT.format(weight=shown(weight)))
    try:
        number = float(weight)
    except OverflowError:
        number = math.inf
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(WEIGHT.format(weight=shown(weight)))
    return number


NO_OPTIMIZER = (
    "watcher.{call}() needs to know the optimizer, but none was named. Write "
    "watch(model, optimizer, ...)."
)
NOTHING_ARRIVED = (
    "watcher.backward(loss) left no gradient in any parameter of the optimizer: the loss does not "
    "depend on them, or the backward ran where its hooks cannot be seen (compiled autograd). "
    "Check that the loss was computed by this model, and run the backward uncompiled."
)
NO_LOSS_GIVEN = (
    "watcher.backward() needs the loss of a micro-batch, a tensor of one element, or a function "
    "without arguments that returns it, got {value}. Write watcher.backward(loss), or "
    "watcher.backward(lambda: criterion(model(x), y))."
)
WINDOW_FULL = (
    "watcher.{call}() was called for micro-batch {next}, but the window of {wanted} "
    "(watch(accumulate={wanted})) is full. Call watcher.step() after every micro-batch: it "
    "steps when the window is full, and returns False until then."
)


OWN_BACKWARD = (
    "watcher.step() found gradients of loss.backward(), and none of watcher.backward(loss): it "
    "counts only the latter, so it has not stepped, and the weights do not move. Call "
    "watcher.backward(loss) instead, or optimizer.step() and optimizer.zero_grad() instead of "
    "watcher.step()."
)


class ManagedLoop:
    """Accumulates, unscales, measures, clips, steps and zeroes the gradients, in that order.

    Before its backward, each loss is multiplied by its weight and divided by the expected weight of
    the window. If the window turns out to have another weight, the step corrects the gradients,
    together with the clip.

    Attributes:
        weight: Weight of the running backward.
        newest_weight: Weight of the newest backward.
        active: Whether a backward of this class is running.
        manages: Whether the newest backward was one of this class; if not, the user's own loop
            decides about windows.
        holds_all: Whether no micro-batch communicates, not even the last one; the step then reduces
            the gradients.
    """

    def __init__(
        self, run: Run, sync: GradientSync | None, optimizers: Sequence[OptimizerSteps]
    ) -> None:
        """Starts with an empty window.

        ``sync`` is None if micro-batches do not communicate. ``optimizers`` may grow later, when
        further optimizers are found.
        """
        self.weight: FloatOrDeferred = 1.0
        self.newest_weight: FloatOrDeferred = 1.0
        self.active = False
        self._run = run
        self._sync = sync
        self._optimizers = optimizers
        self._progress = WindowProgress()
        self._divisor: FloatOrDeferred = 1.0
        # The weight of one batch, the same on all ranks; None until the ranks have agreed on it.
        self._agreed: FloatOrDeferred | None = None
        self._communicated = True
        self.holds_all = False
        self.manages = run.accumulation.checked
        # Where a micro-batch that goes bad is kept, to be run again; None if nobody asks.
        self.closures = None if run.explaining is None else run.explaining.forwards.closures

    # -- called by the training loop -------------------------------------------------------------

    def backward(self, loss: Tensor | Callable[[], Tensor], weight: float | Tensor | None) -> None:
        """Runs the backward of one micro-batch; see :meth:`gradwatch.watcher.Watcher.backward`."""
        if isinstance(loss, Tensor):
            if self.closures is not None:
                self.closures.losses_given = True
            self.run_backward(loss, weight, None)
            return
        if not callable(loss):
            raise TypeError(NO_LOSS_GIVEN.format(value=described(loss)))
        self._filled("backward")  # without an optimizer, it is refused before the forward
        with self.kept(loss) as kept:
            found: object = loss()
            if not isinstance(found, Tensor) or found.numel() != 1:
                text = f"a function that returned {_described(found)}"
                raise TypeError(NO_LOSS_GIVEN.format(value=text))
            self.run_backward(found, weight, kept)

    @contextmanager
    def kept(self, function: Callable[..., Any], *args: Any) -> Iterator[KeptClosure | None]:
        """Keeps the function that computes the loss of the backward in the block, if asked for."""
        if self.closures is None:
            yield None
            return
        scaled = self._run.options.scaler is not None
        try:
            yield self.closures.begin(function, *args, scaled=scaled)
        finally:
            self.closures.end()

    def run_backward(
        self, loss: Tensor, weight: float | Tensor | None, kept: KeptClosure | None
    ) -> None:
        """Runs the backward of a loss; ``kept`` is the function that has returned it, if known."""
        before = self._filled("backward")
        self.manages = True
        if self._run.hooks.replaced.seem():
            self._run.follow_model()
        if before == 0:
            self._progress.restart()
        self._check_room("backward")
        self._progress.check_turn(weighs=weight is not None)
        given = self._given(weight)
        weighs = given is not None or self._run.accumulation.micro_batches > 1
        weighs = weighs or any(one.window.divisor is not None for one in self._optimizers)
        self.weight = self.newest_weight = 1.0 if given is None else given
        if before == 0:
            self._divisor = self._expected(given) if weighs else 1.0
        if kept is not None and weighs:
            kept.weight, kept.divisor = self.newest_weight, self._divisor
        was = [(one.window.arrivals, one.window.backward_count) for one in self._optimizers]
        self._run_backward(self._shared(loss) if weighs else loss)
        self._note(was, loss, weighs)

    def step(self, last: bool) -> bool | StepTaken:
        """Steps when the window is full; see :meth:`gradwatch.watcher.Watcher.step`."""
        self._progress.forgive()
        if self._filled("step") == 0:
            return False
        if not last and not self._is_full:
            if self._progress.units == 0 and self._progress.split is None:
                event = loop_event("mistake", OWN_BACKWARD, self._optimizers[0].step + 1)
                self._run.tell(event, key=NO_STEPS)
            return False
        self._communicate()
        outcomes = [self._step(one) for one in self._optimizers if one.window.backward_count]
        self._progress.end()
        if self._run.options.scaler is not None:
            self._run.options.scaler.update()
        for one in self._optimizers:
            if one.optimizer is not None:
                one.optimizer.zero_grad()
        return taken(outcomes)

    def micro_batches(self, batch: Any, size: int, call: str = "micro_batches") -> Iterator[Any]:
        """Splits a batch; see :meth:`gradwatch.watcher.Watcher.micro_batches`."""
        if self._filled(call) == 0:
            self._progress.restart()
        self._check_room(call)
        self._progress.forgive()
        parts = split_batch(batch, size, f"watcher.{call}")
        if len(parts) > 1:
            self._run.hooks.watch_added()
        return self._progress.parts(parts)

    # -- called by other parts of the watcher ----------------------------------------------------

    def before_forward(self) -> None:
        """Decides whether the micro-batch that begins communicates its gradients."""
        if self._sync is None:
            return
        self._sync.restore()  # in case the last forward had no backward
        wanted = self._run.accumulation.micro_batches
        if self.holds_all or (self.manages and not self._progress.is_last(wanted)):
            self._sync.hold_back()

    def after_other_backward(self) -> None:
        """Leaves communication and windows to a loop that calls ``loss.backward()`` itself.

        If its micro-batch was held back, a later one reduces the gradients of both.
        """
        self.manages = False
        if self._sync is not None:
            self._sync.restore()

    def agree(self, weight: FloatOrDeferred) -> FloatOrDeferred:
        """Returns the weight of one batch that all ranks divide by.

        It is the mean over the ranks at the first call, and stays the same from then on.

        Args:
            weight: The weight of one batch on this rank.
        """
        ranks = self._run.data_parallel
        if self._agreed is None and ranks is not None:
            device = self._run.table.tensors[0].device
            value = as_exact(as_operand(weight), device).reshape(1)
            self._agreed = defer(ranks.sum_(value)[0] / ranks.ranks)
        return weight if self._agreed is None else self._agreed

    def mark(self) -> Callable[[], None]:
        """Returns a function that restores the present progress in the window."""
        progress, divisor, communicated = self._progress.mark(), self._divisor, self._communicated

        def put_back() -> None:
            progress()
            self._divisor, self._communicated = divisor, communicated

        return put_back

    def state_dict(self) -> dict[str, Any]:
        """Returns the number that the ranks divide by, so that a resumed run uses the same."""
        return {"agreed": None if self._agreed is None else float(as_operand(self._agreed))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the state that :meth:`state_dict` returned."""
        self._agreed = state["agreed"]

    # -- steps of these methods ------------------------------------------------------------------

    def _run_backward(self, loss: Tensor) -> None:
        scaler = self._run.options.scaler
        self.active = True
        try:
            scaled = loss if scaler is None else scaler.scale(loss)
            scaled.backward()  # type: ignore[no-untyped-call]
        finally:
            self.active, self.weight = False, 1.0
            if self._sync is not None:
                self._communicated = not self._sync.is_held
                self._sync.restore()

    def _note(self, was: Sequence[tuple[list[Any], int]], loss: Tensor, weighs: bool) -> None:
        """Counts a backward, and notes loss and weight in the windows that it was added to.

        ``was`` holds the arrivals of each optimizer's window before the backward, and their number.
        """
        before, now = max(count for _, count in was), self._filled("backward")
        if now == before == 0:
            raise RuntimeError(NOTHING_ARRIVED)
        windows = list(zip(self._optimizers, was, strict=True))
        again = [one.window.arrivals is not arrivals for one, (arrivals, _) in windows]
        # Otherwise it was a further loss of the same batch, for another optimizer: not counted.
        if now > before or any(again):
            self._progress.count(restarted=now <= before)
        for restarted, (one, (_, count)) in zip(again, windows, strict=True):
            if restarted or one.window.backward_count > count:
                one.note_managed(loss, self.newest_weight, self._divisor if weighs else None)
            one.units = self._progress.units

    def _communicate(self) -> None:
        """Reduces the gradients if the last backward did not, not knowing that it was the last."""
        if self._sync is None:
            return
        # With several models, one may have communicated although another one was held back.
        several = len(self._sync.modules) > 1 and not self._is_full
        if self._communicated and not several:
            return
        self._sync.reduce_()
        self._communicated = True
        self._run.replicas.note_reduced()
        for one in self._optimizers:
            one.window.remeasure_reduced()

    def _step(self, steps: OptimizerSteps) -> StepOutcome | None:
        """Steps one optimizer; returns None if it was found, and is gone."""
        optimizer, scaler, before = steps.optimizer, self._run.options.scaler, steps.step
        if optimizer is None:
            return None
        steps.units, steps.ends_window = self._progress.units, True
        try:
            if scaler is None:
                optimizer.step()
            else:
                scaler.unscale_(optimizer)
                scaler.step(optimizer)
        finally:
            steps.ends_window = False
        if steps.step == before:  # the scaler found an overflow and did not call the optimizer
            with torch.no_grad():
                steps.abandon_window(at_once=True, certain=True)
        return steps.outcome

    def _given(self, weight: float | Tensor | None) -> FloatOrDeferred | None:
        """Returns the weight given by the user, or by the split batch; None if neither is."""
        if weight is not None:
            return checked_weight(weight)
        split = self._progress.split
        return None if split is None else float(split.current)

    def _expected(self, given: FloatOrDeferred | None) -> FloatOrDeferred:
        """Returns the expected weight of the window that begins, the same on every rank.

        Any number would do, as the step corrects it. With this one the gradients have the size of
        the mean, and if all windows have the same weight, the correction is exactly 1 and free.
        """
        wanted = self._run.accumulation.micro_batches
        if given is None:
            return float(wanted)
        split = self._progress.split
        batch: FloatOrDeferred = given if split is None else float(split.examples)
        if self._run.data_parallel is not None:
            batch = self.agree(batch)
        weight = as_operand(batch)
        if isinstance(weight, Tensor):
            return defer(torch.where(weight > 0, weight, 1.0) * wanted)
        return (weight or 1.0) * wanted

    def _shared(self, loss: Tensor) -> Tensor:
        device = loss.device
        weight = operand_on(self.newest_weight, device)
        divisor = operand_on(self._divisor, device)
        if isinstance(weight, float) and weight == 1.0:
            return loss / divisor
        share = weight / divisor
        if isinstance(share, Tensor):  # float64, to which it would promote the loss
            share = share.to(torch.promote_types(loss.dtype, torch.float32))
        return loss * share

    @property
    def _is_full(self) -> bool:
        progress = self._progress
        return progress.split is None and progress.units >= self._run.accumulation.micro_batches

    def _check_room(self, call: str) -> None:
        wanted, units = self._run.accumulation.micro_batches, self._progress.units
        # With one loss per optimizer, the window of one optimizer is full before that of another.
        full = all(one.window.backward_count >= units for one in self._optimizers)
        if wanted > 1 and units >= wanted and full:
            text = WINDOW_FULL.format(call=call, next=units + 1, wanted=wanted)
            raise AccumulationError(text)

    def _filled(self, call: str) -> int:
        if not self._optimizers:
            raise RuntimeError(NO_OPTIMIZER.format(call=call))
        if call != "step":
            for one in self._optimizers:
                one.drop_discarded_window()
        return max(one.window.backward_count for one in self._optimizers)


Closure = Callable[[Any], "Tensor | tuple[Tensor, float | Tensor]"]

CALL = "watcher.run_batch"
NO_LOSS = (
    "The closure of watcher.run_batch() must return the mean loss of the micro-batch that it is "
    "given, a tensor of one element, or a pair of this loss and a weight, got {result}."
)
ELSEWHERE = (
    "Another rank ran out of memory with a micro-batch of one example, so the batch cannot be run. "
    "Use a smaller model, shorter examples or activation checkpointing."
)


class BatchRunner:
    """Halves the micro-batch when memory runs out, and runs the same batch again.

    Attributes:
        size: The most examples that a micro-batch may have; None if memory has never run out.
    """

    def __init__(
        self,
        run: Run,
        managed: ManagedLoop,
        model: ModelReference,
        optimizers: Sequence[OptimizerSteps],
    ) -> None:
        """Starts with whole batches; for ``optimizers`` see :class:`ManagedLoop`."""
        self.size: int | None = None
        self._run = run
        self._managed = managed
        self._optimizers = optimizers
        self._model = model
        self._known: list[weakref.ref[nn.Module]] | None = None
        self._devices = {tensor.device for tensor in run.table.tensors}

    def run(self, closure: Closure, batch: Any) -> Tensor:
        """Runs a batch; see :meth:`gradwatch.watcher.Watcher.run_batch`."""
        if not callable(closure):
            raise TypeError(NO_CLOSURE.format(value=described(closure)))
        length = batch_length(batch, CALL)
        if not self._may_run_again:
            return self._run_parts(closure, batch, self._size(length))
        self._communicate_ahead(length)
        while True:
            size = self._size(length)
            start = self._start()
            loss, error = self._attempt(start, closure, batch, size)
            too_large = self._smallest_of_ranks(None if error is None else size)
            if too_large is None:
                return loss
            start.go_back()
            if too_large == 1:
                raise _last_error(error, size)
            del start, error, loss  # or their memory would be in use during the next attempt
            self._halve(too_large, self._optimizers[0].step + 1)

    # -- one attempt -----------------------------------------------------------------------------

    def _start(self) -> _Start:
        return _Start(self._run, self._managed, self._optimizers, self._modules())

    def _attempt(
        self, start: _Start, closure: Closure, batch: Any, size: int
    ) -> tuple[Tensor, Exception | None]:
        """Runs a batch once; returns its loss, and the error if memory ran out."""
        self._managed.holds_all = True
        try:
            return self._run_parts(closure, batch, size), None
        except BaseException as error:
            if isinstance(error, Exception) and is_out_of_memory(error):
                if size > 1:  # at 1 there is no next attempt: the error is raised, with its frames
                    forget(error)
                return torch.zeros((), dtype=torch.float32, device="cpu"), error
            start.go_back()
            raise
        finally:
            self._managed.holds_all = False

    def _run_parts(self, closure: Closure, batch: Any, size: int) -> Tensor:
        loss_sum: Any = torch.zeros((), dtype=torch.float32, device="cpu")
        weight_sum: Any = 0.0
        for part in self._managed.micro_batches(batch, size, "run_batch"):
            loss, weight = self._run_part(closure, part)
            loss_sum, weighted = together(loss_sum, multiplied(loss, weight))
            weight_sum, weight = together(weight_sum, weight)
            loss_sum, weight_sum = loss_sum + weighted, weight_sum + weight
        loss_sum, weight_sum = together(loss_sum, weight_sum)
        mean: Tensor = loss_sum / (weight_sum + (weight_sum == 0))
        return mean

    def _run_part(self, closure: Closure, part: Any) -> tuple[Tensor, float | Tensor]:
        """Runs a micro-batch; its graph is freed on return, before the next micro-batch begins."""
        with self._managed.kept(closure, part) as kept:
            loss, weight = _loss_and_weight(closure(part))
            self._managed.run_backward(loss, weight, kept)
        wide = torch.promote_types(loss.dtype, torch.float32)
        return loss.detach().reshape(()).to(wide), as_operand(self._managed.newest_weight)

    # -- cooperation of the ranks ----------------------------------------------------------------

    def _modules(self) -> list[nn.Module]:
        """Lists the modules of the model as it was for the first batch."""
        if self._known is None:
            model = self._model.module()
            self._known = [] if model is None else list(map(weakref.ref, model.modules()))
        return [module for one in self._known if (module := one()) is not None]

    @property
    def _may_run_again(self) -> bool:
        """Whether a rank can run a batch again without the other ranks waiting inside theirs.

        This is not so if the ranks communicate during a batch: FSDP2 gathers parameters in each
        forward, SyncBatchNorm gathers statistics, and DistributedDataParallel with a static graph
        reduces gradients in its first backward.
        """
        ranks = self._run.data_parallel
        if ranks is None or self._run.shards is not None:
            return self._run.shards is None
        synced = any(isinstance(module, nn.SyncBatchNorm) for module in self._modules())
        return not synced and all(map(can_hold, ranks.wrappers))

    def _communicate_ahead(self, length: int) -> None:
        """Communicates in advance what a batch needs, so that ranks run it independently."""
        ranks = self._run.data_parallel
        if ranks is not None:
            self._managed.agree(float(length))
            broadcast_buffers(ranks.wrappers)

    def _smallest_of_ranks(self, failed: int | None) -> int | None:
        """Returns the smallest micro-batch size that failed on any rank; None if none failed.

        Args:
            failed: The size that failed on this rank; None if the batch was run.
        """
        ranks = self._run.data_parallel
        if ranks is None:
            return failed
        device = self._run.table.tensors[0].device
        size = math.inf if failed is None else float(failed)
        told = torch.full((1,), -size, dtype=torch.float32, device=device)
        smallest = -ranks.max_(told).item()
        return None if math.isinf(smallest) else int(smallest)

    # -- sizes -----------------------------------------------------------------------------------

    def _size(self, length: int) -> int:
        return largest_part(length, min(self.size or length, length))

    def _halve(self, too_large: int, step: int) -> None:
        release_memory(self._devices)
        self.size = (too_large + 1) // 2
        self._run.note(out_of_memory_event(step, too_large, self.size))


class _Start:
    """The state before a batch, to go back to: gradients, buffers, random numbers, the window."""

    def __init__(
        self,
        run: Run,
        managed: ManagedLoop,
        optimizers: Sequence[OptimizerSteps],
        modules: Sequence[nn.Module],
    ) -> None:
        self._added = run.hooks.added
        self._optimizers = optimizers
        self._rollback = Rollback(run.table.tensors, modules)
        self._marks = [managed.mark(), *(one.mark() for one in optimizers)]

    def go_back(self) -> None:
        self._rollback.restore()
        for put_back in self._marks:
            put_back()
        for one in self._optimizers:
            one.window.accept_restored_gradients()
        self._added.begin()  # drops gradients of the backward that failed
        self._added.active = any(one.window.backward_count for one in self._optimizers)


def _last_error(error: Exception | None, size: int) -> Exception:
    """Returns the error to raise if a rank cannot run even one example."""
    if error is not None and size == 1:
        return error
    elsewhere = RuntimeError(ELSEWHERE)
    elsewhere.__cause__ = error
    return elsewhere


def _loss_and_weight(result: object) -> tuple[Tensor, float | Tensor | None]:
    loss, weight = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return loss, weight
    raise TypeError(NO_LOSS.format(result=_described(result)))


def _described(result: object) -> str:
    if isinstance(result, Tensor):
        return f"a tensor of shape {list(result.shape)}"
    if isinstance(result, tuple):
        return f"({', '.join(map(_described, result))})"
    return f"{result!r:.100} of type {type(result).__name__}"
