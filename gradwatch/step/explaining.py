"""Explaining: says, before a bad step ends, where its gradients went bad.

Nothing in here changes the training: what fails ends as an explanation that says so.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gradwatch.checks import described
from gradwatch.errors import described_error, logger
from gradwatch.hooks.backward import inside_backward
from gradwatch.hooks.closures import KeptClosure, why_not_again
from gradwatch.hooks.context import ForwardContext
from gradwatch.hooks.data_parallel import rank, several_ranks
from gradwatch.hooks.forwards import ForwardCall, KeptForwards
from gradwatch.hooks.holding import ModelReference
from gradwatch.measure.deferred import FloatOrDeferred, resolve
from gradwatch.measure.norms import FirstNonFinite, LateCheck, Origin, StepNorms, count_nonfinite
from gradwatch.measure.parameters import readable_part
from gradwatch.record.events import (
    FINITE_UNTIL,
    FINITE_UNTIL_REDUCED,
    LEFT_STALE,
    MADE_AFTER,
    MADE_BY_LOOP,
    NOT_ZEROED,
    SET_BY_LOOP,
    some_names,
)
from gradwatch.record.explanation import ExplainedKind, Explanation, Share
from gradwatch.step.bad_weights import BadWeights
from gradwatch.step.run import Run
from gradwatch.step.window import Window

T = TypeVar("T")

ALWAYS = 4
"""So many bad steps with the same culprit are explained; then the 8th, the 16th and so on."""

MOST_CULPRITS = 32
"""So many culprits are told apart: a run in which every step has another one must not crawl."""

MOST_REPLAYS = 8
"""The most micro-batches of a step that are run again, where one of several was bad."""

MOVED = (
    "The loop threw these gradients away, and the weights have moved before that was seen: the "
    "micro-batch cannot be run again as it was."
)
NO_CLOSURE = (
    "watcher.explain(closure) needs a function without arguments that returns the loss, a tensor "
    "of one element that was computed by the model, got {value}. Write "
    "watcher.explain(lambda: criterion(model(x), y))."
)
FAILED = "The explanation of this step failed: {error}"
REPLAY_FAILED = "The micro-batch could not be run again: {error}"
OTHER_RANK = (
    "This rank's own gradient was finite: it came with the reduction over the ranks. The "
    "explanation is that of the rank whose gradient was bad."
)
IN_BACKWARD = (
    "The optimizer steps inside of the backward, when weights from before and after the step are "
    "mixed: nothing can be run again then."
)
GIVE_A_FUNCTION = (
    "The loss is made outside of the model, and watcher.backward(loss) was given no more than the "
    "result. Write watcher.backward(lambda: criterion(model(x), y)), and the line in the loss is "
    "found too."
)
ONE_OF_SEVERAL = "It is only known that it was one of {count} micro-batches."
NOT_ALL = "Of these the newest {most} were run again."
SPOILED = (
    "{parameters} NaN or Inf before the backward. Look for what wrote to them last: the update of "
    "the step before, or the loop."
)
FROM_THE_START = "They were so in the first step already."
MADE_OUTSIDE = (
    "That input is not data: it was computed with a graph, by code outside of the forwards that "
    "are kept, which made it bad."
)
OF_A_BUFFER = (
    "It is a buffer, of which nothing is known from before the forward: if the forward itself has "
    'written it, look for what came first; on_nonfinite="explain" tells the two apart.'
)
OWN_EXAMPLES = (
    "The examples are those of rank {rank}, with their shares in its own gradient: another rank "
    "may have the larger ones."
)
LEFT = "It was " + LEFT_STALE + "." + NOT_ZEROED
MADE = "It was " + MADE_AFTER + "."
SET = "It appeared " + MADE_BY_LOOP + "." + SET_BY_LOOP


OUTSIDE = ("output_gradient", "not_found")
"""Origins that the forwards of the model alone do not explain."""


class _Found(NamedTuple):
    """An explanation, with the forwards of the micro-batch that it is about."""

    explanation: Explanation
    calls: Sequence[ForwardCall] = ()


class _Discarded(NamedTuple):
    """A window with bad gradients that the loop has thrown away, and nothing has explained yet."""

    optimizer: str
    step: int
    window: Window
    first: FirstNonFinite
    kind: ExplainedKind
    weights: list[int]  # their version counters
    scale: float  # the loss scale, if a scaler has left out the step; else 0


class Explaining:
    """Explains the bad steps of a run.

    Attributes:
        forwards: What is kept of the forwards of the windows under way.
    """

    def __init__(self, run: Run, model: ModelReference, forwards: KeptForwards) -> None:
        """Explains steps of a run; ``model`` is what was given to ``watch()``."""
        self.forwards = forwards
        self._run = run
        self._model = model
        self._counts: Counter[tuple[object, ...]] = Counter()
        self._newest: dict[str, Explanation] = {}  # by optimizer
        self._looked: dict[str, int] = {}  # the newest step that was looked at
        self._first_bad_taken = math.inf  # the first step that was taken with bad gradients
        self._bad_since: dict[int, int] = {}  # by index of a parameter
        self._discarded: _Discarded | None = None
        self._explained: set[int] = set()  # numbers of backwards
        self._scale = 1.0  # what the gradients of a replay are divided by

    def let_go(self) -> None:
        """Drops what a replay would need, as nothing can be run again any more."""
        self._discarded = self.forwards.on_forward = None
        self.forwards.let_go()

    def newest_of(self, optimizer: str) -> Explanation | None:
        """Returns the newest explanation of an optimizer's steps."""
        return self._newest.get(optimizer)

    def look_at(
        self,
        optimizer: str,
        step: int,
        window: Window,
        norms: StepNorms,
        found_inf: FloatOrDeferred = 0.0,
    ) -> None:
        """Explains a step if its gradients are not finite, or their norm is beyond float32.

        To be called when the norms of the step are known, and no weight has changed yet. It waits
        for a device.

        Args:
            optimizer: Its label.
            step: The number of the step.
            window: Its micro-batches.
            norms: The norms of the step.
            found_inf: Above 0 if a scaler has found an overflow; see :meth:`note_discarded`.
        """
        if self._discarded is not None:
            self._look_at_discarded()
        after, before = norms.after, norms.before
        finite = after.finite and (before is after or before.finite)
        overflowed = after.overflowed or before.overflowed
        if finite and not overflowed:
            return
        if found_inf != 0.0 and resolve(found_inf) > 0:
            self.note_discarded(optimizer, step, window, norms.loss_scale)
            return
        if self._looked.get(optimizer) == step:  # a closure is evaluated several times in a step
            return
        self._looked[optimizer] = step
        try:
            self._look_closer(optimizer, step, window, norms)
        except Exception as error:
            self._record(_Found(_failed(error)), optimizer, step)
        if not finite and self._run.options.on_nonfinite == "record":
            self._first_bad_taken = min(self._first_bad_taken, step)

    def note_discarded(
        self, optimizer: str, step: int, window: Window, scale: FloatOrDeferred = 0.0
    ) -> None:
        """Notes that nothing will use the gradients of a window, to explain bad ones.

        If that shows inside of the next backward, where nothing can be run again, it is done when
        that has ended, before the next step or forward.

        Args:
            optimizer: Its label.
            step: The number of the step that it would have been.
            window: Its micro-batches.
            scale: The loss scale, if a scaler has left out the step. An overflow of scaled
                gradients is no accident: only what is bad without the scale, too, is explained.
        """
        first = window.first_nonfinite
        # What was left from a bad step before does no harm, as it is thrown away in time.
        if first is None or first.origin in (Origin.AFTER, Origin.STALE):
            return
        if self._discarded is not None:
            return
        if not self._explained.isdisjoint(window.backwards):  # as a part of another optimizer's
            return
        kind: ExplainedKind = "nan" if first.is_nan else "inf"
        scale = float(resolve(scale))
        if not self._is_due(optimizer, kind, first.index, scale > 0):
            return
        versions = self._versions(window)
        self._discarded = _Discarded(optimizer, step, window.copy(), first, kind, versions, scale)
        if inside_backward():
            self.forwards.awaited = list(window.backwards)
            self.forwards.on_forward = self._look_at_discarded
        else:
            self._look_at_discarded()

    def _look_at_discarded(self) -> None:
        one = self._discarded
        if one is None or inside_backward():
            return
        try:
            self._scale = one.scale or 1.0
            if self._versions(one.window) == one.weights:
                found = self._nonfinite(one.first, one.kind, one.window)
            else:
                found = _Found(Explanation(origin="not_found", kind=one.kind, notes=(MOVED,)))
            scaled = one.scale > 0 and found.explanation.origin in ("not_found", "output_gradient")
            if not scaled:
                self._record(found, one.optimizer, one.step)
        except Exception as error:
            self._record(_Found(_failed(error)), one.optimizer, one.step)
        finally:
            self._discarded = self.forwards.on_forward = None
            self.forwards.awaited, self._scale = (), 1.0

    def _versions(self, window: Window) -> list[int]:
        return [self._run.table.tensors[index]._version for index in window.indices]

    def look_at_spike(self, optimizer: str, step: int, window: Window, norms: StepNorms) -> None:
        """Explains a step that ``skip_spikes`` leaves out; waits for a device."""
        if self._looked.get(optimizer) == step:  # its norm is beyond float32, too
            return
        try:
            if self._is_due(optimizer, "spike"):
                self._record(self._too_large("spike", window, norms), optimizer, step)
        except Exception as error:
            self._record(_Found(_failed(error, kind="spike")), optimizer, step)

    # -- what was bad ------------------------------------------------------------------------------

    def _look_closer(self, optimizer: str, step: int, window: Window, norms: StepNorms) -> None:
        first = _first_nonfinite(window, norms)
        clipped_to_nan = first is not None and first.origin is Origin.AFTER
        if first is None or (clipped_to_nan and norms.before.overflowed):
            if self._is_due(optimizer, "overflow"):
                self._record(self._too_large("overflow", window, norms), optimizer, step)
            return
        for index in first.weights:
            self._bad_since.setdefault(index, step)
        kind: ExplainedKind = "nan" if first.is_nan else "inf"
        if not self._is_due(optimizer, kind, first.index, first.origin, *first.weights[:1]):
            return
        self._explained.update(window.backwards)
        found = self._nonfinite(first, kind, window)
        self._record(found, optimizer, step)

    def _nonfinite(self, first: FirstNonFinite, kind: ExplainedKind, window: Window) -> _Found:
        if first.origin is Origin.WEIGHTS:
            return _Found(self._of_weights(first))
        unknown = Explanation(origin="not_found", kind=kind, micro_batch=first.micro_batch)
        note = self._why_not(first, window)
        if note:
            return _Found(replace(unknown, notes=(note,)))
        numbers = window.backwards[-len(window.arrivals) :] if window.arrivals else []
        if first.origin is not Origin.SEVERAL:
            place = first.micro_batch
            known = 0 < place <= len(numbers)
            found = self._replayed(numbers[place - 1]) if known else _Found(unknown)
            return self._at(found, place, kind)
        return self._one_of(numbers[: first.micro_batch], kind)

    def _why_not(self, first: FirstNonFinite, window: Window) -> str:
        """Returns why no replay can find the cause; empty if one may."""
        if len(window.arrivals) > len(window.backwards):
            return IN_BACKWARD
        if first.origin is Origin.STALE:
            return LEFT
        if first.origin is Origin.AFTER:
            if not first.micro_batch:
                return SET
            by_hand = self._run.replicas.by_hand
            return MADE + (FINITE_UNTIL_REDUCED if by_hand else FINITE_UNTIL)
        if first.rank is not None and first.rank != rank():
            return OTHER_RANK
        return ""

    def _one_of(self, numbers: Sequence[int], kind: ExplainedKind) -> _Found:
        """Runs the micro-batches of a step again until one shows where it went bad."""
        notes = [ONE_OF_SEVERAL.format(count=len(numbers))]
        if len(numbers) > MOST_REPLAYS:
            notes.append(NOT_ALL.format(most=MOST_REPLAYS))
        for place in range(len(numbers), 0, -1)[:MOST_REPLAYS]:
            found = self._replayed(numbers[place - 1])
            if found.explanation.origin != "not_found":
                return self._at(found, place, kind)
            notes += [one for one in found.explanation.notes if one not in notes]
        return _Found(Explanation(origin="not_found", kind=kind, notes=tuple(notes)))

    @staticmethod
    def _at(found: _Found, micro_batch: int, kind: ExplainedKind) -> _Found:
        changes: dict[str, Any] = {"micro_batch": micro_batch}
        if found.explanation.origin == "not_found":
            changes["kind"] = kind
        return found._replace(explanation=replace(found.explanation, **changes))

    def _replayed(self, number: int) -> _Found:
        """Runs the micro-batch of a backward again, and looks where it goes bad."""
        whole = self.forwards.closures.by_number.get(number)
        if whole is None or isinstance(whole, str):
            return self._with_hint(self._loop_again(self._forwards_again(number)))
        found = self._whole_again(whole, number)
        if found.explanation.origin != "not_found" or whole.alone:
            return found
        other = self._forwards_again(number)
        notes = dict.fromkeys((*found.explanation.notes, *other.explanation.notes))
        return other._replace(explanation=replace(other.explanation, notes=tuple(notes)))

    def _loop_again(self, found: _Found) -> _Found:
        """Runs the statements of the loop again that make the loss, if it went bad in there."""
        known = found.explanation
        # With a note the forwards are not what they were, and nor would the statements be.
        outside = known.origin == "output_gradient" and not known.notes
        if not outside or self._scale != 1.0 or self.forwards.of_framework:
            return found
        try:
            return self._of_loop(found)
        except Exception:  # code of any kind is looked at; without it less is known
            return found

    def _of_loop(self, found: _Found) -> _Found:
        from gradwatch.replay.loop import are_of, inputs_noted, losses_on_stack

        calls = found.calls
        model, before = self._model.or_nothing(), self._run.hooks.buffers.before_window()
        for loss in losses_on_stack(sys._getframe(), self._run.table.tensors):
            with inputs_noted(calls) as given:
                again = explain_closure(model, loss, context=calls[0].context, buffers=before)
            if again.origin not in OUTSIDE and are_of(calls, given):
                return found._replace(explanation=again)
        return found

    def _with_hint(self, found: _Found) -> _Found:
        given = self.forwards.closures.losses_given
        if found.explanation.origin != "output_gradient" or not given:
            return found
        notes = (*found.explanation.notes, GIVE_A_FUNCTION)
        return found._replace(explanation=replace(found.explanation, notes=notes))

    def _whole_again(self, whole: KeptClosure, number: int) -> _Found:
        """Runs a closure again, which makes the loss as well."""
        calls, _ = self.forwards.calls_of(number)
        model = self._model.module()
        if whole.args and model is not None:
            calls = [ForwardCall(model, whole.args, {}, [], whole.context)]
        scale = whole.factor()
        if whole.scaled and self._scale == 1.0:
            scale *= resolve(self._run.scale.value())
        before = self._run.hooks.buffers.before_window()
        found = explain_closure(
            self._model.or_nothing(), whole.bound(), scale, whole.context, before
        )
        return _Found(replace(found, notes=(*whole.notes(), *found.notes)), calls)

    def _forwards_again(self, number: int) -> _Found:
        """Runs the forwards of a micro-batch again, and the backward from where they ended."""
        calls, notes = self.forwards.calls_of(number)
        if not calls:
            return _Found(Explanation(origin="not_found", notes=tuple(notes)))
        if self._scale != 1.0:
            calls = [_divided(call, self._scale) for call in calls]
        # A call that was given what another one made bad, as a discriminator is by its generator,
        # would hide that: run again, each is given what it was given.
        rest = [call for call in calls if not _was_given_bad(call)]
        some = self._run_again(rest) if 0 < len(rest) < len(calls) else None
        found = self._run_again(calls) if some is None or some.origin == "not_found" else some
        if len(rest) < len(calls) and found is not some and found.origin == "input":
            notes.append(MADE_OUTSIDE)
        of_buffer = found.origin == "weights" and found.parameter not in self._run.table.names
        if of_buffer and not self._run.hooks.buffers.restores:
            notes.append(OF_A_BUFFER)
        return _Found(replace(found, notes=(*notes, *found.notes)), calls)

    def _run_again(self, calls: Sequence[ForwardCall]) -> Explanation:
        from gradwatch.replay.runs import run_calls

        before = self._run.hooks.buffers.before_window()
        return _explained(run_calls(self._model.or_nothing(), calls, before))

    def _of_weights(self, first: FirstNonFinite) -> Explanation:
        """Explains gradients of weights that were bad before: there is nothing to run again."""
        table, index = self._run.table, first.weights[0]
        weight = readable_part(table.tensors[index].detach())
        nan, inf = count_nonfinite(weight)
        names = [table.names[one] for one in first.weights]
        since = min(self._bad_since[one] for one in first.weights)
        notes = SPOILED.format(parameters=f"{some_names(names)} {'were' if names[1:] else 'was'}")
        return Explanation(
            origin="weights",
            kind="nan" if nan else "inf",
            micro_batch=first.micro_batch,
            module=table.modules[index],
            module_class=_class_of(self._model(), table.modules[index]),
            parameter=names[0],
            since_step=since,
            count=nan + inf,
            size=weight.numel(),
            result_shape=tuple(weight.shape),
            result_dtype=str(weight.dtype).removeprefix("torch."),
            notes=(notes, FROM_THE_START) if since == 1 else (notes,),
        )

    def _too_large(self, kind: ExplainedKind, window: Window, norms: StepNorms) -> _Found:
        """Names the parameters and the examples with the largest share in a gradient."""
        from gradwatch.replay.largest import largest_of_window
        from gradwatch.replay.runs import live_calls

        found = Explanation(
            origin="not_found",
            kind=kind,
            largest_parameters=self._largest_parameters(window, norms),
        )
        numbers = window.backwards[-len(window.arrivals) :] if window.arrivals else []
        given = [self.forwards.calls_of(number) for number in numbers]
        notes = tuple(dict.fromkeys(note for _, some in given for note in some))
        if not given or not all(calls for calls, _ in given):
            return _Found(replace(found, notes=notes))
        gradients = self._by_name(*window.gradients())
        largest = largest_of_window(
            [partial(live_calls, self._model.or_nothing(), calls) for calls, _ in given],
            gradients,
            resolve(norms.loss_scale),
        )
        place = largest.micro_batch if len(given) > 1 else 1
        calls = given[place - 1][0] if place else ()
        if kind == "overflow" and calls:
            elements = sum(one.numel() for one in gradients.values())
            begun = self._overflow(calls, elements)
            found = replace(begun, largest_parameters=found.largest_parameters)
        own = (OWN_EXAMPLES.format(rank=rank()),) if largest.shares and several_ranks() else ()
        explanation = replace(
            found,
            micro_batch=place,
            largest_examples=largest.shares,
            notes=(*found.notes, *notes, *largest.notes, *own),
        )
        return _Found(explanation, calls)

    def _overflow(self, calls: Sequence[ForwardCall], elements: int) -> Explanation:
        """Looks where finite gradients became too large."""
        from gradwatch.replay.overflow import explain_overflow

        try:
            return explain_overflow(self._model.or_nothing(), calls, elements)
        except Exception as error:  # the largest parameters and examples are known all the same
            note = REPLAY_FAILED.format(error=described_error(error))
            return Explanation(origin="not_found", kind="overflow", notes=(note,))

    def _largest_parameters(self, window: Window, norms: StepNorms) -> tuple[Share, ...]:
        from gradwatch.replay.largest import largest_by_norm, largest_parameters

        before, to_true_units = norms.before, resolve(norms.correction) / resolve(norms.unit_before)
        if window.norm_type == 2.0:
            # Those that are recorded: before the user's clip, and of all ranks.
            values = before.norms.array().astype(float) * to_true_units
            found = largest_by_norm(self._by_name(before.indices, values.tolist()))
            if found or window.shards is not None:
                return found
        return largest_parameters(self._by_name(*window.gradients()), 1.0 / to_true_units)

    def _by_name(self, indices: Sequence[int], values: Sequence[T]) -> dict[str, T]:
        names = self._run.table.names
        return {names[i]: value for i, value in zip(indices, values, strict=True)}

    # -- when, and where to ------------------------------------------------------------------------

    def _is_due(self, *culprit: object) -> bool:
        """Counts a bad step, and returns whether it is explained."""
        if len(self._counts) >= MOST_CULPRITS and culprit not in self._counts:
            culprit = ()
        self._counts[culprit] += 1
        count = self._counts[culprit]
        return count <= ALWAYS or count & (count - 1) == 0

    def _record(self, found: _Found, optimizer: str, step: int) -> None:
        run = self._run
        explanation = replace(found.explanation, optimizer=optimizer, step=step, rank=rank())
        if explanation.origin == "weights":
            explanation = replace(explanation, advice=self._advice(explanation))
        self._newest[optimizer] = explanation
        try:
            kept = found.calls if run.options.keep_batches else ()
            run.explain(explanation, kept, labeled=run.joint_steps.several)
            logger.warning("%s", explanation)
        except Exception as error:  # evidence is never worth a training
            logger.warning("gradwatch: %s", FAILED.format(error=described_error(error)))

    def _advice(self, explanation: Explanation) -> str:
        from gradwatch.replay.advice import advice_for

        # Those of a bad step are only there after it.
        bad_since = explanation.since_step or explanation.step
        return advice_for(explanation, by_update=bad_since <= self._first_bad_taken)


