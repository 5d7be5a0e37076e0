"""Random sequences of backwards, zero_grads, clips, guards and steps, against a model of what must be recorded.

Two optimizers step parameters of their own, so that their windows are independent. The model of one of
them is a list of the backwards since its gradients were last zeroed: a step is a row of that list, a
zero_grad or the end of the run without a step is an event `discarded` of it.

The backwards reach some of the parameters only. So not each of them is a micro-batch of its own.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from .loops import WAYS, norm_of, warnings_of_gradwatch, watched

OWNED = {"SGD": ("a", "b"), "Adam": ("c", "d", "e")}
"""The parameters of each optimizer."""

labels = st.sampled_from(sorted(OWNED))
backwards = st.tuples(
    st.just("backward"),
    labels,
    st.integers(1, 7),  # which of its parameters: a bit each
    st.sampled_from([1.0, 1e-3, 30.0]),
    st.sampled_from([False, False, False, True]),  # whether one of them receives a NaN
)
ends = st.tuples(
    st.sampled_from(["step", "step", "throw"]),
    labels,
    st.booleans(),  # whether zero_grad sets to None
    st.booleans(),  # whether the loop clips before
)
calls = st.lists(st.one_of(backwards, ends), max_size=30)
how_many = pytest.mark.parametrize("examples", [10, pytest.param(60, marks=pytest.mark.slow)])


@dataclass
class Model:
    """What must be recorded of one optimizer.

    Attributes:
        window: Of each backward since the last zero_grad, the positions of the parameters that it
            reached, and whether it brought a NaN.
        rows: Micro-batches and norm of each step.
        thrown: Step, norm, and the first bad backward (0 without one) of each event.
    """

    window: list[tuple[frozenset[int], bool]] = field(default_factory=list)
    rows: list[tuple[int, float]] = field(default_factory=list)
    thrown: list[tuple[int, float, int]] = field(default_factory=list)

    @property
    def bad(self) -> list[bool]:
        """Return which backwards of the window brought a NaN."""
        return [bad for _, bad in self.window]

    def step(self, norm: float) -> None:
        """Record a step over the window."""
        self.rows.append((_micro_batches([reached for reached, _ in self.window]), norm))
        self.window.clear()

    def throw(self, norm: float) -> None:
        """Record that the window was thrown away, if there is one."""
        if self.window:
            bad = self.bad.index(True) + 1 if any(self.bad) else 0
            self.thrown.append((len(self.rows) + 1, norm, bad))
            self.window.clear()


def _micro_batches(window: list[frozenset[int]]) -> int:
    """Return the micro-batches of two or three parameters.

    One of three parameters is less than half of all: if the same one comes equally often, twice or
    more, before each backward of all, these are parts of it. Of backwards that have no parameter in
    common, each kind sees every micro-batch.
    """
    row = [len(one) for one in window].index(3) + 1 if len(window[-1]) == 3 else 0
    in_parts = row > 2 and len(window[0]) == 1
    in_parts = in_parts and window == [*[window[0]] * (row - 1), window[-1]] * (len(window) // row)
    whole = [window[-1]] * (len(window) // row) if in_parts else window
    groups: list[frozenset[int]] = []
    for one in whole:
        overlapping = [group for group in groups if group & one]
        groups = [group for group in groups if not group & one] + [one.union(*overlapping)]
    return min(sum(one <= group for one in whole) for group in groups)


class Loop:
    """A loop that does what it is told, and keeps the model of both optimizers."""

    def __init__(self) -> None:
        names = [name for owned in OWNED.values() for name in owned]
        self.leaves = {name: torch.ones(3 + i, requires_grad=True) for i, name in enumerate(names)}
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            "SGD": torch.optim.SGD(self.owned("SGD"), lr=0.1),
            "Adam": torch.optim.Adam(self.owned("Adam"), lr=0.1),
        }
        self.models = {label: Model() for label in OWNED}

    def owned(self, label: str) -> list[Tensor]:
        """Return the parameters of an optimizer."""
        return [self.leaves[name] for name in OWNED[label]]

    def norm(self, label: str) -> float:
        """Return the norm of the gradients of an optimizer as they are now."""
        return norm_of(self.owned(label))

    def backward(self, label: str, bits: int, scale: float, bad: bool) -> None:
        """Run a backward into some parameters of one optimizer."""
        everything = range(len(OWNED[label]))
        reached = [i for i in everything if bits >> i & 1] or everything
        losses = [(self.owned(label)[i] * scale).sum() for i in reached]
        if bad:
            losses[-1] = losses[-1] * math.nan
        sum(losses).backward()
        self.models[label].window.append((frozenset(reached), bad))

    def end(self, kind: str, label: str, to_none: bool, clips: bool) -> None:
        """Step, or throw the window away; the guard throws away every window with a NaN."""
        model, optimizer = self.models[label], self.optimizers[label]
        if not model.window:
            return
        norm = self.norm(label)
        if clips:
            nn.utils.clip_grad_norm_(self.owned(label), 0.5)
        if kind == "throw" or any(model.bad):
            model.throw(norm)
        else:
            model.step(norm)
            optimizer.step()
        optimizer.zero_grad(set_to_none=to_none)

    def close(self) -> None:
        """What is left at the end of the run is thrown away."""
        for label, model in self.models.items():
            model.throw(self.norm(label))


def _do(sequence: list[Any], way: str) -> tuple[Loop, Any, list[str]]:
    loop = Loop()
    with (
        warnings_of_gradwatch() as told,
        watched(way, loop.leaves, *loop.optimizers.values()) as watcher,
    ):
        if way == "found":  # before, nothing tells whose parameters belong together
            for label in OWNED:
                loop.backward(label, 7, 1.0, False)
                loop.end("step", label, True, False)
        for kind, label, *arguments in sequence:
            if kind == "backward":
                loop.backward(label, *arguments)
            else:
                loop.end(kind, label, *arguments)
        for label in OWNED:  # each steps once at least, so that it can be found
            loop.end("step", label, True, False)
            loop.backward(label, 7, 1.0, False)
            loop.end("step", label, True, False)
        for label, bits in (("SGD", 0), ("Adam", len(sequence) % 8)):
            if bits:
                loop.backward(label, bits, 2.0, False)
        loop.close()
    return loop, watcher, told


def _is_recorded(sequence: list[Any], way: str) -> None:
    loop, watcher, told = _do(sequence, way)
    steps = watcher.history.steps()
    told_of = [event for event in watcher.events if event.kind != "no_gradient"]
    assert len(told) <= 1, told
    for label, model in loop.models.items():
        mine = steps[steps["optimizer"] == label]
        got = list(zip(mine["micro_batches"], mine["grad_norm"], strict=True))
        assert [count for count, _ in got] == [count for count, _ in model.rows], f"{label}: {got}"
        assert [norm for _, norm in got] == pytest.approx([norm for _, norm in model.rows])
        events = [event for event in told_of if event.optimizer == label]
        seen = [(event.kind, event.step, event.micro_batch) for event in events]
        wanted = []
        for step, _, bad in model.thrown:
            wanted += [("nan", step, bad)] if bad else []
            wanted += [("discarded", step, 0)]
        assert seen == wanted, f"{label}: expected {wanted}, got {seen}"
        values = [event.value for event in events if event.kind == "discarded"]
        assert values == pytest.approx([norm for _, norm, _ in model.thrown], nan_ok=True)
    assert set(steps["optimizer"]) == set(OWNED)
    assert {event.optimizer for event in told_of} <= set(OWNED)


def _is_told_nothing(sequence: list[Any], way: str) -> None:
    kept = [
        (kind, label, *rest[:-1], False) if kind == "backward" else ("step", label, *rest)
        for kind, label, *rest in sequence
    ]
    loop = Loop()
    with (
        warnings_of_gradwatch() as told,
        watched(way, loop.leaves, *loop.optimizers.values()) as watcher,
    ):
        for kind, label, *arguments in kept:
            if kind == "backward":
                loop.backward(label, *arguments)
            else:
                loop.end(kind, label, *arguments)
        for label in OWNED:
            loop.backward(label, 7, 1.0, False)
            loop.end("step", label, True, False)
    steps = watcher.history.steps()
    for label, model in loop.models.items():
        mine = steps[steps["optimizer"] == label]
        assert list(mine["micro_batches"]) == [count for count, _ in model.rows]
        assert list(mine["grad_norm"]) == pytest.approx([norm for _, norm in model.rows])
    assert [event for event in watcher.events if event.kind != "no_gradient"] == []
    assert told == []


def _for_sequences(examples: int, check: Callable[[list[Any], str], None], way: str) -> None:
    @settings(max_examples=examples)
    @given(sequence=calls)
    def with_one(sequence: list[Any]) -> None:
        check(sequence, way)

    with_one()


@pytest.mark.parametrize("way", WAYS)
@how_many
def test_whatever_a_loop_calls_is_recorded(way: str, examples: int) -> None:
    """Steps are rows, what no step used is an event, each with its norm, its micro-batches and its NaN."""
    _for_sequences(examples, _is_recorded, way)


@pytest.mark.parametrize("way", WAYS)
@how_many
def test_without_anything_thrown_away_nothing_is_told(way: str, examples: int) -> None:
    """The same sequences, where every window is stepped: rows, and not one event or warning."""
    _for_sequences(examples, _is_told_nothing, way)
