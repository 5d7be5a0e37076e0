"""watch_all() and ProcessWatch: a watcher for each model that the process trains."""

from __future__ import annotations

import copy
import gc
import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from itertools import chain, count
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from torch.optim import Optimizer

from gradwatch import lifetime
from gradwatch.adapters import check_options
from gradwatch.checks import described
from gradwatch.errors import described_error, tell_instead, tell_no_more, warn_safely
from gradwatch.history import load
from gradwatch.hooks.backward import give_way_no_more, give_way_with, is_watched
from gradwatch.hooks.context import REPLAY, is_replaying
from gradwatch.hooks.entry import BeforeBackward, is_tracing
from gradwatch.hooks.instances import looked_for_once
from gradwatch.hooks.optimizer import OptimizerDiscovery, is_trial, parameters_held
from gradwatch.hooks.scaler import noted_scalers
from gradwatch.measure.parameters import ParameterTable
from gradwatch.options import CHECKS
from gradwatch.pickles import stable_name
from gradwatch.process.acting import refuse_dishonest
from gradwatch.process.modules import NotedModules
from gradwatch.process.optimizers import BuiltOptimizers, is_complete, optimizers_there
from gradwatch.process.owners import Owner, owners_of
from gradwatch.process.report import ProcessReport
from gradwatch.record.folder.models import check_models_folder
from gradwatch.record.late_sinks import LateSinks
from gradwatch.record.records import Sink
from gradwatch.record.wording import listed
from gradwatch.watcher import Watcher, build_watcher

if TYPE_CHECKING:
    from gradwatch.clip.policy import ClipPolicy
    from gradwatch.process.forwards import EarlyForwards
    from gradwatch.report.report import Report
    from gradwatch.report.thresholds import Thresholds

MOST_ALIKE = 100
"""Models of one kind that are watched: a program may copy its model in every step."""

NOT_A_FUNCTION = (
    "watch_all(sinks=) takes a function of a model's name, as each model has sinks of its own, got "
    '{value}. Write sinks=lambda name: [TensorBoardWriter(f"runs/{{name}}")].'
)
OF_ONE_MODEL = (
    "watch_all() got {name}=, which belongs to one model or one loop. Use gradwatch.watch(model, "
    "optimizer, {name}=...) for that model: watch_all() leaves it alone then."
)
ATTACHED_TWICE = (
    "This watch_all() was attached before. Make a new one with gradwatch.watch_all(...)."
)
WATCHES = "watching {label}: {what}{where}"
ENOUGH = (
    "{count} models like {label}, with the same number of parameters, were watched: those that are "
    "built from here on are not."
)
AGAIN = (
    "{optimizer} has been given parameters that it did not have before: {label} is watched anew "
    "from this step on, under another name."
)
CANNOT = "{label} is not watched: {error}"
NO_OPTIMIZER = (
    "Nothing was watched: no torch.optim.Optimizer was built in this process. Children that it "
    "started, and optimizers of other kinds, are not watched."
)
NO_STEP = "Nothing was watched: {optimizers} {was} built, but never stepped."
LEFT = "Nothing was watched here: the program watches its models with gradwatch itself."
REFUSED = "Nothing was watched: {reason}"
STOPPED = "the training was stopped before its first step, by an option that cannot be had for it."


class _Watched:
    """A model with its watcher."""

    watcher: Watcher

    def __init__(self, label: str, table: Sequence[Tensor]) -> None:
        self.label = label  # from the first step on no other model has it
        self.ids = frozenset(map(id, table))
        self.stepped = False
        self.ended = False


