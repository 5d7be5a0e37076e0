"""Whether the ranks train one model: gradients that nobody averages, and ranks with the same data.

Both are found without a collective, from what a rank sees by itself: whether DDP reduces in a
backward, whether anything has changed the gradients since, and whether the mean over the ranks
differs from this rank's own gradient.
"""

from __future__ import annotations

import enum
import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import wraps
from operator import attrgetter
from typing import Concatenate, ParamSpec

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from gradwatch.errors import warn_safely
from gradwatch.hooks.backward import inside_backward
from gradwatch.hooks.data_parallel import (
    DataParallel,
    can_hold,
    group_size,
    ignored_by,
    is_distributed,
    is_reducing,
    rank,
    reduced_by,
    takes_the_mean,
    wrappers_that_hold,
)
from gradwatch.hooks.model import ModelHooks, Unhooked
from gradwatch.measure.devices import in_double
from gradwatch.measure.gathering import joined
from gradwatch.measure.parameters import ParameterTable
from gradwatch.record.events import loop_event, same_data_event
from gradwatch.record.records import Event, EventKind, StepRecord
from gradwatch.step.weights import WindowWeights
from gradwatch.step.window import Window

NOT_REDUCED = (
    "Nobody has averaged the gradients of {parameters} over the {ranks} ranks, as of step {step}: "
    "the loss was not computed by the DistributedDataParallel wrapper, so each rank steps on its "
    "own gradients, and the replicas drift apart. Call the wrapper, not the module inside it: "
    "ddp(x) instead of ddp.module(x) or model(x)."
)
HELD_BACK = (
    "Nobody has averaged the gradients of {parameters} over the {ranks} ranks, as of step {step}: "
    "every backward ran under no_sync(), so each rank steps on its own gradients, and the replicas "
    "drift apart. Run the last micro-batch of each step outside of no_sync()."
)
THAWED = (
    "Nobody has averaged the gradients of {parameters} over the {ranks} ranks, as of step {step}: "
    "they required no gradient when DistributedDataParallel wrapped the model, and it averages "
    "only what did, so the replicas drift apart. Wrap the model again after thawing parameters."
)
IGNORED = (
    "The gradients of {parameters} are this rank's own, as of step {step}: "
    "DistributedDataParallel was told to ignore them, and nobody else has averaged them over the "
    "{ranks} ranks. So the total norm, and the factor of a clip by it, differ between the ranks. "
    "Have it ignore only parameters that are meant to differ between the ranks, as experts do."
)
WRAPPED_LATER = (
    "The model was wrapped in DistributedDataParallel after watch(). The norms are those of the "
    "averaged gradients all the same{but}."
)
NOT_MANAGED = (
    ", but every micro-batch communicates, and weights and noise scale are those of one rank. Wrap "
    "the model first, and watch the wrapper"
)
NOT_WRITTEN = (
    "Nothing of this run is written: RANK and WORLD_SIZE in the environment say that this process "
    "is rank {rank} of several, of which only rank 0 writes run_dir and sinks, but no process "
    "group says so too at its first step. If the processes train independently of each other, "
    "remove these variables from the environment before watch()."
)

BROKEN = (
    "gradwatch no longer looks whether the ranks train one model, after an error of its own, "
    "{error!r}. Everything else goes on; please report this."
)

FIRST_STEPS = 10  # each of them is looked at, and then every EVERY-th
EVERY = 100
SEARCHES = (1, 10, 100)  # a search for wrappers looks at all objects of the process
CERTAIN = 2  # steps in a row; a single one may be a dry run that creates the optimizer's state
CERTAIN_LATER = 10  # after steps that were reduced: one may be on a loss of the weights alone
CERTAIN_HELD = 50  # under no_sync(), as local SGD averages the weights every few dozen steps
SAME_STEPS = 10
SAME = 1e-5  # relative: rounding makes 1e-6 at most, different batches seldom less than 1e-3
SAMPLED_TENSORS, SAMPLED_ELEMENTS = 16, 64


P = ParamSpec("P")