def explain_closure(
    model: nn.Module | Mapping[str, Tensor],
    closure: Callable[[], Any],
    scale: float = 1.0,
    context: ForwardContext | None = None,
    buffers: Mapping[int, Tensor] | None = None,
    asked: bool = False,
) -> Explanation:
    """Runs a closure that returns the loss, and says where its gradients go bad.

    Args:
        model: What is watched.
        closure: The closure. One that takes data from an iterator is not run.
        scale: The gradient of the loss from which its backward starts.
        context: What to run it in; None for how things are now.
        buffers: What buffers held before; see :func:`gradwatch.replay.runs.run_closure`.
        asked: Whether the user has asked for it, and is to hear of a mistake.

    Raises:
        NoLossError: If it returns no loss, and the user has asked.
    """
    refused = why_not_again(closure)
    if refused:
        return Explanation(origin="not_found", notes=(refused,))
    from gradwatch.replay.runs import run_closure

    return _explained(run_closure(model, closure, scale, context, buffers), asked)


def explain_asked(
    model: nn.Module | Mapping[str, Tensor], closure: Callable[[], Tensor]
) -> Explanation:
    """Explains a closure that the user has given; see :meth:`gradwatch.watcher.Watcher.explain`.

    Raises:
        TypeError: If it is not callable, or returns no loss.
    """
    if not callable(closure):
        raise TypeError(NO_CLOSURE.format(value=described(closure)))
    from gradwatch.replay.stand_ins import NoLossError  # few runs need it

    returned = _Returned()
    try:
        found = explain_closure(model, partial(_noted, closure, returned), asked=True)
    except NoLossError:
        raise TypeError(NO_CLOSURE.format(value=returned.described())) from None
    if not returned.may_be_loss():
        raise TypeError(NO_CLOSURE.format(value=returned.described()))
    return found