class ProcessWatch:
    """Watches every model that is trained in this process: made by :func:`watch_all`.

    Each model has a watcher of its own, and several optimizers of one model share it. Models are
    found by their optimizers, before the first backward after these were built. A model that the
    program gives to :func:`gradwatch.watch` itself is left to it. Nothing of the program is kept
    alive: when a model is dropped, its records stay.
    """

    def __init__(
        self,
        options: Mapping[str, Any],
        *,
        say: Callable[[str], None] | None = None,
        is_first: bool = False,
    ) -> None:
        """Starts with the options of :func:`watch_all`, unchecked; attaches nothing yet.

        Args:
            options: By name; those that are left out have their defaults.
            say: Receives one line for each model when it takes its first step, and what would be a
                warning otherwise. It must not raise. None to warn as Python does.
            is_first: Whether no optimizer can have been built yet, so that none is searched for.
        """
        given = dict(options)
        for name in ("accumulate", "scaler", "curvature"):
            if given.pop(name, None) is not None:
                raise TypeError(OF_ONE_MODEL.format(name=name))
        sinks = given.pop("sinks", None)
        if sinks is not None and not callable(sinks):
            raise TypeError(NOT_A_FUNCTION.format(value=described(sinks)))
        self._sinks_of = cast("Callable[[str], Iterable[Sink]] | None", sinks)
        self._options = check_options("watch_all", given, accumulate=1, scaler=None)
        if self._options.run_dir is not None:
            check_models_folder(self._options.run_dir)
        self._say = say
        self._is_first = is_first
        self._state = "new"
        self._all: list[_Watched] = []
        self._shown: list[_Watched] = []
        self._waiting: list[weakref.ref[Optimizer]] = []
        # By id, what each optimizer held whose model is watched.
        self._held: dict[int, tuple[weakref.ref[Optimizer], list[int]]] = {}
        self._built: dict[str, None] = {}  # names of classes, in order
        self._left = False
        self._kinds: Counter[tuple[str, int]] = Counter()
        self._ending = ExitStack()
        self._noted = NotedModules()
        self._early: EarlyForwards | None = None
        if self._options.explain:
            from gradwatch.process.forwards import EarlyForwards  # few runs need it

            self._early = EarlyForwards(self._noted)
        self._errors: list[str] = []
        self._there: list[weakref.ref[Optimizer]] = []  # those that were built before
        self._refused: list[tuple[weakref.ref[Optimizer], Exception]] = []
        self._told: set[str] = set()
        self._lock = threading.Lock()
        self._lock_of_names = threading.Lock()  # a model may step while others are claimed
        self._claiming: int | None = None  # the thread that does
        self._births: BuiltOptimizers | None = None
        self._before_backward = BeforeBackward(lambda _: self._claim())
        self._steps: OptimizerDiscovery | None = None

    # -- life ----------------------------------------------------------------------------------

    def attach(self) -> ProcessWatch:
        """Begins to watch: optimizers that are there already, and those that are built later.

        Returns:
            This object.

        Raises:
            RuntimeError: If it was attached before.
        """
        if self._state != "new":
            raise RuntimeError(ATTACHED_TWICE)
        self._state = "attached"
        lifetime.opened(self)
        if self._say is not None:
            tell_instead(self._say)
        give_way_with(self._give_way)
        self._noted.attach()
        if self._is_first:
            self._ending.enter_context(noted_scalers())
        self._births = BuiltOptimizers(
            self._on_built, None if self._early is None else self._on_complete
        )
        there = [] if self._is_first else optimizers_there()
        self._there = list(map(weakref.ref, there))
        for optimizer in there:
            self._on_built(optimizer)
        self._keep_forwards_of(there)
        return self

    def close(self) -> None:
        """Ends all watchers and delivers what is outstanding; a second call does nothing."""
        if self._state != "attached":
            return
        self._state = "closed"
        lifetime.closed(self)
        with ExitStack() as ending:
            if self._say is not None:
                ending.callback(tell_no_more, self._say)
            for one in self._all:
                ending.callback(self._end, one)
            ending.callback(self._stop)

    def disown(self) -> None:
        """Leaves everything to the process that this one was forked from; called in each fork."""
        self._state = "forked"
        self._stop()
        for one in self._all:
            one.watcher.disown()

    def __enter__(self) -> ProcessWatch:
        return self.attach()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _stop(self) -> None:
        if self._births is not None:
            self._births.remove()
        self._noted.close()
        self._ending.close()
        self._before_backward.stop()
        if self._steps is not None:
            self._steps.remove()
        if self._early is not None:
            self._early.end()
        give_way_no_more(self._give_way)

    # -- what is there to read -------------------------------------------------------------------

    @property
    def watchers(self) -> list[Watcher]:
        """The watchers of the models that have taken a step, in the order of their first steps.

        :attr:`Watcher.label` names the model.
        """
        return [one.watcher for one in self._shown]

    def report(self, thresholds: Thresholds | None = None, **changes: float) -> ProcessReport:
        """Says what the training of each model shows so far.

        Args:
            thresholds: The limits of the rules; None for the defaults.
            **changes: Limits to change, by name: ``spike=20.0``.

        Returns:
            A mapping from names of models to reports; its ``str()`` is one text.
        """
        reports = {
            one.label: self.report_of(one.watcher, thresholds, **changes) for one in self._shown
        }
        return ProcessReport(reports, self.nothing_watched())

    def report_of(
        self, watcher: Watcher, thresholds: Thresholds | None = None, **changes: float
    ) -> Report:
        """Says what the training of one model shows so far.

        When it is over, and memory may not hold all steps, they are read from the run folder.

        Args:
            watcher: One of :attr:`watchers`.
            thresholds: As for :meth:`report`.
            **changes: As for :meth:`report`.
        """
        folder = watcher.folder
        is_full = len(watcher.history) == self._options.buffer_size
        if self._state == "closed" and folder is not None and is_full:
            with suppress(OSError, ValueError):  # somebody has removed it, or damaged it
                return load(folder).report(thresholds, **changes)
        return watcher.report(thresholds, **changes)

    def nothing_watched(self) -> str:
        """Returns, in one sentence, why nothing was watched; empty if something was."""
        if self._shown:
            return ""
        if self._errors:
            return REFUSED.format(reason=self._errors[0])
        if self._left:
            return LEFT
        if self._built:
            names = list(self._built)
            return NO_STEP.format(
                optimizers=listed(names), was="was" if len(names) == 1 else "were"
            )
        return NO_OPTIMIZER

    # -- optimizers ------------------------------------------------------------------------------

    def _on_built(self, optimizer: Optimizer) -> None:
        if self._is_ignored():
            return
        with self._lock:
            self._built[type(optimizer).__name__] = None
            self._waiting.append(weakref.ref(optimizer))
            self._before_backward.wait()
            if self._steps is None:
                self._steps = OptimizerDiscovery(self._before_step)

    def _on_complete(self, optimizer: Optimizer) -> None:
        self._keep_forwards_of([optimizer])

    def _keep_forwards_of(self, optimizers: Sequence[Optimizer]) -> None:
        """Keeps the forwards of their models from now on, to explain the first step of each."""
        if self._is_ignored() or self._early is None:
            return
        new = [one for one in optimizers if not self._is_known(one)]
        try:
            self._early.begin(new)  # at once: a search for their owners may take a second
        except Exception as error:
            if len(new) == 1:
                self._note_error(type(new[0]).__name__, error)
                return
            for optimizer in new:  # one that is refused keeps none of the others from being seen
                self._keep_forwards_of([optimizer])

    def _is_ignored(self) -> bool:
        """Returns whether what this thread does now is none of the training's."""
        ours = (
            self._claiming == threading.get_ident()
            or is_trial()
            or (REPLAY.under_way and is_replaying())
        )
        return ours or self._state != "attached"

    def _before_step(self, optimizer: Optimizer) -> None:
        """Claims an optimizer that steps without a backward that was noticed.

        So does one whose parameters have been exchanged: their backward was nobody's.

        Raises:
            Exception: If an acting option cannot be had for it.
        """
        if self._waiting and any(ref() is optimizer for ref in self._waiting):
            if not is_tracing():
                self._claim()
            self._raise_refused(optimizer)
            return
        if self._refused:
            self._raise_refused(optimizer)
        reference, before = self._held.get(id(optimizer), (None, []))
        if reference is None or reference() is not optimizer:
            return
        held = _ids(optimizer)  # in each step: the other questions only where it has changed
        if held == before or is_tracing() or self._is_ignored():
            return
        self._held[id(optimizer)] = reference, held
        try:
            self._give_back(optimizer)
        except Exception as error:  # what cannot be watched any more must not end the training
            self._note_error(type(optimizer).__name__, error)
        self._claim()

    def _were_there(self, optimizers: Sequence[Optimizer]) -> bool:
        return any(ref() is one for one in optimizers for ref in self._there)

    def _raise_refused(self, optimizer: Optimizer) -> None:
        for reference, error in self._refused:
            if reference() is optimizer:
                self._errors.append(STOPPED)
                raise error

    def _give_back(self, optimizer: Optimizer) -> None:
        """Has a model claimed again whose optimizer holds parameters that no watcher knows."""
        with self._lock:
            self._end_what_is_over()
            there = [one for one in self._all if not one.ended]
            known = {key for one in there for key in one.ids}
            held = [one for one in parameters_held(optimizer) if one.requires_grad]
            followed = [one for one in there if one.watcher.is_following(optimizer)]
            if all(id(one) in known or is_watched(one) for one in held):
                for one in followed:  # layers of the model were thawed, left out or exchanged
                    one.watcher.look_again(optimizer)
                return
            mine = {key for one in followed for key in one.ids}
            again = [optimizer]
            for reference, keys in self._held.values():
                other = reference()
                if other is not None and other is not optimizer and not mine.isdisjoint(keys):
                    again.append(other)
            for one in followed:
                if one.stepped:
                    kind = type(optimizer).__name__
                    self._warn_once(AGAIN.format(optimizer=kind, label=one.label))
                one.watcher.hand_over()
                self._end(one)
            self._waiting += map(weakref.ref, again)

    def _claim(self) -> None:
        """Watches the models of all optimizers that wait; called before a backward."""
        if self._is_ignored():
            return
        with self._lock:
            self._claiming = threading.get_ident()
            try:
                self._end_what_is_over()
                self._claim_all(self._take_complete())
            except _RefusedError as refused:
                raise refused.error from None
            except Exception as error:  # what could not be watched must not end the training
                self._note_error("The model", error)
            finally:
                self._claiming = None
                # Only now: a backward of another thread waits until its model is watched.
                if not self._waiting:
                    self._before_backward.stop()

    def _take_complete(self) -> list[Optimizer]:
        if self._options.acts and len(self._waiting) > 1:
            gc.collect()  # one that was replaced may still lie in a cycle with its scheduler
        waiting = [one for ref in self._waiting if (one := ref()) is not None]
        complete = list({id(one): one for one in waiting if is_complete(one)}.values())
        self._waiting = [weakref.ref(one) for one in waiting if not is_complete(one)]
        return complete

    def _claim_all(self, optimizers: Sequence[Optimizer]) -> None:
        new = [
            one
            for one in optimizers
            if not self._is_left(one) and not self._joins(one) and not self._is_enough(one)
        ]
        with looked_for_once():  # each model is asked who else trains it
            for owner in owners_of(new, self._noted):
                self._watch(owner)
        self._held = {key: one for key, one in self._held.items() if one[0]() is not None}
        for one in optimizers:
            if any(not known.ended and known.watcher.is_following(one) for known in self._all):
                self._held[id(one)] = weakref.ref(one), _ids(one)
        if self._early is not None and not self._waiting:
            self._early.end()

    def _is_left(self, optimizer: Optimizer) -> bool:
        """Returns whether the program itself watches a parameter of the optimizer."""
        ours = {key for one in self._all if not one.ended for key in one.ids}
        parameters = parameters_held(optimizer)
        left = any(is_watched(one) and id(one) not in ours for one in parameters)
        self._left = self._left or left
        return left

    def _is_known(self, optimizer: Optimizer) -> bool:
        """Returns whether the optimizer's model is watched, be it by the program itself."""
        return any(map(is_watched, parameters_held(optimizer)))

    def _joins(self, optimizer: Optimizer) -> bool:
        """Has a watcher follow an optimizer of its model, if there is one."""
        held = set(map(id, parameters_held(optimizer)))
        for one in self._all:
            if not one.ended and held and held <= one.ids:
                one.watcher.follow(optimizer)
                return True
        return False

    def _is_enough(self, optimizer: Optimizer) -> bool:
        """Counts a model of the optimizer's kind; returns whether there were enough of it.

        Optimizers that were there before are not counted: most are left over, and step no more.
        """
        if self._were_there([optimizer]):
            return False
        # Without looking for the model, which takes a while: meta-learning copies it in every step.
        kind = _kind(optimizer)
        self._kinds[kind] += 1
        return self._kinds[kind] > MOST_ALIKE

    def _watch(self, owner: Owner) -> None:
        """Watches a model, or says why it cannot be."""
        model = owner.model()
        if model is None:
            return
        if sum(self._kinds[kind] == MOST_ALIKE for kind in map(_kind, owner.optimizers)):
            self._warn(ENOUGH.format(count=MOST_ALIKE, label=owner.label))
        try:
            self._build(owner, model)
        except Exception as error:
            if not self._options.acts:
                self._note_error(owner.label, error)
            elif isinstance(error, ValueError) and self._were_there(owner.optimizers):
                # Raised when one of them steps: they may be left over, and step no more. Not if it
                # concerns other ranks, which would wait for this one meanwhile.
                self._refused += [(weakref.ref(one), error) for one in owner.optimizers]
            else:
                self._errors.append(STOPPED)
                raise _RefusedError(error) from None

    def _build(self, owner: Owner, model: nn.Module | Mapping[str, Tensor]) -> None:
        refuse_dishonest(self._options, owner.optimizers, model)
        table = ParameterTable.of(model).tensors
        # To a larger model that holds one that was watched before. Two models may share what
        # neither of them trains.
        held = {id(one) for each in owner.optimizers for one in parameters_held(each)}
        self._give_way([one for one in table if one.requires_grad or id(one) in held])
        watched = _Watched(owner.label, table)
        options = replace(
            self._options,
            sinks=self._late_sinks(watched),
            run_dir=self._folder_of(owner.label),  # another one may come first: see _show()
            clip=copy.deepcopy(self._options.clip),  # a policy remembers the norms of one model
        )
        forwards = None if self._early is None else self._early.take(model)
        watcher = build_watcher(model, owner.optimizers, options, owner.model, forwards)
        watched.watcher = watcher
        watcher.label, watcher.tells_findings = owner.label, self._say is None
        watcher.on_first_step(partial(self._show, watched))
        self._all.append(watched)
        watcher.attach()
        lifetime.left_to_owner(watcher)

    def _late_sinks(self, watched: _Watched) -> tuple[Sink, ...]:
        """Returns the sinks of a model, which are made when it has stepped."""
        make = self._sinks_of
        if make is None:
            return ()

        def made() -> tuple[Sink, ...]:
            sinks = CHECKS["sinks"]("watch_all(sinks=)", make(watched.label))
            return cast("tuple[Sink, ...]", sinks)

        return (LateSinks(made),)

    def _folder_of(self, label: str) -> str | None:
        folder = self._options.run_dir
        return None if folder is None else str(Path(folder) / label)

    def _free_label(self, label: str) -> str:
        taken = {one.label for one in self._shown}
        labels = (label if not number else f"{label}-{number}" for number in count())
        return next(one for one in labels if one not in taken)

    def _note_error(self, label: str, error: Exception) -> None:
        text = CANNOT.format(label=label, error=described_error(error))
        self._errors.append(text)
        self._warn(text)

    def _warn_once(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self._warn(text)

    def _warn(self, text: str) -> None:
        warn_safely(f"gradwatch: {text}")

    # -- watchers --------------------------------------------------------------------------------

    def _show(self, watched: _Watched) -> None:
        """Names a model at its first step, and tells of it."""
        with self._lock_of_names:
            if watched.stepped:
                return
            watched.stepped = True
            # Only now: one that is never stepped, such as a teacher, must not take the name.
            label = watched.label = watched.watcher.label = self._free_label(watched.label)
            self._shown.append(watched)
        folder = self._folder_of(label)
        if folder is not None:
            watched.watcher.move_folder(folder)
        if self._say is not None:
            where = "" if folder is None else f" -> {folder}"
            what = watched.watcher.described()
            self._say(WATCHES.format(label=label, what=what, where=where))

    def _give_way(self, tensors: Sequence[Tensor]) -> None:
        """Ends the watchers of some tensors, which somebody else is about to watch."""
        wanted = set(map(id, tensors))
        for one in self._all:
            if not one.ended and not one.ids.isdisjoint(wanted):
                self._left = self._left or not self._is_ignored()
                self._end(one)

    def _end_what_is_over(self) -> None:
        for one in self._all:
            if not one.ended and one.watcher.is_over:
                self._end(one)
        self._all = [one for one in self._all if one.stepped or not one.ended]

    def _end(self, watched: _Watched) -> None:
        if not watched.ended:
            watched.ended = True
            lifetime.close_quietly(watched.watcher)


@stable_name
def watch_all(  # noqa: D417 - the other arguments are those of watch()
    *,
    clip: float | str | ClipPolicy | None = None,
    on_nonfinite: str = "record",
    statistics: Iterable[str] = ("norm",),
    every: int = 1,
    buffer_size: int = 1024,
    sinks: Callable[[str], Iterable[Sink]] | None = None,
    run_dir: str | os.PathLike[str] | None = None,
    exploding_norm: float | None = None,
    skip_spikes: float | str | None = None,
    max_consecutive_skips: int = 10,
    explain: bool = False,
    keep_batches: bool = False,
) -> ProcessWatch:
    """Watches every model that is trained in this process from now on.

    Models are found by their optimizers, those that were built before and those that are built
    later, and are watched from the first backward on. Names of parameters are those of the
    outermost module that holds all parameters of an optimizer; a parameter that no module holds is
    called after its place in the optimizer, ``param_groups[0][3]``. What is never stepped is never
    shown. ``gradwatch run script.py`` does the same without a line of code.

    All arguments but two are those of :func:`gradwatch.watch`. Each model has a clipping policy of
    its own.

    Args:
        sinks: A function that gets the name of a model and returns the sinks for it:
            ``lambda name: [TensorBoardWriter(f"runs/{name}")]``.
        run_dir: A folder in which each model gets a run folder of its own, ``runs/a/Net``.

    Returns:
        To be used in a ``with`` statement, or with ``attach()`` and ``close()``.

    Raises:
        TypeError: If an argument is of a wrong type.
        ValueError: If an argument is out of bounds. An acting option that cannot be had for a model
            raises it before that model's first step.

    Example:
        >>> import torch
        >>> def train():
        ...     model = torch.nn.Linear(2, 1)
        ...     optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        ...     for _ in range(3):
        ...         model(torch.ones(4, 2)).sum().backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        >>> with watch_all() as watching:
        ...     train()
        >>> [(one.label, one.last.step) for one in watching.watchers]
        [('Linear', 3)]
    """
    return ProcessWatch(locals())


class _RefusedError(Exception):
    """An acting option cannot be had; the error that says why."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


def _ids(optimizer: Optimizer) -> list[int]:
    # Before every step, so not parameters_held(), which looks into wrappers.
    groups = [group["params"] for group in optimizer.param_groups]
    return list(map(id, chain.from_iterable(groups)))


def _kind(optimizer: Optimizer) -> tuple[str, int]:
    return type(optimizer).__name__, len(parameters_held(optimizer))