def _never_raises(method: Callable[Concatenate[Replicas, P], None]) -> Callable[..., None]:
    """Ends the observation after an error, which must not stop a training that clips, either."""

    @wraps(method)
    def safe(self: Replicas, *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            method(self, *args, **kwargs)
        except Exception as error:
            self.active = self.watching = False
            warn_safely(BROKEN.format(error=error))

    return safe


class Replicas:
    """Tells of ranks that do not train one model together.

    Attributes:
        watching: Whether to call :meth:`note_arrivals` in the next backward.
        active: Whether to call :meth:`before_step` and :meth:`after_step`.
        by_hand: Whether the ranks have a process group, and no wrapper that averages gradients: the
            loop may do it by itself.
    """

    def __init__(
        self,
        table: ParameterTable,
        hooks: ModelHooks,
        data_parallel: DataParallel | None,
        tell: Callable[..., None],
        *,
        sharded: bool,
        writes: bool,
    ) -> None:
        """Starts without an observation.

        Args:
            table: The watched parameters.
            hooks: Tell which gradients have arrived, and measure those of this rank.
            data_parallel: The ranks that are known to average the gradients.
            tell: Records an event, and warns of it unless ``warn=False``.
            sharded: Whether FSDP2 averages the gradients.
            writes: Whether the run has a folder or sinks, of which only rank 0 keeps any.
        """
        self._table = table
        self._hooks = hooks
        self._tell = tell
        self._unwritten = rank() if writes and not is_distributed() else 0
        self._parts: list[_Part] = []
        self._known: list[weakref.ref[DistributedDataParallel]] = []
        self._found: DataParallel | None = None
        self._steps = self._looks = 0
        self._equal: dict[str, int] = {}
        self._same: Event | None = None
        self._ended = False
        self._add(() if data_parallel is None else data_parallel.wrappers)
        self.watching = bool(self._parts)
        self.active = not sharded
        self.by_hand = False

    # -- in the backward ---------------------------------------------------------------------------

    @_never_raises
    def note_arrivals(self) -> None:
        """Notes which wrappers reduce, when all gradients of a backward have arrived."""
        arrived = set(self._hooks.arriving())
        touched = [part for part in self._parts if not part.indices.isdisjoint(arrived)]
        held = [part for part in touched if not part.reduces()]
        reduced: set[int] = set().union(*(part.indices for part in touched if part not in held))
        for part in touched:
            mine = arrived & part.indices
            part.arrived |= mine
            # An unused wrapper of the same parameters may still be in memory.
            if part not in held or mine <= reduced:
                part.reduced = part.ends_reduced = True
            else:
                part.ends_reduced = False
                part.is_held = part.is_held_back
                # A micro-batch that is not reduced is nothing special: only after a first step on
                # such gradients they are sampled.
                if part.in_a_row:
                    gradients = map(attrgetter("grad"), self._tensors(mine))
                    part.gradients = _Sample([one for one in gradients if one is not None])

    def note_reduced(self) -> None:
        """Notes that gradwatch itself has averaged the gradients, in a managed loop."""
        for part in self._parts:
            part.reduced = part.ends_reduced = True

    # -- in the step -------------------------------------------------------------------------------

    @_never_raises
    def before_step(self, window: Window, weights: WindowWeights, step: int) -> None:
        """Judges the gradients that an optimizer is about to use.

        Args:
            window: The window of the step.
            weights: Its weights, which learn the ranks if the model was wrapped lately.
            step: The number of the step, counted from 1.
        """
        self._steps += 1
        if not self._known and self._steps in SEARCHES:
            self._search(window, step)
        if self.by_hand and window.looks is not None:  # all_reduce(p.grad) moves no version counter
            window.looks.each_step()
        if self._found is not None and window.divisor is None and not weights.by_noise:
            weights.data_parallel = self._found
        if not self.watching or inside_backward():
            self.watching = self._looks_next
            return
        mine = set(window.indices)
        judged = [part for part in self._parts if not part.arrived.isdisjoint(mine)]
        for part in judged:
            self._judge(part, step)
        shared = [part for part in judged if not part.ignored]
        if shared and all(part.ends_reduced for part in shared):
            self._tell_same()
        for part in judged:
            part.begin()
        self._looks += 1
        self.watching = self._looks_next

    @property
    def _looks_next(self) -> bool:
        due = self._looks < FIRST_STEPS or self._steps % EVERY == EVERY - 1
        return bool(self._parts) and (due or any(part.in_a_row for part in self._parts))

    @_never_raises
    def after_step(self) -> None:
        """Samples the weights after a step, to see whether anything else changes them."""
        for part in self._parts:
            if part.is_held and part.in_a_row:
                part.weights = _Sample(self._tensors(part.indices))

    def let_go(self) -> None:
        """Drops the gradients and weights that were sampled; what is known of them stays."""
        for part in self._parts:
            part.gradients = part.weights = None

    @_never_raises
    def end(self) -> None:
        """Judges what was left open, at the end of the run."""
        self._ended = True
        self._warn_if_unwritten()
        for part in list(self._parts):
            if part.in_a_row >= CERTAIN and not part.reduced_before and not self._rewrapped(part):
                self._accuse(part, part.step)

    def _judge(self, part: _Part, step: int) -> None:
        part.step = step
        if part.reduced:
            part.in_a_row, part.reduced_before = 0, True
            return
        if part.gradients is None:
            part.in_a_row = max(part.in_a_row, 1)
            return
        change = part.gradients.change()
        if change is Change.OTHER or part.weights_moved:
            self._parts.remove(part)  # the loop averages gradients or weights by itself
        elif part.is_suspect(change):
            part.in_a_row += 1
            if part.in_a_row >= part.certain_after and not self._rewrapped(part):
                self._accuse(part, step)

    def _accuse(self, part: _Part, step: int) -> None:
        self._parts.remove(part)  # it is told once
        first, *others = sorted(part.indices)
        name, module = self._table.names[first], self._table.modules[first]
        names = f"{name} and {len(others):,} more parameters" if others else name
        text = part.text.format(parameters=names, ranks=part.ranks, step=step)
        kind: EventKind = "changed" if part.ignored else "mistake"
        self._tell(loop_event(kind, text, step, parameter_and_module=(name, module)))

    def _tensors(self, indices: Iterable[int]) -> list[Tensor]:
        if self._table.is_gone:
            return []
        return [self._table.tensors[index] for index in sorted(indices)]

    # -- wrappers ----------------------------------------------------------------------------------

    def _add(self, wrappers: Iterable[DistributedDataParallel]) -> None:
        for wrapper in wrappers:
            self._known.append(weakref.ref(wrapper))
            self._looks = 0
            ranks, of = group_size(wrapper), self._table.indices_of
            reduced = set(of(reduced_by(wrapper)))
            thawed = set(of(reduced_by(wrapper, frozen=True)))
            unhooked = Unhooked(self._table.tensors)  # a hook may average what the wrapper ignores
            ignored = {index for index in of(ignored_by(wrapper)) if index in unhooked}
            for part in (
                _Part(weakref.ref(wrapper), reduced, ranks),
                _Part(weakref.ref(wrapper), thawed, ranks, thawed=True),
                _Part(weakref.ref(wrapper), ignored, ranks, ignored=True),
            ):
                if part.indices and ranks > 1:
                    self._parts.append(part)

    def _search(self, window: Window, step: int) -> None:
        """Looks for a wrapper that was made after ``watch()``."""
        self._warn_if_unwritten()
        if not is_distributed() or group_size() < 2:
            self.active = False
            return
        found = wrappers_that_hold(self._table.tensors)
        self._add(found)
        self.by_hand = not found
        if self._parts:
            self._hooks.measure_local(found)
            with suppress(ValueError):  # not of the same ranks
                ranks = DataParallel.of(None, found)
                self._found = ranks and replace(ranks, wrappers=[])  # which it would keep
            managed = window.divisor is not None
            text = WRAPPED_LATER.format(but=NOT_MANAGED if managed else "")
            self._tell(loop_event("changed", text, step), warn=managed)
        self.active = bool(self._parts) or self._steps < SEARCHES[-1]

    def _warn_if_unwritten(self) -> None:
        unwritten, self._unwritten = self._unwritten, 0
        if unwritten and not (is_distributed() and rank()):
            warn_safely(f"gradwatch: {NOT_WRITTEN.format(rank=unwritten)}")

    def _rewrapped(self, part: _Part) -> bool:
        """Whether a newer wrapper has taken the place of one; it is judged from now on."""
        found = wrappers_that_hold(self._tensors(part.indices))
        fresh = [one for one in found if not any(one is known() for known in self._known)]
        if fresh:
            self._parts.remove(part)
            self._add(fresh)
            self._hooks.measure_local(fresh)
        return bool(fresh)

    # -- ranks with the same data ------------------------------------------------------------------

    def note_record(self, record: StepRecord) -> None:
        """Compares this rank's own gradient norm with that of the mean over the ranks.

        The mean of different gradients is shorter than they are, or differs from them at least.
        """
        total, local = record.grad_norm, record.grad_norm_local
        same = math.isclose(total, local, rel_tol=SAME) and 0 < total < math.inf
        count = self._equal[record.optimizer] = (
            self._equal.get(record.optimizer, 0) + 1 if same else 0
        )
        if count != SAME_STEPS or not self._parts:
            return
        # A hook may leave gradients as they are on purpose, as that of local SGD does.
        wrappers = [part.wrapper() for part in self._parts]
        if not all(wrapper is None or takes_the_mean(wrapper) for wrapper in wrappers):
            return
        ranks = max(part.ranks for part in self._parts)
        self._same = same_data_event(record, count, ranks)
        self.watching = True  # they are equal as well where nobody averages
        shared = [part for part in self._parts if not part.ignored]
        seen = [part for part in shared if part.reduced_before or part.in_a_row]
        if self._ended and all(part.ends_reduced for part in seen):
            self._tell_same()

    def _tell_same(self) -> None:
        if self._same is not None:
            self._tell(self._same)
        self._same = None


@dataclass(slots=True, eq=False)
class _Part:
    """The parameters that one wrapper averages, or (``thawed``) those that it does not know.

    Attributes:
        wrapper: Returns the wrapper; None once the program has dropped it.
        indices: The indices of the parameters.
        ranks: The number of ranks that it averages over.
        thawed: Whether the parameters required no gradient when they were first seen.
        ignored: Whether the wrapper was told to ignore them.
        arrived: Those that received a gradient since the last step.
        reduced: Whether any backward since then was reduced.
        ends_reduced: Whether the newest one was.
        is_held: Whether the newest backward ran under ``no_sync()``.
        gradients: A sample of the gradients of the newest backward that was not reduced; None if
            there was no such step before.
        weights: A sample of the weights after the last step; None likewise.
        step: The newest step that was judged.
        in_a_row: Steps in a row on gradients that DDP has not reduced; all but the first of them
            are known to be on gradients that nobody has averaged.
        reduced_before: Whether any step was on averaged gradients.
    """

    wrapper: weakref.ref[DistributedDataParallel]
    indices: set[int]
    ranks: int
    thawed: bool = False
    ignored: bool = False
    arrived: set[int] = field(default_factory=set)
    reduced: bool = False
    ends_reduced: bool = False
    is_held: bool = False
    gradients: _Sample | None = None
    weights: _Sample | None = None
    step: int = 0
    in_a_row: int = 0
    reduced_before: bool = False
    _begun: bool = False

    def begin(self) -> None:
        """Begins a new window."""
        self.arrived, self.reduced, self.gradients = set(), False, None

    def reduces(self) -> bool:
        """Returns whether the backward that is running is reduced, or torch does not tell."""
        wrapper = self.wrapper()
        if self.thawed or self.ignored or wrapper is None:
            return False
        before, self._begun = self._begun, can_hold(wrapper)
        # The first reduction of a static graph does not show.
        return is_reducing(wrapper) is not False or (
            self._begun and not before and bool(wrapper.static_graph)
        )

    @property
    def is_held_back(self) -> bool:
        """Whether the wrapper runs under ``no_sync()`` now."""
        wrapper = self.wrapper()
        return wrapper is not None and not wrapper.require_backward_grad_sync

    @property
    def weights_moved(self) -> bool:
        """Whether something other than the optimizer has changed the weights since the step."""
        return self.weights is not None and self.weights.change() is Change.OTHER

    @property
    def certain_after(self) -> int:
        """Steps in a row after which it is certain that nobody averages the gradients."""
        if self.is_held:
            return CERTAIN_HELD
        return CERTAIN_LATER if self.reduced_before else CERTAIN

    @property
    def text(self) -> str:
        """What is told about it."""
        if self.ignored:
            return IGNORED
        return THAWED if self.thawed else HELD_BACK if self.is_held else NOT_REDUCED

    def is_suspect(self, change: Change) -> bool:
        """Returns whether a change of the gradients before the step was no mean over ranks."""
        # A mean over ranks with equal gradients writes the same values, and so does a clip by a
        # coefficient of 1. Someone who calls no_sync() may well take means by hand.
        careful = self.is_held or self.thawed or self.ignored
        return change in (Change.NONE, Change.SCALED) or (change is Change.SAME and not careful)


class Change(enum.Enum):
    """What has happened to some tensors since they were sampled."""

    NONE = "nobody has written to them"
    SAME = "somebody has written the same values"
    SCALED = "all were multiplied by one factor, as a clip does"
    OTHER = "they have other values"
    UNKNOWN = "they are gone, or all zero, or not finite"


class _Sample:
    """A few elements of some tensors, to see later what has happened to them."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        dense = [one for one in tensors if one.layout is torch.strided and one.numel()]
        self._tensors = dense[:: len(dense) // SAMPLED_TENSORS + 1]
        self._versions = self._read_versions()
        self._values = self._read()

    def change(self) -> Change:
        """Returns what has happened since; waits for the device."""
        now = self._read()
        size = float(self._values.norm())
        if not (0 < size < math.inf) or not bool(now.isfinite().all()):
            return Change.UNKNOWN
        if torch.equal(now, self._values):
            return Change.NONE if self._versions == self._read_versions() else Change.SAME
        factor = float(now @ self._values) / size**2
        rest = float((now - factor * self._values).norm())
        precision = max(torch.finfo(one.dtype).eps for one in self._tensors)
        return Change.SCALED if rest <= 8 * precision * abs(factor) * size else Change.OTHER

    def _read(self) -> Tensor:
        if not self._tensors:
            return torch.zeros(0, dtype=torch.float64, device="cpu")
        return joined([_elements(one) for one in self._tensors])

    def _read_versions(self) -> list[int]:
        return [one._version for one in self._tensors]


def _elements(tensor: Tensor) -> Tensor:
    flat = tensor.detach().reshape(-1)
    some = flat[:: flat.numel() // SAMPLED_ELEMENTS + 1]
    return in_double(torch.view_as_real(some).reshape(-1) if some.is_complex() else some)