class _Returned:
    """What a closure has returned. No list, for a replay puts back what is in lists."""

    def __init__(self) -> None:
        self.value: object = None

    def may_be_loss(self) -> bool:
        # None also if it raised, or if it called the backward itself.
        value = self.value
        return value is None or (isinstance(value, Tensor) and value.numel() == 1)

    def described(self) -> str:
        value = self.value
        if isinstance(value, Tensor):
            grad = "" if value.requires_grad else " that requires no gradient"
            return f"one that returned a tensor of shape {list(value.shape)}{grad}"
        return f"one that returned {described(value)}"


def _noted(closure: Callable[[], Tensor], returned: _Returned) -> Tensor:
    loss = closure()
    returned.value = loss
    return loss


def _explained(run: Callable[[Any], list[str]], asked: bool = False) -> Explanation:
    """Explains a run; one that the user has asked for need not be bad."""
    from gradwatch.replay.search import explain_run
    from gradwatch.replay.stand_ins import NoLossError, ReplayError

    try:
        return explain_run(run, known_bad=not asked)
    except ReplayError as error:
        if asked and isinstance(error, NoLossError):
            raise
        return Explanation(origin="not_found", notes=(str(error),))
    except Exception as error:  # out of memory is one too
        failed = REPLAY_FAILED.format(error=described_error(error))
        return Explanation(origin="not_found", notes=(failed,))


