"""watch() and Watcher, from attaching the hooks to closing the sinks."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from functools import partial
from itertools import repeat
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gradwatch import lifetime
from gradwatch.accumulate.noise_scale import NoiseScale
from gradwatch.accumulate.policies import check_noise_scale_exists
from gradwatch.checks import described
from gradwatch.clip.policy import ClipPolicy
from gradwatch.copied import parts_of_copy, refuse_copy
from gradwatch.errors import described_error, is_of_device, logger, warn_safely
from gradwatch.guard import UNTOUCHED, Overhead, Shield
from gradwatch.hessian.every import CurvatureEvery, sampler_of
from gradwatch.history import History
from gradwatch.hooks.backward import Backward, FirstBackward, expect_no_first
from gradwatch.hooks.context import REPLAY, is_replaying
from gradwatch.hooks.data_parallel import DataParallel, GradientSync, rank, wrappers_of
from gradwatch.hooks.engines import engines_of
from gradwatch.hooks.exchange import OTHERS_WAIT, Exchange
from gradwatch.hooks.holding import HeldByModel, Model, ModelReference, call_when_gone
from gradwatch.hooks.model import ModelHooks
from gradwatch.hooks.optimizer import stepped_by
from gradwatch.managed import BatchRunner, Closure, ManagedLoop
from gradwatch.measure.parameters import ParameterTable
from gradwatch.options import (
    Accumulate,
    Optimizers,
    Options,
    check_unwatched,
    optimizer_list,
    optimizer_names,
    parameter_table,
)
from gradwatch.pickles import stable_name
from gradwatch.record.events import loop_event
from gradwatch.record.folder.models import ModelFolder
from gradwatch.record.folder.writer import RunFolder
from gradwatch.record.recorder import ComingStep
from gradwatch.record.records import Event, Sink, StepRecord
from gradwatch.record.sink_queue import introduce
from gradwatch.record.wording import counted
from gradwatch.step.registry import OptimizerRegistry
from gradwatch.step.run import Run
from gradwatch.step.taken import StepTaken

if TYPE_CHECKING:
    from gradwatch.hooks.forwards import KeptForwards
    from gradwatch.record.explanation import Explanation
    from gradwatch.report.report import Report
    from gradwatch.report.thresholds import Thresholds


STATE_VERSION = 3

SUMMARY = "gradwatch: the run has ended with findings ({found}). See {asked}."
SUMMARY_STEPS = 20  # in a shorter run most rules of the report find nothing

BEFORE_ENTERED = (
    "A backward of the watched model came before the watcher was entered, so it was not recorded: "
    "write the loop inside of with gradwatch.watch(...) as watcher: or call watcher.attach() "
    "before it and watcher.close() after it."
)
ATTACHED_BEFORE = (
    "This watcher was attached before and holds the history of that run. Make a new one with "
    "watch(...), and give it load_state_dict() of the old one to go on counting."
)

_STATES = {"new": "not entered", "forked": "in a fork"}

NEVER_ENTERED = (
    "Nothing was recorded, for the watcher was never entered: write the loop inside of "
    "with gradwatch.watch(...) as watcher: or call watcher.attach() before it and watcher.close() "
    "after it."
)


@stable_name
class Watcher:
    """Watches one run: made by :func:`watch`, attached by its ``with`` block.

    It can be pickled and deep-copied, also while it is attached. The copy holds the record: the
    newest ``buffer_size`` steps, the events, the noise scale, the state. It watches nothing, and
    :meth:`attach`, :meth:`backward` and :meth:`step` of it raise.

    Attributes:
        global_step: Called at the end of a step; returns its position on the x-axis of loggers. An
            adapter sets it to return the framework's own count. None counts optimizer steps.
        tells_findings: Whether a line is logged at the end of a run with findings.
        label: The name of the model among those of :func:`gradwatch.watch_all`; else empty.
    """

    label = ""
    tells_findings = True
    _state = "new"  # here, as __del__ also follows an __init__ that raised
    _is_copy = False

    def __init__(
        self,
        model: nn.Module | Mapping[str, Tensor],
        table: ParameterTable,
        optimizers: Sequence[Optimizer],
        options: Options,
        names: Sequence[str] = (),
        model_of: Callable[[], Model | None] | None = None,
        forwards: KeptForwards | None = None,
    ) -> None:
        """Starts with checked arguments; use :func:`watch`.

        ``names`` are those that the user gave to the optimizers, in the same order; empty for none.
        For ``model_of`` and ``forwards`` see :func:`build_watcher`.
        """
        self.global_step: Callable[[], int] | None = None
        self._options = options
        self._model = ModelReference(model, model_of)
        self._kind = type(model).__name__
        self._holds = model_of is None
        self._held = list(optimizers) if self._holds else []
        self._optimizers = list(map(weakref.ref, optimizers))
        self._names = list(names)
        self._is_over = False
        this = weakref.ref(self)
        wrappers = wrappers_of(model)
        # Neither of the two functions keeps the watcher: torch would keep it for ever.
        on_backward, on_arrived = partial(_on_backward, this), partial(_on_arrived, this)
        self._hooks = ModelHooks(self._model, table, on_backward, on_arrived, wrappers)
        ranks = DataParallel.of(model, wrappers)
        self._run = Run(table, options, self._hooks, ranks, self._global_step_of)
        self._run.tells_foreign = self._holds
        if options.explain:
            from gradwatch.hooks.forwards import KeptForwards  # few runs need them
            from gradwatch.step.explaining import Explaining

            forwards = forwards or KeptForwards(self._model)
            self._run.explaining = Explaining(self._run, self._model, forwards)
        check_noise_scale_exists(options.accumulate, single_process=ranks is None)
        # No loop of a model that is not held is managed, so nothing of it is held back.
        self._sync = GradientSync.of(model, self._run.data_parallel) if self._holds else None
        self._exchange = self._make_exchange()
        self._shield = Shield(options.acts, self._give_up, self._run.stopwatch)
        self._curvature = sampler_of(options.curvature, model)
        self._registry = OptimizerRegistry(self._run, self._shield, self._curvature)
        managed = self._registry.managed
        self._managed = ManagedLoop(self._run, self._sync, managed)
        self._batches = BatchRunner(self._run, self._managed, self._model, managed)
        self._holder: HeldByModel | None = None
        self._parts: Sequence[weakref.ref[nn.Module]] = ()
        if not self._holds:
            if ranks is not None:
                ranks.wrappers.clear()
            parts = model.modules() if isinstance(model, nn.Module) else ()
            call = partial(_note_gone, this)
            self._parts, self._registry.on_gone = call_when_gone(list(parts), call), call
        run = weakref.ref(self._run)
        FirstBackward(table.tensors, lambda: _tell_not_entered(run()))

    def __repr__(self) -> str:
        # Reads only, and works at any time: records that are still held back are not made for it.
        if self._is_copy:
            return f"Watcher(a copy with {len(self._run.recorder.batch().steps)} steps)"
        followed = [f"{one.label} at step {one.step}" for one in self._registry.followed]
        parameters = len(self._run.table)
        return (
            f"Watcher({self._kind} of {parameters} parameter{'s' * (parameters != 1)}, "
            f"{', '.join(followed) or 'no optimizer yet'}, {_STATES.get(self._state, self._state)})"
        )

    def described(self) -> str:
        """Says in a few words what is watched: ``"2 parameters (9 elements), Adam"``.

        Where not all of them train: ``"4 parameters, 2 of them trained (9 elements), Adam"``.
        """
        table, followed = self._run.table, self._registry.followed
        trained = {
            index
            for one in followed
            for index in one.window.indices
            if table.is_gone or table.tensors[index].requires_grad
        }
        some = 0 < len(trained) < len(table)
        elements = counted(
            sum(map(table.elements, trained if some else range(len(table)))), "element"
        )
        of_them = f", {len(trained):,} of them trained" * some
        what = f"{counted(len(table), 'parameter')}{of_them} ({elements})"
        return ", ".join([what, *(one.label for one in followed)])

    # -- life ----------------------------------------------------------------------------------

    def attach(self) -> Watcher:
        """Registers the hooks on parameters and optimizers; entering ``with`` calls it.

        Returns:
            The watcher.

        Raises:
            RuntimeError: If another watcher is attached to the model, this one was before, or it is
                a copy; if the parameters are sharded, and another rank does not begin to watch too,
                or with other options.
        """
        if self._is_copy:
            refuse_copy()
        if self._state != "new":
            raise RuntimeError(ATTACHED_BEFORE)
        check_unwatched(self._run.table)
        expect_no_first(self._run.table.tensors)
        if self._exchange is not None:
            self._exchange.open()
        self._state = "attached"
        lifetime.opened(self)
        self._run.stopwatch.start()
        there = [one for reference in self._optimizers if (one := reference()) is not None]
        self._registry.attach(there, self._names, finds_more=not self._holds)
        for text in engines_of(self._run.table.tensors):
            self._run.tell(loop_event("changed", text, 1))
        if self._sync is not None:
            self._sync.before_forwards(self._model(), self._before_forward)
        if self._holds:
            # Who keeps the model need not keep the watcher.
            self._holder = HeldByModel(self._model.or_nothing(), self)
        for sink in self._options.sinks:
            introduce(sink, self)
        return self

    def follow(self, optimizer: Optimizer) -> None:
        """Follows one more optimizer of the watched parameters, before its first step.

        Optimizers that step parameters of the named ones are found without it.

        Args:
            optimizer: Holds no parameter that is not watched.

        Raises:
            TypeError: If it is not an optimizer.
            ValueError: If it holds parameters that are not watched.
        """
        self._registry.follow_model()  # it may have been moved, and the optimizer built after that
        for one in optimizer_list(optimizer, self._run.table):
            self._registry.follow(one)

    def is_following(self, optimizer: Optimizer) -> bool:
        """Returns whether the steps of an optimizer are recorded."""
        return any(one.has(optimizer) for one in self._registry.followed)

    def look_again(self, optimizer: Optimizer) -> None:
        """Has it looked at once which of the watched parameters an optimizer holds now."""
        for one in self._registry.followed:
            if one.has(optimizer):
                one.forget_groups()

    def hand_over(self) -> None:
        """Leaves the step under way, and what has changed in the model, to another watcher."""
        self._run.tells_changes = False
        self._registry.leave_windows()

    @property
    def is_over(self) -> bool:
        """Whether the program has dropped the model and its optimizers.

        Nothing of them is held then, and no hook is left. The records stay readable;
        :meth:`close` delivers those that are outstanding. Always False for :func:`watch`, which
        keeps what it was given until it is closed.
        """
        return self._is_over

    def on_first_step(self, call: Callable[[], None]) -> None:
        """Has a function called once an optimizer has taken a step, or was stopped in it.

        It must not raise. Nothing has been written to a run folder then, or to late sinks.
        """
        self._run.on_first_step.insert(0, call)

    def on_each_step(self, call: Callable[[ComingStep], None] | None) -> None:
        """Has a function called with each step of an optimizer when it is over, in order.

        To be used by an adapter that logs numbers as they arrive from a device: reading
        :attr:`last` would wait for them. On a CPU they are there at once.

        Args:
            call: Must be quick and must not raise. Backwards that no optimizer steps are not told.
                None to have nothing called any more.
        """
        self._run.recorder.on_step = call

    def move_folder(self, path: str) -> None:
        """Names another run folder, for a watcher with ``model_of`` that was given one.

        To be called from a function that was given to :meth:`on_first_step`.

        Args:
            path: Where the run is kept.
        """
        self._run.move_folder(path)

    def leave_windows(self, accumulates: bool) -> None:
        """Lets a framework decide when to communicate and when to step.

        To be called by an adapter, before :meth:`attach`. Every step then counts with the
        micro-batches it has, no flag of the model is touched, and :attr:`accumulate` is only what
        the policy asks for: the adapter passes it on to the framework.

        Args:
            accumulates: Whether the framework accumulates micro-batches. If so, the contribution of
                each one is measured for the noise scale.
        """
        self._run.accumulation.checked = False
        self._run.accumulation.by_framework = accumulates
        self._managed.after_other_backward()

    def note_loss(self, loss: Tensor, divisor: float | None) -> None:
        """Notes the loss of the backward that has just ended.

        To be called by an adapter whose framework runs the backwards. The column ``loss`` of a step
        is the mean over the losses that were noted in its window.

        Args:
            loss: Tensor ``[]``, as its backward was run: times the loss scale.
            divisor: What the framework has divided it by. None if user code may have done so: then
                only the loss of a step with one backward is recorded.
        """
        if self._state == "attached":
            with self._shield:
                self._registry.note_loss(loss, divisor)

    def note_micro_batch(
        self,
        replay: Callable[..., Tensor] | None,
        *args: Any,
        divisor: float = 1.0,
        reason: str = "",
    ) -> None:
        """Says how the micro-batch that is about to begin can be run again, with its loss.

        To be called by an adapter whose framework computes the loss, each time before it does so.
        Without ``explain=True`` it does nothing. If the gradients of the micro-batch are bad,
        ``replay(*args)`` is called before the step, with the random state of now. What it changes
        is put back where the model, ``args``, or variables of ``replay`` lead to it. What else it
        would do twice (log, count, communicate) it must leave out itself.

        Args:
            replay: Returns the loss as the framework's user wrote it, a tensor of one element; None
                if the micro-batch cannot be run again whole.
            args: What it is called with: the batch. They are held until the step.
            divisor: What the framework divides the loss by before the backward.
            reason: Why not even the modules inside of the model can be run again; empty if they
                can. A sentence.
        """
        if self._state != "attached" or self._run.explaining is None:
            return
        # Not inside of the shield, where no gradients are recorded: that would be noted, too.
        self._run.explaining.forwards.note_whole(replay, args, divisor, reason)

    def close(self) -> None:
        """Removes every hook, delivers outstanding records to the sinks and closes these.

        The history stays readable; the model and the optimizers are kept alive no longer. Leaving
        the ``with`` block calls it, and so does the exit of the interpreter; a second call does
        nothing. Whatever fails, every sink is closed. Numbers that can no longer be read, after an
        error of the device, are a warning.

        Raises:
            Exception: If gradwatch acts (clips, skips, accumulates) and ending that fails.
        """
        if self._state == "closed" or self._is_copy:
            return
        self._state = "closed"
        lifetime.closed(self)
        try:
            # Last in, first out; one that fails keeps none of the others from running.
            with ExitStack() as ending:
                ending.callback(self._summarize)
                ending.callback(self._let_go)
                ending.callback(self._run.recorder.close)
                ending.callback(self._run.stopwatch.stop)
                ending.callback(self._registry.end)
                ending.callback(self._end_watching)
        except Exception as error:
            # The loop's own error is in flight if the device has failed, and says more.
            if self._options.acts and not is_of_device(error):
                raise
            warn_safely(lifetime.NOT_ENDED.format(error=described_error(error)))

    def disown(self) -> None:
        """Leaves the sinks to the process that this one was forked from; called in each fork."""
        self._state = "forked"
        self._run.recorder.disown()
        self._run.on_first_step.clear()

    def __del__(self) -> None:
        # An attached watcher lives as long as the model: this is the end of both.
        if self._state == "attached":
            self._registry.end_discovery()  # it may come inside of any step
            lifetime.close_quietly(self)

    # -- copies: pickle, copy, torch.save --------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        # Reads only: held backwards stay held, and nothing is delivered.
        recorder = self._run.recorder
        return {
            "entered": self._state != "new",
            "batch": recorder.batch(),
            "explanations": tuple(self._run.explanations),
            "newest": recorder.newest,
            "skipped": recorder.skipped,
            "noise_scale": self.noise_scale,
            "overhead": self.overhead,
            "state": self._state_now(),
            "accumulate": self.accumulate,
        }

    def __setstate__(self, kept: dict[str, Any]) -> None:
        self.global_step = None
        self._is_copy = True
        self._state = "closed" if kept.pop("entered") else "new"
        vars(self).update(parts_of_copy(**kept))

    def __enter__(self) -> Watcher:
        return self.attach()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # -- a loop that leaves backward and step to gradwatch ---------------------------------------

    def backward(
        self, loss: Tensor | Callable[[], Tensor], weight: float | Tensor | None = None
    ) -> None:
        """Runs the backward of one micro-batch.

        The gradient of a window is the mean over its micro-batches, weighted where weights are
        given, and over those of all ranks: the loss must be a mean over the micro-batch, and a
        weight the number of its examples or tokens. Of the micro-batches of a window only the last
        one communicates its gradients.

        Args:
            loss: Tensor ``[]``; neither divided by the number of micro-batches nor scaled. Or a
                function without arguments that returns it, which is called at once:
                ``watcher.backward(lambda: criterion(model(x), y))``. With
                ``on_nonfinite="explain"`` the function is called again if the gradients are bad,
                and the line in it is found; of a loss only the model's part is run again.
            weight: Weight of the micro-batch, at least 0: a number, or a tensor ``[]`` on any
                device. If left out, all micro-batches weigh the same; inside :meth:`micro_batches`
                each weighs its number of examples.

        Raises:
            RuntimeError: If no optimizer was named.
            AccumulationError: If the window is full already.
            TypeError: If loss or weight is of another type.
            ValueError: If it is negative or not finite.
        """
        self._managed.backward(loss, weight)

    def step(self, last: bool = False) -> bool | StepTaken:
        """Steps when the window is full: unscales, measures, clips, steps and zeroes.

        Args:
            last: Whether to step even if the window is not full. The gradient is then the mean over
                the micro-batches that it has.

        Returns:
            True if the optimizer stepped; False if the window is not full yet, or the step was
            skipped. Where a fused optimizer decides on an accelerator whether to skip, the host
            does not know yet. Then this is an object that stands for the bool, and waits for the
            device when it is looked at: in a condition, a comparison, a sum or a text. ``bool()``
            makes a plain one of it.

        Raises:
            NonFiniteGradientError: If asked for by ``on_nonfinite="raise"``.
        """
        return self._managed.step(last)

    def micro_batches(self, batch: Any, size: int) -> Iterator[Any]:
        """Splits a batch that does not fit into memory into micro-batches of one step.

        Their sizes differ by one example at most. Inside the loop, :meth:`backward` weighs each by
        its number of examples, so that the gradient is that of the whole batch. If a loss is a mean
        over tokens, pass their number as its weight.

        Args:
            batch: A tensor, or tuples, lists and mappings of tensors, with the examples in
                dimension 0.
            size: The most examples that a micro-batch may have.

        Returns:
            An iterator over the micro-batches, in the structure of the batch.

        Raises:
            RuntimeError: If no optimizer was named.
            TypeError: If the batch cannot be split, or the size is no integer.
            ValueError: If its lengths differ, it is empty, or the size is below 1.

        Example:
            >>> model = torch.nn.Linear(4, 1)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> with watch(model, optimizer) as watcher:
            ...     for inputs, targets in watcher.micro_batches(
            ...         (torch.ones(10, 4), torch.zeros(10, 1)), size=4
            ...     ):
            ...         watcher.backward((model(inputs) - targets).square().mean())
            ...     stepped = watcher.step()
            >>> watcher.last.micro_batches, watcher.last.weight
            (3, 10.0)
        """
        return self._managed.micro_batches(batch, size)

    def run_batch(self, closure: Closure, batch: Any) -> Tensor:
        """Runs forward and backward of a batch, in micro-batches that fit into memory.

        When memory runs out, everything that the batch has changed so far is restored (gradients,
        buffers, random number generators), the micro-batch size is halved and the same batch is run
        again. The step has the gradient that it would have had, and the size that fits is kept from
        then on. If one rank must do so, all ranks do; under FSDP2 the error is raised instead. Call
        :meth:`step` after it.

        Args:
            closure: Called with a micro-batch in the structure of the batch. Returns its mean loss,
                or a pair of that loss and a weight, such as its number of tokens.
            batch: As for :meth:`micro_batches`.

        Returns:
            The mean loss of the batch, detached: tensor ``[]``.

        Raises:
            RuntimeError: If no optimizer was named; the out-of-memory error itself if not even one
                example fits.
            TypeError: If the batch cannot be split, or the closure returns something else.
        """
        return self._batches.run(closure, batch)

    def explain(self, closure: Callable[[], Tensor]) -> Explanation:
        """Says where the gradients of a loss go bad, to the line of code.

        The closure is run again under observation, and the backward of what it returns. It can be
        called at any time, also outside of the ``with`` block. Nothing of it stays: weights,
        gradients, buffers and random states are afterwards what they were, and so is what the
        closure writes to its variables; not so what it writes to a file or a logger. A closure may
        call ``backward()`` itself. One that takes its data from an iterator is not run.

        Args:
            closure: Returns the loss, a tensor of one element.

        Returns:
            The explanation, which is also the newest of :attr:`explanations`. Its step is the one
            under way; the one that has just ended, if no backward has come since (nor a forward,
            with ``explain=True``). If the closure raises, its origin is ``"not_found"`` and a note
            says why.

        Raises:
            TypeError: If the closure is not callable, or returns something else.

        Example:
            >>> model = torch.nn.Linear(2, 1)
            >>> x = torch.zeros(3, 2)
            >>> found = watch(model).explain(lambda: (model(x) / x.norm()).sum())
            >>> found.operation, found.source
            ('div', '>>> found = watch(model).explain(lambda: (model(x) / x.norm()).sum())')
        """
        if self._is_copy:
            refuse_copy()
        from gradwatch.step.explaining import explain_asked  # few runs need it

        found = explain_asked(self._model.or_nothing(), closure)
        label, step = self._registry.step_asked_for()
        found = replace(found, step=step, optimizer=label, rank=rank())
        self._run.explain(found, labeled=len(self._registry.followed) > 1)
        return found

    @property
    def micro_batch_size(self) -> int | None:
        """The most examples that :meth:`run_batch` runs at once; None for the whole batch."""
        return self._batches.size

    @property
    def accumulate(self) -> int:
        """Micro-batches of the window under way, as ``watch(accumulate=)`` decides."""
        return self._run.accumulation.micro_batches

    # -- what is there to read -------------------------------------------------------------------

    @property
    def folder(self) -> Path | None:
        """The run folder, once this process has written to it; None before, and without one."""
        return self._run.folder if self._run.has_written else None

    @property
    def history(self) -> History:
        """The newest ``buffer_size`` steps and the events, as pandas frames."""
        return History(self._run.recorder.batch, self._run.explanations)

    @property
    def events(self) -> list[Event]:
        """What happened so far, oldest first: the first 1,000 and the newest 9,000."""
        self._expect_entered()
        return list(self._run.recorder.events())

    @property
    def explanations(self) -> list[Explanation]:
        """Where the gradients of bad steps came from, newest last: the newest 100.

        ``watch(on_nonfinite="explain")`` makes them, and so does ``explain=True``. Of steps in a
        row with the same culprit the first four are explained, then the 8th, the 16th and so on. A
        step that a ``GradScaler`` skips, as it searches for its scale, is no accident and is not
        explained.
        """
        return list(self._run.explanations)

    @property
    def last(self) -> StepRecord | None:
        """The newest complete step; None before the first."""
        self._expect_entered()
        return self._run.recorder.last

    @property
    def noise_scale(self) -> NoiseScale:
        """The gradient noise scale of the first optimizer, and the micro-batches it suggests.

        Waits for numbers that are still on the device. If there is no noise scale, ``reason`` says
        why.
        """
        self._run.recorder.receive(wait=True)
        return self._registry.noise_scale()

    def report(self, thresholds: Thresholds | None = None, **changes: float) -> Report:
        """Says what the run shows so far; see :meth:`gradwatch.History.report`."""
        self._expect_entered()
        report = self.history.report(thresholds, **changes)
        return replace(report, remarks=(NEVER_ENTERED,)) if self._state == "new" else report

    def postfix(self) -> dict[str, str]:
        """Returns short texts for a progress bar: ``bar.set_postfix(watcher.postfix())``.

        Never waits for the device: on an accelerator the texts may be a step or two old.

        Returns:
            ``grad_norm``, then ``clip_coef`` if the step was clipped, ``nonfinite`` (number of
            parameters) and ``skipped`` (steps so far) if they are above 0. Empty before the first
            step.

        Example:
            >>> x = torch.tensor(2.0, requires_grad=True)
            >>> optimizer = torch.optim.SGD([x], lr=0.1)
            >>> with watch({"x": x}, optimizer, clip=3.5) as watcher:
            ...     (x**2 + 3 * x + 1).backward()
            ...     optimizer.step()
            >>> watcher.postfix()
            {'grad_norm': '7', 'clip_coef': '0.5'}
        """
        recorder = self._run.recorder
        record = recorder.newest
        if record is None:
            return {}
        texts = {"grad_norm": f"{record.grad_norm:.3g}"}
        if record.clipped:
            texts["clip_coef"] = f"{record.clip_coef:.2g}"
        if record.nonfinite_parameters:
            texts["nonfinite"] = str(record.nonfinite_parameters)
        if recorder.skipped:
            texts["skipped"] = str(recorder.skipped)
        return texts

    @property
    def overhead(self) -> Overhead:
        """The time that gradwatch has taken so far: seconds, and their share of the wall time."""
        return self._run.stopwatch.read()

    def flush(self) -> None:
        """Delivers outstanding records to the sinks now, rather than with the next batch."""
        self._registry.commit_backwards()
        self._run.recorder.flush()

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs to go on, as plain numbers, strings and lists.

        Returns:
            Steps per optimizer, the state of the policies, the noise scale, and the progress of the
            current window; neither the history nor gradients. Outstanding records are delivered to
            the sinks, so that a run folder is never behind the checkpoint.
        """
        self.flush()
        return self._state_now()

    def _state_now(self) -> dict[str, Any]:
        return {
            "version": STATE_VERSION,
            **self._registry.state_dict(),
            "accumulation": self._run.accumulation.state_dict(),
            "managed": self._managed.state_dict(),
            "micro_batch_size": self._batches.size,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a state; may be called before or after attaching.

        A state that was saved in the middle of a window holds its progress, but not its gradients:
        the window starts again, and an event and a warning say what was lost.

        Args:
            state: What :meth:`state_dict` returned.

        Raises:
            TypeError: If the state is no mapping.
            ValueError: If another version of gradwatch saved it.
        """
        if not isinstance(state, Mapping):
            raise TypeError(
                f"load_state_dict() takes what state_dict() returned, got {described(state)}."
            )
        if state.get("version") != STATE_VERSION:
            raise ValueError(
                f"load_state_dict() got a state of version {state.get('version')!r}, this "
                f"gradwatch reads version {STATE_VERSION}. Pass what Watcher.state_dict() returned."
            )
        self._registry.load_state_dict(state)
        self._run.accumulation.load_state_dict(state["accumulation"])
        self._managed.load_state_dict(state["managed"])
        self._batches.size = state["micro_batch_size"]

    def _expect_entered(self) -> None:
        if self._state == "new" and not self._is_copy and BEFORE_ENTERED not in self._run.told:
            warn_safely(f"gradwatch: {NEVER_ENTERED}")

    def _global_step_of(self, step: int) -> int:
        return step if self.global_step is None else self.global_step()

    def _summarize(self) -> None:
        """Logs one line at the end of a run with findings."""
        recorder = self._run.recorder
        if not self.tells_findings or self._run.on_first_step:  # not stepped, so not shown
            return
        worth = len(recorder) >= SUMMARY_STEPS or recorder.spoken or self._run.told
        if rank() != 0 or not worth or not logger.isEnabledFor(logging.WARNING):
            return
        try:
            report = self.history.report()
        except Exception:  # what could not be reported must not end a training that went well
            return
        found = [f"{one.severity} {one.kind}" for one in report if one.severity != "note"]
        if found:
            where = f"gradwatch report {self._run.folder}"
            asked = "watcher.report()" if self._options.run_dir is None else where
            logger.warning(SUMMARY.format(found=", ".join(dict.fromkeys(found)), asked=asked))

    def _stop_watching(self) -> None:
        self._registry.detach()
        if self._sync is not None:
            self._sync.detach()

    def _let_go(self) -> None:
        """Drops everything of the program's; what is known of it stays."""
        run = self._run
        self._parts = ()
        if self._holder is not None:
            self._holder.end()
        self._registry.let_go()
        self._hooks.let_go()
        run.replicas.let_go()
        run.table.let_go()
        if run.data_parallel is not None:
            run.data_parallel.wrappers.clear()
        if self._sync is not None:
            self._sync.let_go()
        self._curvature = None
        self._held = []
        self._model.loosen()

    def _note_gone(self) -> None:
        """Looks what is left when a module or an optimizer of the program is gone."""
        if self._is_over or self._state == "closed":
            return
        # Parameters that are in no module are there as long as they are in the table.
        if self._model() is not None and any(part() is not None for part in self._parts):
            return
        self._hooks.buffers.let_go()
        if self._run.explaining is not None:
            self._run.explaining.let_go()
        if self._registry.is_vacant:
            self._is_over = True
            self._registry.end_discovery()
            self._stop_watching()
            self._let_go()

    def _end_watching(self) -> None:
        self._stop_watching()
        if self._exchange is not None:
            self._exchange.leave("its watcher was closed")

    def _give_up(self, error: str) -> str:
        """Stops watching after an error; says what becomes of the training."""
        self._stop_watching()
        if self._run.explaining is not None:
            self._run.explaining.let_go()
        if self._exchange is None:
            return UNTOUCHED
        self._exchange.leave(error)
        return OTHERS_WAIT if self._exchange.others_wait else UNTOUCHED

    def _make_exchange(self) -> Exchange | None:
        """Makes what adds up the parts of the ranks; None if no parameter is sharded."""
        run, options = self._run, self._options
        if run.shards is None:
            return None
        more = any(name != "norm" for name in options.statistics)
        return Exchange(run.shards, options.on_all_ranks, options.acting, more, _Exchanging(self))

    # -- what the hooks call -----------------------------------------------------------------------

    # The backwards that gradwatch itself runs, for the curvature, are no part of the training.

    def _before_forward(self, module: nn.Module, args: object) -> None:
        if not torch.is_grad_enabled() or (REPLAY.under_way and is_replaying()):
            return
        if not (self._curvature and self._curvature.busy):
            with self._shield:
                self._managed.before_forward()


# Called by hooks that must not keep the watcher, which is given as a weak reference.


def _on_arrived(reference: weakref.ref[Watcher]) -> None:
    self = reference()
    if self is None:
        return
    local = self._hooks.local
    busy = self._curvature is not None and self._curvature.busy
    if local is not None and not (busy or self._run.stands_aside()):
        with self._shield:
            local.take()
            if self._run.replicas.watching:
                self._run.replicas.note_arrivals()


def _on_backward(reference: weakref.ref[Watcher], backward: Backward) -> None:
    self = reference()
    if self is None or (self._curvature and self._curvature.busy) or self._run.stands_aside():
        return
    if not self._managed.active and (self._managed.manages or self._sync is not None):
        self._managed.after_other_backward()
    with self._shield:
        self._run.stopwatch.arrivals += len(backward.arrived)
        if self._run.explaining is not None:
            self._run.explaining.forwards.note_backward(backward.number)
        self._registry.add(backward, self._managed.weight)


def _note_gone(reference: weakref.ref[Watcher]) -> None:
    self = reference()
    if self is not None:
        self._note_gone()


class _Exchanging:
    """What the exchange between ranks asks of a watcher, and tells it."""

    def __init__(self, watcher: Watcher) -> None:
        # A weak reference: a cycle would keep the connections open until the collector runs.
        self._watcher = weakref.ref(watcher)

    def backwards(self) -> int:
        watcher = self._watcher()
        return 0 if watcher is None else watcher._run.hooks.arrivals.ended

    def step(self) -> int:
        watcher = self._watcher()
        return 0 if watcher is None else watcher._registry.steps + 1

    def tell(self, message: str, mistake: bool) -> None:
        watcher = self._watcher()
        if watcher is not None:
            event = loop_event("mistake" if mistake else "changed", message, self.step())
            watcher._run.tell(event, warn=mistake)


def _tell_not_entered(run: Run | None) -> None:
    if run is None:  # the watcher was dropped, as by watch(model) without a name
        warn_safely(f"gradwatch: {BEFORE_ENTERED}")
    else:
        run.tell(loop_event("mistake", BEFORE_ENTERED, 1))


@stable_name
def watch(
    model: nn.Module | Mapping[str, Tensor],
    optimizer: Optimizers = None,
    *,
    clip: float | str | ClipPolicy | None = None,
    accumulate: Accumulate = 1,
    on_nonfinite: str = "record",
    statistics: Iterable[str] = ("norm",),
    every: int = 1,
    buffer_size: int = 1024,
    scaler: torch.amp.GradScaler | None = None,
    sinks: Iterable[Sink] = (),
    run_dir: str | os.PathLike[str] | None = None,
    exploding_norm: float | None = None,
    skip_spikes: float | str | None = None,
    max_consecutive_skips: int = 10,
    curvature: CurvatureEvery | None = None,
    explain: bool = False,
    keep_batches: bool = False,
) -> Watcher:
    """Watches the gradients of a model while its training loop runs.

    Args:
        model: A module, or a mapping from names to leaf tensors.
        optimizer: One or several: a sequence, or a mapping from names to optimizers, such as
            ``{"muon": ..., "adamw": ...}``, whose names label the records. Left out, the optimizers
            that step the model's parameters are found at their first step; where none ever steps,
            each backward counts as a step.
        clip: A maximum for the global L2 norm, ``"auto"`` to have it found, or a policy such as
            ``ClipByNorm``, ``ClipByValue`` or ``ZClip``. None leaves the gradients alone.
        accumulate: Micro-batches per step: a number, ``{step: number}``, a function of the step, or
            a policy such as :class:`~gradwatch.AccumulateByNoiseScale`, which is what ``"auto"``
            stands for.
        on_nonfinite: What to do about a gradient with NaN or Inf: ``"record"`` it, ``"skip"`` the
            step (weights, optimizer state and buffers stay as they were), ``"explain"`` it, which
            skips the step too, or ``"raise"`` :class:`~gradwatch.NonFiniteGradientError` with
            weights and optimizer state as before.
        statistics: What to record per parameter besides ``"norm"``: ``"max"``, ``"mean"``,
            ``"std"``, ``"zeros"``, ``"weight_norm"``, ``"update_ratio"``, or a statistic of your
            own that was given to :func:`~gradwatch.adapters.register_statistic`.
        every: Number of steps from one sample of these statistics to the next. The norm is taken
            at every step.
        buffer_size: Number of steps kept in memory, the newest ones.
        scaler: The ``GradScaler`` of the loop, so that norms are in true units. Left out, it is
            found in the first backward.
        sinks: Objects with ``write(batch)`` and ``close()`` that receive all records. With several
            ranks, only those of rank 0 do.
        run_dir: A folder that keeps the whole run, for :func:`gradwatch.load` and every tool that
            reads Parquet. A resumed run continues the one in the folder. Needs
            ``gradwatch[runs]``.
        exploding_norm: A total norm above it is an ``exploding`` event; None for no limit.
        skip_spikes: Skips a step, as ``on_nonfinite="skip"`` does, whose norm is more than this
            many deviations above the median of the last 128 norms. ``"auto"`` means 6, None takes
            every step.
        max_consecutive_skips: Number of steps in a row that gradwatch may skip. If the next one
            holds a NaN or Inf too, :class:`~gradwatch.NonFiniteGradientError` is raised. If it is
            a finite outlier, it is taken: that many in a row are a lasting rise.
        curvature: Measures the curvature of a loss during the training:
            ``CurvatureEvery(200, lambda: criterion(model(x), y))``. Works neither with FSDP2 nor
            with weights in half precision.
        explain: Whether to say where a NaN, an Inf or too large a gradient came from, to the line
            of code: before such a step ends, its micro-batch is run again under observation. The
            training stays what it was. ``on_nonfinite="explain"`` stands for ``"skip"`` with
            ``explain=True``; ``"raise"`` and ``"record"`` can be explained as well, and so are
            steps that ``skip_spikes`` leaves out. References to the inputs of the model, and the
            gradients at its outputs, are held until the step, and on an accelerator the host
            waits for the norm once in every step. See :attr:`Watcher.explanations`.
        keep_batches: Whether the run folder keeps the micro-batches that are explained. Needs
            ``run_dir``.

    Returns:
        The watcher, to be used in a ``with`` statement.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If an argument is out of bounds, or the optimizer's parameters are not the
            model's.

    Example:
        >>> import torch
        >>> x = torch.tensor(2.0, requires_grad=True)
        >>> with watch({"x": x}) as watcher:
        ...     (x**2 + 3 * x + 1).backward()
        >>> watcher.last.grad_norm
        7.0
    """
    # In the first line locals() are the arguments and nothing else: so an option is named in the
    # signature and in Options, and nowhere in between.
    return build_watcher(model, optimizer, Options.of(locals()))


def build_watcher(
    model: nn.Module | Mapping[str, Tensor],
    optimizer: Optimizers,
    options: Options,
    model_of: Callable[[], nn.Module | Mapping[str, Tensor] | None] | None = None,
    forwards: KeptForwards | None = None,
) -> Watcher:
    """Does what :func:`watch` does, for an adapter, which has checked its options before.

    Args:
        model: As for :func:`watch`.
        optimizer: As for :func:`watch`.
        options: As they were checked.
        model_of: Returns the model, or None once the program has dropped it. With it the watcher
            keeps neither the model nor an optimizer alive, follows every optimizer that steps
            watched parameters, and lets go of the parameters when the modules and the optimizers
            are gone (:attr:`Watcher.is_over`). It may be called at any moment, and must be cheap.
            No loop of such a watcher can be managed.
        forwards: Those of the model that have been kept already, to be explained; None to begin
            when the watcher is attached.

    Raises:
        TypeError: If the model or an optimizer is of a wrong type.
        ValueError: If the optimizer's parameters are not the model's.
    """
    table = parameter_table(model)
    check_unwatched(table)
    sampler_of(options.curvature, model)  # refuses what cannot be had before a folder is made
    names = optimizer_names(optimizer)
    optimizers = optimizer_list(optimizer, table)
    late = model_of is not None  # on other ranks it says that their notes wait, too
    if options.run_dir is not None and (late or rank() == 0):
        folder = (ModelFolder if late else RunFolder)(
            options.run_dir,
            optimizers=list(map(describe_optimizer, optimizers, names or repeat(""))),
            options=describe_options(options),
        )
        options = replace(options, sinks=(*options.sinks, folder))
    return Watcher(model, table, optimizers, options, names, model_of, forwards)


def describe_optimizer(optimizer: Optimizer, name: str = "") -> dict[str, Any]:
    """Describes an optimizer for the run folder: its class, and the settings of each group.

    ``name`` is the one that the user gave it; empty for none.
    """
    kind = type(optimizer)
    return {
        **({"name": name} if name else {}),
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "groups": [
            {
                "parameters": len(group["params"]),
                **{name: _plain(value) for name, value in group.items() if name != "params"},
            }
            for group in (stepped_by(optimizer) or [optimizer])[-1].param_groups
        ],
    }


def describe_options(options: Options) -> dict[str, Any]:
    """Describes the arguments of ``watch()``, those that are objects as their ``repr``."""
    left_out = ("sinks", "run_dir")  # they say where a run is kept, not how it was trained
    names = [field.name for field in fields(options) if field.name not in left_out]
    return {name: _plain(getattr(options, name)) for name in names}


def _plain(value: object) -> Any:
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    # The learning rate of a capturable optimizer is a tensor; a large one is no setting.
    if isinstance(value, Tensor):
        small = value.numel() <= 8 and not value.is_meta
        return value.cpu().tolist() if small else f"tensor {tuple(value.shape)}"
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return repr(value)