def _was_given_bad(call: ForwardCall) -> bool:
    """Returns whether an argument was computed with a graph, and is NaN or Inf."""
    leaves = tree_leaves((call.args, dict(call.kwargs)))
    computed = [one for one in leaves if isinstance(one, Tensor) and one.grad_fn is not None]
    return any(any(count_nonfinite(one.detach())) for one in computed)


@torch.no_grad()
def _divided(call: ForwardCall, scale: float) -> ForwardCall:
    return replace(call, gradients=[[one / scale for one in some] for some in call.gradients])


def _failed(error: Exception, kind: ExplainedKind = "nan") -> Explanation:
    note = FAILED.format(error=described_error(error))
    return Explanation(origin="not_found", kind=kind, notes=(note,))


def _first_nonfinite(window: Window, norms: StepNorms) -> FirstNonFinite | None:
    """Returns the first gradient that was not finite; None if only a norm was beyond float32."""
    known = norms.before.total.at_hand and not window.late_checks
    if window.first_nonfinite is not None or known:
        return window.first_nonfinite
    count = window.backward_count
    checks = [*window.late_checks, LateCheck(count, norms.before, (), Origin.among(count))]
    bad = [found[0] for check in checks if (found := check.nonfinite(None))]
    if not bad:
        return None
    _, gradients = window.gradients()
    # On an accelerator a norm beyond float32 is not told from an Inf until now.
    if not math.isnan(bad[0].norm) and not any(any(count_nonfinite(one)) for one in gradients):
        return None
    return bad[0] if window.bad_weights is None else _with_weights(bad[0], window.bad_weights)


def _with_weights(first: FirstNonFinite, bad_weights: BadWeights) -> FirstNonFinite:
    if first.origin is Origin.AFTER or inside_backward():
        return first
    weights = bad_weights.with_nan(bad_weights.measured())
    return replace(first, origin=Origin.WEIGHTS, weights=weights) if weights else first


def _class_of(model: object, module: str) -> str:
    try:
        return type(model.get_submodule(module)).__name__ if isinstance(model, nn.Module) else ""
    except AttributeError:  # a name without the prefixes of wrappers
        return ""
