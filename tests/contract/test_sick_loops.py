"""Sick training loops as people write them: each is named, once, by a warning, an event or a finding.

The first half throws gradients away, and writes down itself, with `run.throw(optimizer)`, which event
must be recorded. The second half makes mistakes of other kinds; the table says what must be told of them.
"""

import collections
import contextlib
import copy
import functools
import gc
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import gradwatch
from gradwatch.testing import CapturingSink
from tests.support import processes

from .loops import (
    WAYS,
    Loop,
    Watch,
    adam,
    inputs,
    loss_of,
    net,
    norm_of,
    sgd,
    warnings_of_gradwatch,
)

STEPS = 16
MANY = 60
both_ways = pytest.mark.parametrize("way", WAYS)
to_none_or_zero = pytest.mark.parametrize("to_none", [True, False], ids=["to_none", "to_zero"])


def poisoned(model: Any, index: int, scale: float = 1.0) -> Tensor:
    """Return the loss of a batch with a NaN among its inputs."""
    x = inputs(index)
    x[0, 0] = math.nan
    return model(x).square().mean() * scale


def bad(index: int) -> bool:
    """Say whether batch `index` is a bad one: every fourth."""
    return index % 4 == 2


# -- gradients that are thrown away ------------------------------------------------------------------

THROWING: dict[str, Loop] = {}


def throws(loop: Loop) -> Loop:
    """Add a loop to the table of those that throw gradients away."""
    THROWING[loop.__name__.strip("_")] = loop
    return loop


@throws
def _guard_on_the_norm(watch: Watch) -> None:
    model = net()
    optimizer = adam(model)
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            optimizer.zero_grad()
            (poisoned if bad(i) else loss_of)(model, i).backward()
            if bad(i):
                run.throw(optimizer, 1, 1)
            else:
                run.row(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if norm.isfinite():
                optimizer.step()


@throws
def _guard_that_zeroes_in_place(watch: Watch) -> None:
    model = net()
    optimizer = sgd(model)
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            optimizer.zero_grad(set_to_none=False)
            (poisoned if bad(i) else loss_of)(model, i).backward()
            if bad(i):
                run.throw(optimizer, 1, 1)
                continue
            run.row(optimizer)
            optimizer.step()


@throws
def _guard_that_zeroes_at_once(watch: Watch) -> None:
    model = net()
    optimizer = sgd(model)
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            (poisoned if bad(i) else loss_of)(model, i).backward()
            if not all(p.grad.isfinite().all() for p in model.parameters()):
                run.throw(optimizer, 1, 1)
                for p in model.parameters():
                    p.grad = None
                continue
            run.row(optimizer)
            optimizer.step()
            optimizer.zero_grad()


@throws
def _guard_on_the_loss_after_the_backward(watch: Watch) -> None:
    model = net()
    optimizer = sgd(model)
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            optimizer.zero_grad()
            loss = loss_of(model, i, 100.0 if bad(i) else 1.0)
            loss.backward()
            if bad(i):  # loss > 10 * average
                run.throw(optimizer)
                continue
            run.row(optimizer)
            optimizer.step()


@throws
def _guard_by_an_error(watch: Watch) -> None:
    model = net()
    optimizer = sgd(model)
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            optimizer.zero_grad()
            (poisoned if bad(i) else loss_of)(model, i).backward()
            if bad(i):
                run.throw(optimizer, 1, 1)
            else:
                run.row(optimizer)
            try:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
            except RuntimeError:
                continue
            optimizer.step()


@throws
def _guard_on_a_finite_norm_after_a_clip(watch: Watch) -> None:
    model = net()
    optimizer = sgd(model)
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            loss_of(model, i, 100.0 if bad(i) else 0.1).backward()
            if bad(i):
                run.throw(optimizer)
            else:
                run.row(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            assert (norm > 20) == bad(i)
            if norm <= 20:
                optimizer.step()
            optimizer.zero_grad()


@throws
def _guard_with_a_scaler(watch: Watch) -> None:
    model = net()
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=5)
    with watch(model, optimizer, scaler=scaler) as run:
        for i in range(STEPS):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, i, 100.0 if bad(i) else 1.0)).backward()
            scaler.unscale_(optimizer)
            if bad(i):
                run.throw(optimizer)
            else:
                run.row(optimizer)
                scaler.step(optimizer)
            scaler.update()


@throws
def _guard_on_the_loss_with_a_scaler_that_is_found(watch: Watch) -> None:
    model = net()
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, i, 100.0 if bad(i) else 1.0)).backward()
            if bad(i):
                run.throw(optimizer, scale=scaler.get_scale())
                continue
            run.row(optimizer, scale=scaler.get_scale())
            scaler.step(optimizer)
            scaler.update()


@throws
def _guard_over_a_window(watch: Watch) -> None:
    model = net()
    optimizer = adam(model)
    with watch(model, optimizer) as run:
        for window in range(STEPS // 2):
            for i in range(3):
                loss_of(model, 3 * window + i, 100.0 if bad(window) else 1.0).backward()
            if bad(window):
                run.throw(optimizer, 3)
            else:
                run.row(optimizer, 3)
                optimizer.step()
            optimizer.zero_grad()


@throws
def _a_nan_in_the_second_micro_batch_of_a_window_thrown_away(watch: Watch) -> None:
    model = net()
    optimizer = sgd(model)
    with watch(model, optimizer) as run:
        for window in range(STEPS // 2):
            for i in range(3):
                loss = poisoned if bad(window) and i == 1 else loss_of
                loss(model, 3 * window + i, 1 / 3).backward()
            if bad(window):
                run.throw(optimizer, 3, 2)
            else:
                run.row(optimizer, 3)
                optimizer.step()
            optimizer.zero_grad()


@throws
def _window_begun_again_after_a_nan(watch: Watch) -> None:
    model = net()
    optimizer = sgd(model)
    with watch(model, optimizer) as run:
        window = 0
        for i in range(STEPS):
            loss = poisoned(model, i) if i == 7 else loss_of(model, i, 1 / 3)
            loss.backward()
            window += 1
            if i == 7:
                run.throw(optimizer, window, window)
                optimizer.zero_grad()
                window = 0
            elif window == 3:
                run.row(optimizer, 3)
                optimizer.step()
                optimizer.zero_grad()
                window = 0
        if window:
            run.throw(optimizer, window)


@throws
def _zero_grad_inside_the_accumulation(watch: Watch) -> None:
    model = net()
    optimizer = sgd(model)
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            optimizer.zero_grad()  # belongs behind the step
            loss_of(model, i, 1 / 4).backward()
            if i % 4 == 3:
                run.row(optimizer)
                optimizer.step()
            else:
                run.throw(optimizer)


@throws
def _micro_batches_left_over_at_each_epoch(watch: Watch) -> None:
    model = net()
    optimizer = sgd(model)
    with watch(model, optimizer) as run:
        for epoch in range(3):
            optimizer.zero_grad()
            for i in range(8):
                loss_of(model, 8 * epoch + i, 1 / 3).backward()
                if i % 3 == 2:
                    run.row(optimizer, 3)
                    optimizer.step()
                    optimizer.zero_grad()
            run.throw(optimizer, 2)


@throws
def _first_batches_thrown_away(watch: Watch) -> None:
    model = net()
    optimizer = adam(model)
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            if i < 3:
                run.throw(optimizer)
                continue
            run.row(optimizer)
            optimizer.step()


@throws
def _several_in_a_row_thrown_away(watch: Watch) -> None:
    model = net()
    optimizer = adam(model)
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            optimizer.zero_grad()
            (poisoned if 5 <= i < 9 else loss_of)(model, i).backward()
            if 5 <= i < 9:
                run.throw(optimizer, 1, 1)
                continue
            run.row(optimizer)
            optimizer.step()


@throws
def _last_batch_thrown_away(watch: Watch) -> None:
    model = net()
    optimizer = adam(model)
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            if i == STEPS - 1:
                run.throw(optimizer)
                break
            run.row(optimizer)
            optimizer.step()


@throws
def _one_head_thrown_away_before_the_other(watch: Watch) -> None:
    torch.manual_seed(0)
    model = nn.ModuleList([net(1), net(2)])
    optimizer = sgd(model)
    with watch(model, optimizer) as run:
        for i in range(STEPS):
            loss_of(model[0], i, 100.0).backward()  # looked at, and thrown away
            run.throw(optimizer)
            optimizer.zero_grad()
            loss_of(model[1], i).backward()
            run.row(optimizer)
            optimizer.step()
            optimizer.zero_grad()


@throws
def _a_guard_over_two_optimizers(watch: Watch) -> None:
    model = net()
    one, two = sgd(model[0]), adam(model[2])
    with watch(model, one, two) as run:
        for i in range(STEPS):
            model.zero_grad()
            loss_of(model, i, 100.0 if bad(i) else 1.0).backward()
            if bad(i):
                for optimizer, part in ((one, model[0]), (two, model[2])):
                    run.throw(optimizer)
                    run.thrown[-1].norm = norm_of(part.parameters())
                continue
            for optimizer in (one, two):
                run.row(optimizer)
                optimizer.step()


@functools.cache
def _run(loop: Loop, way: str) -> tuple[Watch, list[str]]:
    watch = Watch(way)
    with warnings_of_gradwatch() as told:
        torch.manual_seed(0)
        try:
            loop(watch)
        except (ValueError, TypeError, RuntimeError) as error:
            watch.refused = error
    return watch, told


THROWN_EITHER_WAY = [pytest.param(name, way, id=f"{name}-{way}") for name in THROWING for way in WAYS]  # fmt: skip


@pytest.mark.parametrize(("name", "way"), THROWN_EITHER_WAY)
def test_what_is_thrown_away_is_an_event(name: str, way: str) -> None:
    """Its step, norm, micro-batches and NaN are exact; the rows are those of the steps taken."""
    watch, told = _run(THROWING[name], way)
    assert watch.refused is None, f"{name}, optimizers {way}: {watch.refused}"
    wrong = []
    for run in watch.runs:
        wrong += [*run.differences(), *run.differences_of_thrown()]
        nans = [event for event in run.watcher.events if event.kind == "nan"]
        # A NaN in the loss reaches all of the model: the head is the first in backward order.
        wrong += [
            f"expected a NaN in 2.*, got {e}" for e in nans if not e.parameter.startswith("2.")
        ]
    assert not wrong, "\n".join([f"{name}, optimizers {way}:", *wrong])
    assert len(told) <= 1, f"{name}, optimizers {way}: expected one warning at most, got {told}"


@pytest.mark.parametrize(("name", "way"), THROWN_EITHER_WAY)
def test_the_report_names_a_loop_that_throws_away(name: str, way: str) -> None:
    """A finding of kind discarded says how many were thrown away."""
    watch, _ = _run(THROWING[name], way)
    (run,) = watch.runs
    findings = {finding.kind: finding for finding in run.watcher.report().findings}
    assert "discarded" in findings, f"{name}, optimizers {way}: expected discarded, got {list(findings)}"  # fmt: skip
    steps = {thrown.step for thrown in run.thrown}
    text = str(findings["discarded"])
    counts = {str(len(run.thrown)), str(len(steps))}
    assert any(count in text for count in counts), f"{name}: expected {counts} in {text}"


@both_ways
def test_a_loop_that_throws_away_for_long_does_not_drown_the_events(way: str) -> None:
    """Of very many discarded steps memory keeps a limited number of events; the report has the exact count."""

    def loop(watch: Watch) -> None:
        model = nn.Linear(1, 1)
        optimizer = sgd(model, lr=1e-3)
        x = torch.ones(1, 1)
        with watch(model, optimizer, buffer_size=64) as run:
            for i in range(4 * thrown):
                optimizer.zero_grad()
                model(x).sum().backward()
                if i % 4:
                    optimizer.step()
            run.rows.clear()

    thrown = 600
    watch, told = _run(loop, way)
    (run,) = watch.runs
    kept = [event for event in run.watcher.events if event.kind == "discarded"]
    assert 1 <= len(kept) <= thrown, f"expected 1 to {thrown} events, got {len(kept)}"
    text = str(run.watcher.report()).replace(",", "")
    assert str(thrown) in text, f"expected {thrown} in the report, got {text[:500]}"
    assert len(told) <= 1, told


@both_ways
def test_discarded_events_reach_a_sink(way: str) -> None:
    """A sink receives them once each, with the NaN before."""
    sink = CapturingSink()

    def loop(watch: Watch) -> None:
        model = net()
        optimizer = sgd(model)
        with watch(model, optimizer, sinks=[sink]) as run:
            for i in range(STEPS):
                optimizer.zero_grad()
                (poisoned if bad(i) else loss_of)(model, i).backward()
                if bad(i):
                    run.throw(optimizer, 1, 1)
                    continue
                run.row(optimizer)
                optimizer.step()

    _run(loop, way)
    kinds = [event.kind for event in sink.events]
    assert kinds == ["nan", "discarded"] * (STEPS // 4), f"optimizers {way}: got {kinds}"
    assert len(sink.steps) == STEPS - STEPS // 4


@both_ways
@to_none_or_zero
def test_zero_grad_between_backward_and_step(to_none: bool, way: str) -> None:
    """Every backward is thrown away though the optimizer steps: discarded events, and one warning at most."""

    def loop(watch: Watch) -> None:
        model = net()
        optimizer = sgd(model)
        with watch(model, optimizer) as run:
            for i in range(STEPS):
                loss_of(model, i).backward()
                norms.append(norm_of(model.parameters()))
                optimizer.zero_grad(set_to_none=to_none)
                optimizer.step()
            del run

    norms: list[float] = []
    watch, told = _run(loop, way)
    (run,) = watch.runs
    values = [event.value for event in run.watcher.events if event.kind == "discarded"]
    assert values == pytest.approx(norms, rel=1e-5), f"optimizers {way}: told {told}"
    assert len(told) <= 1, told


@both_ways
@to_none_or_zero
def test_a_guard_that_zeroes_and_steps_all_the_same(to_none: bool, way: str) -> None:
    """A poisoned gradient that is zeroed before the step is a nan event and a discarded one."""

    def loop(watch: Watch) -> None:
        model = net()
        optimizer = adam(model)
        with watch(model, optimizer):
            for i in range(STEPS):
                optimizer.zero_grad()
                (poisoned if bad(i) else loss_of)(model, i).backward()
                if bad(i):
                    optimizer.zero_grad(set_to_none=to_none)
                optimizer.step()

    watch, told = _run(loop, way)
    kinds = collections.Counter(event.kind for event in watch.runs[0].watcher.events)
    wanted = STEPS // 4
    assert kinds["nan"] == wanted, f"optimizers {way}: expected {wanted} nan events, got {kinds}"
    assert kinds["discarded"] == wanted, f"optimizers {way}: expected {wanted} discarded, got {kinds}"  # fmt: skip
    assert len(told) <= 1, told


def test_what_was_thrown_away_makes_no_noise_scale() -> None:
    """A backward of another head that zero_grad() threw away is no micro-batch of the next step."""
    a, b = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    optimizer = torch.optim.SGD([a, b], lr=0.1)
    with gradwatch.watch({"a": a, "b": b}, optimizer) as watcher:
        (100 * a).sum().backward()
        optimizer.zero_grad()
        b.sum().backward()
        optimizer.step()
    assert watcher.last.micro_batches == 1
    assert math.isnan(watcher.last.noise_scale)
    assert math.isnan(watcher.noise_scale.tr_sigma)


# -- mistakes of other kinds ----------------------------------------------------------------------------


class Sick(NamedTuple):
    """A loop, how it can be watched, and what must be told of it.

    Attributes:
        kinds: Kinds of events or findings, one of which must appear.
        words: Words, one of which must be in a warning, or in the text of an event or of a finding.
        warns: Whether it must be a warning.
        refused: Whether an error of watch() or of the loop that has one of the words does as well.
    """

    loop: Loop
    ways: tuple[str, ...]
    kinds: frozenset[str]
    words: tuple[str, ...]
    warns: bool
    refused: bool


SICK: dict[str, Sick] = {}


def sick(
    *words: str,
    kinds: tuple[str, ...] = ("changed", "mistake"),
    ways: tuple[str, ...] = WAYS,
    warns: bool = False,
    refused: bool = False,
) -> Callable[[Loop], Loop]:
    """Add a loop to the table."""

    def add(loop: Loop) -> Loop:
        name = loop.__name__.strip("_")
        SICK[name] = Sick(loop, ways, frozenset(kinds), words, warns, refused)
        return loop

    return add


def train(model: Any, *optimizers: Any, first: int = 0, steps: int = MANY) -> None:
    """Train as usual, zero_grad at the start."""
    for i in range(first, first + steps):
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss_of(model, i).backward()
        for optimizer in optimizers:
            optimizer.step()


@sick("zero_grad", kinds=("mistake", "accumulating"), warns=True)
def _forgotten_zero_grad(watch: Watch) -> None:
    model = net()
    optimizer = sgd(model, lr=1e-4)
    with watch(model, optimizer):
        for i in range(MANY):
            loss_of(model, i).backward()
            optimizer.step()


@sick("zero_grad", kinds=("mistake", "accumulating"), warns=True)
def _forgotten_zero_grad_of_adam_with_a_clip(watch: Watch) -> None:
    model = net()
    optimizer = adam(model)
    with watch(model, optimizer):
        for i in range(MANY):
            loss_of(model, i).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()


@sick("zero_grad", kinds=("mistake", "accumulating"), warns=True)
def _zero_grad_of_another_optimizer(watch: Watch) -> None:
    model, other = net(), net(1)
    optimizer, wrong = sgd(model, lr=1e-4), sgd(other)
    with watch(model, optimizer):
        for i in range(MANY):
            wrong.zero_grad()
            loss_of(model, i).backward()
            optimizer.step()


@sick("step", ways=("named",), warns=True)
def _forgotten_step(watch: Watch) -> None:
    model = net()
    optimizer = sgd(model)
    with watch(model, optimizer):
        for i in range(200):
            optimizer.zero_grad()
            loss_of(model, i).backward()


@sick("step", ways=("found",))
def _forgotten_step_of_an_optimizer_that_is_not_named(watch: Watch) -> None:
    model = net()
    optimizer = sgd(model)
    with watch(model):
        for i in range(200):
            optimizer.zero_grad()
            loss_of(model, i).backward()


@sick("step", ways=("named",), warns=True)
def _scheduler_steps_and_the_optimizer_does_not(watch: Watch) -> None:
    model = net()
    optimizer = sgd(model)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    optimizer.step = lambda closure=None: None  # a framework's no-op, in the place of step()
    with watch(model, optimizer):
        for i in range(200):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            scheduler.step()


@sick("clip", ways=("named",), warns=True)
def _clip_and_no_step(watch: Watch) -> None:
    model = net()
    optimizer = sgd(model)
    with watch(model, optimizer, clip=1.0):
        for i in range(MANY):
            optimizer.zero_grad()
            loss_of(model, i).backward()


@sick("clip", ways=("found",), warns=True)
def _clip_and_no_optimizer(watch: Watch) -> None:
    model = net()
    with watch(model, clip=1.0):
        for i in range(MANY):
            model.zero_grad()
            loss_of(model, i).backward()
            for p in model.parameters():
                p.data.add_(p.grad, alpha=-0.01)


@sick("on_nonfinite", "skip", ways=("found",), warns=True)
def _skip_and_no_optimizer(watch: Watch) -> None:
    model = net()
    with watch(model, on_nonfinite="skip"):
        for i in range(MANY):
            model.zero_grad()
            loss_of(model, i).backward()
            with torch.no_grad():
                for p in model.parameters():
                    p.sub_(p.grad, alpha=0.01)


@sick("optimizer", ways=("named",), warns=True)
def _another_optimizer_steps(watch: Watch) -> None:
    model = net()
    named, used = sgd(model), sgd(model)
    with watch(model, named, clip=1.0):
        train(model, used)


@sick("copy", "another", "not the", "backward", warns=True)
def _a_copy_is_trained(watch: Watch) -> None:
    model = net()
    optimizer = sgd(model)
    with watch(model, optimizer):
        trained = copy.deepcopy(model)
        train(trained, adam(trained))


@sick("not the", "another", "backward", warns=True)
def _a_model_built_anew_is_trained(watch: Watch) -> None:
    model = net()
    optimizer = sgd(model)
    with watch(model, optimizer):
        model = net(1)
        train(model, sgd(model))


@sick("requires_grad", "frozen", "parameter")
def _adapters_are_added_and_the_base_frozen(watch: Watch) -> None:
    model = net()
    optimizer = sgd(model)
    with watch(model, optimizer):
        model.requires_grad_(False)
        adapter = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 1, bias=False))
        model.add_module("adapter", adapter)
        train(lambda x: model[2](model[1](model[0](x))) + adapter(x), adam(adapter))


@sick("2.weight", "parameter", refused=True)
def _head_replaced_after_the_optimizer_was_built(watch: Watch) -> None:
    model = net()
    optimizer = sgd(model)
    model[2] = nn.Linear(8, 1)
    with watch(model, optimizer):
        train(model, optimizer)


@sick("2.weight", "parameter")
def _head_replaced_on_the_way(watch: Watch) -> None:
    model = net()
    optimizer = sgd(model)
    with watch(model, optimizer):
        train(model, optimizer)
        model[2] = nn.Linear(8, 1)
        train(model, optimizer)


@sick("0.weight", "parameter", refused=True)
def _a_parameter_replaced_after_the_optimizer_was_built(watch: Watch) -> None:
    model = net()
    optimizer = adam(model)
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    with watch(model, optimizer):
        train(model, optimizer)


@sick("0.weight", "parameter")
def _parameters_assigned_on_the_way(watch: Watch) -> None:
    model = net()
    optimizer = adam(model)
    with watch(model, optimizer):
        train(model, optimizer)
        model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
        train(model, optimizer)


@sick("moved", "replaced", "parameter")
def _a_move_that_replaces_the_parameters(watch: Watch) -> None:
    model = net()
    optimizer = sgd(model)
    with watch(model, optimizer):
        train(model, optimizer, steps=20)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        try:
            model.double().float()
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(False)
        train(model, optimizer)


@sick("parameter", "not the", refused=True)
def _optimizer_of_a_copy(watch: Watch) -> None:
    model = net()
    optimizer = sgd(copy.deepcopy(model))
    with watch(model, optimizer):
        train(model, optimizer)


@sick("requires_grad", "frozen", "0.weight")
def _frozen_by_accident(watch: Watch) -> None:
    model = net()
    optimizer = adam(model)
    with watch(model, optimizer):
        train(model, optimizer, steps=20)
        model[0].requires_grad_(False)  # as saving an adapter did
        train(model, optimizer)


@sick("requires_grad", "frozen", "2.bias")
def _one_parameter_frozen_by_accident(watch: Watch) -> None:
    model = net()
    optimizer = sgd(model)
    with watch(model, optimizer):
        for i in range(MANY):
            if i == 20:
                model[2].bias.requires_grad = False
            loss_of(model, i).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)


@sick("0.weight", "parameter", "lost", "removed")
def _the_optimizer_loses_parameters(watch: Watch) -> None:
    model = net()
    optimizer = sgd(model)
    with watch(model, optimizer):
        train(model, optimizer, steps=20)
        optimizer.param_groups[0]["params"] = list(model[2].parameters())
        for i in range(MANY):
            model.zero_grad()
            loss_of(model, i).backward()
            optimizer.step()


@sick("parameter", "lost", "removed", "empty")
def _the_optimizer_loses_all_groups(watch: Watch) -> None:
    model = net()
    optimizer = adam(model)
    with watch(model, optimizer):
        train(model, optimizer, steps=20)
        optimizer.param_groups.clear()
        for i in range(MANY):
            model.zero_grad()
            loss_of(model, i).backward()
            optimizer.step()


@sick("2.weight", "parameter", ways=("found",))
def _a_part_that_no_optimizer_has(watch: Watch) -> None:
    model = net()
    optimizer = sgd(model[0])
    with watch(model):
        train(model, optimizer)


@sick("watcher.backward", "backward", ways=("named",), warns=True)
def _managed_step_after_a_backward_of_ones_own(watch: Watch) -> None:
    model = net()
    optimizer = sgd(model)
    with watch(model, optimizer, clip=1.0) as run:
        for i in range(200):
            loss_of(model, i).backward()
            run.watcher.step()


@sick(
    "detach", "gradient", "backward", kinds=("changed", "mistake", "no_gradient"), ways=("named",)
)
def _a_layer_cut_off_by_detach(watch: Watch) -> None:
    model = net()
    optimizer = sgd(model)
    with watch(model, optimizer):
        train(lambda x: model[2](model[1](model[0](x)).detach()), optimizer)


@sick("detach", "gradient", "backward", kinds=("changed", "mistake", "no_gradient"))
def _all_cut_off_by_detach(watch: Watch) -> None:
    model = net()
    optimizer = sgd(model)
    with watch(model, optimizer):
        for i in range(MANY):
            optimizer.zero_grad()
            (model(inputs(i)).detach().requires_grad_() - 1).square().mean().backward()
            optimizer.step()


@sick("clip", kinds=("mistake",))
def _a_clip_between_two_micro_batches(watch: Watch) -> None:
    model = net()
    optimizer = sgd(model)
    with watch(model, optimizer):
        for i in range(MANY):
            loss_of(model, i, 100.0).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if i % 2:
                optimizer.step()
                optimizer.zero_grad()


@sick("both", kinds=("mistake",), warns=True)
def _a_clip_beside_that_of_gradwatch(watch: Watch) -> None:
    model = net()
    optimizer = sgd(model)
    with watch(model, optimizer, clip=0.5):
        for i in range(STEPS):
            loss_of(model, i, 100.0).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()


class _Opaque:
    """Wraps an optimizer in a way that nothing could guess."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.zero_grad, self.step = optimizer.zero_grad, optimizer.step


@sick("optimizer", ways=("named",), refused=True)
def _a_wrapper_that_cannot_be_followed(watch: Watch) -> None:
    model = net()
    optimizer = _Opaque(sgd(model))
    with watch(model, optimizer, clip=1.0):
        train(model, optimizer)


class _Masters(torch.optim.Optimizer):
    """Holds the parameters, and steps copies of them by an optimizer of its own."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})
        self.pairs = [(p, p.detach().clone()) for p in self.param_groups[0]["params"]]
        self.steps_copies = torch.optim.SGD([copied for _, copied in self.pairs], lr=0.05)

    def apply(self) -> None:
        for p, copied in self.pairs:
            copied.grad = p.grad.clone()
        self.steps_copies.step()
        for p, copied in self.pairs:
            p.data.copy_(copied)


@sick("optimizer", "step", ways=("named",), warns=True)
def _a_named_optimizer_whose_step_is_never_called(watch: Watch) -> None:
    model = net()
    optimizer = _Masters(model.parameters())
    with watch(model, optimizer, clip=1.0):
        for i in range(MANY):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            optimizer.apply()


@sick("accumulate", ways=("named",), refused=True)
def _accumulation_asked_and_never_done(watch: Watch) -> None:
    model = net()
    optimizer = sgd(model)
    with watch(model, optimizer, accumulate=4):
        train(model, optimizer)


ALL = [pytest.param(name, way, id=f"{name}-{way}") for name, one in SICK.items() for way in one.ways]  # fmt: skip


def _told(watch: Watch, warned: list[str]) -> Iterator[tuple[str, str, str]]:
    """Yield where, the kind and the text of all that was told."""
    yield from (("warning", "", message) for message in warned)
    for run in watch.runs:
        if run.watcher is None:
            continue
        yield from (("event", event.kind, event.message) for event in run.watcher.events)
        report = run.watcher.report()
        yield from (("finding", one.kind, str(one)) for one in report.findings)


@pytest.mark.parametrize(("name", "way"), ALL)
def test_a_sick_loop_is_named(name: str, way: str) -> None:
    """A warning, an event or a finding says what is wrong; an error at once does where it can be had."""
    one = SICK[name]
    watch, warned = _run(one.loop, way)
    where = f"{name}, optimizers {way}:"
    if watch.refused is not None:
        assert one.refused, f"{where} raised {watch.refused!r}"
        said = str(watch.refused)
        assert any(word in said for word in one.words), f"{where} expected one of {one.words} in {said!r}"  # fmt: skip
        return
    told = list(_told(watch, warned))
    named = [
        text
        for source, kind, text in told
        if (source == "warning" and any(word in text for word in one.words)) or kind in one.kinds
    ]
    assert named, f"{where} expected {one.words} or one of {sorted(one.kinds)}, got {told}"
    assert warned or not one.warns, (
        f"{where} expected a warning with one of {one.words}, got {told}"
    )


@pytest.mark.parametrize(("name", "way"), ALL)
def test_a_sick_loop_is_named_once(name: str, way: str) -> None:
    """One mistake is one warning, and one event, or one for each parameter: never one per step."""
    watch, warned = _run(SICK[name].loop, way)
    where = f"{name}, optimizers {way}:"
    assert len(warned) <= 1, f"{where} expected one warning at most, got {warned}"
    for run in watch.runs:
        if run.watcher is None:
            continue
        kinds = collections.Counter(event.kind for event in run.watcher.events)
        for kind in ("changed", "mistake", "no_gradient"):
            limit = len(run.tensors) + 2
            assert kinds[kind] <= limit, (
                f"{where} expected {limit} {kind} at most, got {kinds[kind]}"
            )


def test_a_change_is_told_at_the_step_at_which_it_is_seen() -> None:
    """Parameters that lose requires_grad before step 21 are an event of step 21, with their name."""

    def loop(watch: Watch) -> None:
        model = net()
        optimizer = adam(model)
        with watch(model, optimizer):
            train(model, optimizer, steps=20)
            model[0].requires_grad_(False)
            train(model, optimizer, steps=20)

    for way in WAYS:
        watch, _ = _run(loop, way)
        told = [event for event in watch.runs[0].watcher.events if event.kind == "changed"]
        assert told, f"frozen at step 21, optimizers {way}: no event"
        assert told[0].step == 21, f"frozen at step 21, optimizers {way}: {told[0]}"
        assert told[0].parameter.startswith("0."), f"optimizers {way}: {told[0]}"
        assert "changed" in watch.runs[0].watcher.report().kinds


# -- never entered ----------------------------------------------------------------------------------------


def test_a_watcher_that_is_never_entered() -> None:
    """The first backward, or the first look at the history, says that `with` is missing."""
    model = net()
    optimizer = sgd(model)
    with warnings_of_gradwatch() as told:
        watcher = gradwatch.watch(model, optimizer)
        train(model, optimizer)
        history = watcher.history
        history.steps()
        watcher.report()
    assert len(told) == 1, f"expected one warning, got {told}"
    assert "with" in told[0]


def test_a_watcher_that_is_never_entered_and_not_kept() -> None:
    """`watch(model)` as a statement of its own is told about at the first backward of the model."""
    model = net()
    optimizer = sgd(model)
    with warnings_of_gradwatch() as told:
        gradwatch.watch(model, optimizer)
        gc.collect()
        train(model, optimizer)
    assert len(told) == 1, f"expected one warning, got {told}"
    assert "with" in told[0]


def test_a_watcher_that_is_made_and_entered_later_is_healthy() -> None:
    """Made before the loop, entered or attached before the first backward: nothing is told."""
    model = net()
    optimizer = sgd(model)
    with warnings_of_gradwatch() as told:
        watcher = gradwatch.watch(model, optimizer)
        with torch.no_grad():
            loss_of(model, 0)
        watcher.attach()
        train(model, optimizer)
        watcher.close()
    assert not told
    assert len(watcher.history.steps()) == MANY


# -- numbers that must be right, or unknown -----------------------------------------------------------------


@both_ways
def test_a_second_optimizer_inside_one_block(way: str) -> None:
    """A new optimizer in a second phase is clipped and recorded, or said to be left out."""

    def loop(watch: Watch) -> None:
        model = net()
        first, second = sgd(model, lr=1.0), sgd(model, lr=1.0)
        with watch(model, first, clip=1e-3):
            for optimizer in (first, second):
                before = [p.detach().clone() for p in model.parameters()]
                train(model, optimizer, steps=10)
                pairs = zip(model.parameters(), before, strict=True)
                moved.append(math.sqrt(sum(float((p - q).square().sum()) for p, q in pairs)))

    moved: list[float] = []
    watch, told = _run(loop, way)
    assert moved[0] <= 0.0101, f"optimizers {way}: the first phase moved the weights by {moved[0]}"
    rows = len(watch.runs[0].watcher.history.steps())
    clipped = moved[1] <= 0.0101 and rows == 20
    assert clipped or len(told) == 1, f"optimizers {way}: moved {moved}, {rows} rows, told {told}"


@both_ways
@pytest.mark.parametrize("late", ["2.bias", "0.weight", "all of the body"])
def test_a_group_added_between_backward_and_step(late: str, way: str) -> None:
    """Its parameters are in the norm, in the clip and in parameters() from that step on."""

    def loop(watch: Watch) -> None:
        model = net()
        named = dict(model.named_parameters())
        chosen = [named[late]] if late in named else list(model[0].parameters())
        ids = {id(p) for p in chosen}
        optimizer = torch.optim.SGD([p for p in model.parameters() if id(p) not in ids], lr=0.05)
        with watch(model, optimizer, clip=0.5) as run:
            for i in range(5):
                model.zero_grad()
                loss_of(model, i).backward()
                if i == 2:
                    optimizer.add_param_group({"params": chosen})
                run.row(optimizer)
                optimizer.step()

    watch, told = _run(loop, way)
    (run,) = watch.runs
    wrong = [*run.differences(), *told]
    steps = run.watcher.history.steps()
    limit = steps["grad_norm"].clip(upper=0.5).tolist()
    if steps["grad_norm_clipped"].tolist() != pytest.approx(limit, rel=1e-4):
        wrong.append(f"expected norms after the clip {limit}, got {steps['grad_norm_clipped'].tolist()}")  # fmt: skip
    if not (steps["clip_coef"] <= 1).all():
        wrong.append(f"a clip_coef above 1: {steps['clip_coef'].tolist()}")
    rows = run.watcher.history.parameters().groupby("step").size()
    if rows.loc[3] != 4:
        wrong.append(f"expected rows of 4 parameters in step 3, got {rows.loc[3]}")
    assert not wrong, "\n".join([f"{late} added, optimizers {way}:", *wrong])


@both_ways
def test_a_wrapped_optimizer_is_clipped(way: str) -> None:
    """A wrapper that skips super().__init__() is clipped and recorded as what it wraps."""

    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer, self.param_groups = optimizer, optimizer.param_groups
            self.state, self.defaults = optimizer.state, optimizer.defaults

        def step(self, closure: Any = None) -> Any:
            return self.optimizer.step(closure)

        def zero_grad(self, set_to_none: bool = True) -> None:
            self.optimizer.zero_grad(set_to_none)

    def loop(watch: Watch) -> None:
        model = net()
        before = [p.detach().clone() for p in model.parameters()]
        optimizer = Wrapper(sgd(model, lr=1.0))
        with watch(model, optimizer, clip=1e-3, on_nonfinite="skip") as run:
            for i in range(5):
                optimizer.zero_grad()
                loss_of(model, i).backward()
                run.row(optimizer)
                optimizer.step()
        pairs = zip(model.parameters(), before, strict=True)
        moved.append(math.sqrt(sum(float((p - q).square().sum()) for p, q in pairs)))

    moved: list[float] = []
    watch, told = _run(loop, way)
    assert watch.refused is None, f"optimizers {way}: {watch.refused!r}"
    wrong = [*watch.runs[0].differences(), *told]
    assert not wrong, f"optimizers {way}: {wrong}"
    assert moved[0] <= 0.00501, f"optimizers {way}: expected at most 5 * lr * clip, got {moved[0]}"


@both_ways
def test_a_clip_through_data_is_unknown_or_right(way: str) -> None:
    """`p.grad.data.mul_` moves no version: the norm after it is the right one or NaN, never "not clipped"."""

    def loop(watch: Watch) -> None:
        model = net()
        optimizer = sgd(model, lr=1e-3)
        with watch(model, optimizer) as run:
            for i in range(MANY):
                optimizer.zero_grad()
                loss_of(model, i).backward()
                run.row(optimizer)
                norm = norm_of(model.parameters())
                for p in model.parameters():
                    p.grad.data.mul_(min(1.0, 0.3 / (norm + 1e-6)))
                after.append(norm_of(model.parameters()))
                optimizer.step()

    after: list[float] = []
    watch, told = _run(loop, way)
    (run,) = watch.runs
    wrong = [*run.differences(), *told]
    steps = run.watcher.history.steps()
    got = steps["grad_norm_clipped"].tolist()
    for step, (value, true) in enumerate(zip(got, after, strict=True), 1):
        if not math.isnan(value) and value != pytest.approx(true, rel=1e-4):
            wrong.append(f"step {step}: expected {true:.6g} or NaN after the clip, got {value:.6g}")
    if (steps["clip_coef"] == 1).any() or (steps["clipped"].fillna(True) == False).any():  # noqa: E712  # may be <NA>
        wrong.append(f"said not to be clipped: {(steps['clip_coef'] == 1).sum()} of {len(steps)}")
    assert not wrong, "\n".join([f"optimizers {way}:", *wrong])


@pytest.mark.parametrize("through_data", [True, False])
def test_a_clip_without_an_optimizer_is_unknown_or_right(through_data: bool) -> None:
    """Updates by hand with a clip of one's own: `clip_coef` is right or NaN, never 1."""
    model, true = net(), []
    with warnings_of_gradwatch() as told, gradwatch.watch(model) as watcher:
        for i in range(20):
            model.zero_grad()
            loss_of(model, i).backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            true.append(min(1.0, 0.1 / (float(norm) + 1e-6)))
            with torch.no_grad():
                for p in model.parameters():
                    (p.data if through_data else p).add_(p.grad, alpha=-0.01)
    steps = watcher.history.steps()
    assert len(steps) == 20
    got = steps["clip_coef"].tolist()
    wrong = [(a, b) for a, b in zip(got, true, strict=True) if a != pytest.approx(b, rel=1e-4) and not math.isnan(a)]  # fmt: skip
    assert not wrong, f"clip_coef got, true: {wrong[:3]}"
    assert not (steps["clipped"].fillna(True) == False).any()  # noqa: E712  # may be <NA>
    assert not told


def test_gradients_whose_squares_underflow() -> None:
    """Norms of 1e-30 are recorded as they are, and nothing says that a gradient is exactly zero."""
    p = torch.ones(5, requires_grad=True)
    optimizer = torch.optim.SGD([p], lr=0.1)
    with gradwatch.watch({"p": p}, optimizer) as watcher:
        for i in range(40):
            (p * 1e-30 * (1 + i % 3)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    true = [math.sqrt(5) * 1e-30 * (1 + i % 3) for i in range(40)]
    assert watcher.history.steps()["grad_norm"].tolist() == pytest.approx(true, rel=1e-3)
    assert watcher.history.parameters()["grad_norm"].tolist() == pytest.approx(true, rel=1e-3)
    assert "zero_gradient" not in watcher.report().kinds


@both_ways
@pytest.mark.parametrize("foreach", [True, False])
def test_a_clip_of_ones_own_by_an_overflowed_norm(foreach: bool, way: str) -> None:
    """The clip multiplies by 0; the step keeps its true norm and its micro-batch, and is an overflow event."""

    def loop(watch: Watch) -> None:
        p = torch.ones(3, requires_grad=True)
        optimizer = torch.optim.SGD([p], lr=0.1)
        with watch({"p": p}, optimizer) as run:
            for scale in (1.0, 1e10, 1e20, 1.0):
                (p * scale).sum().backward()
                run.row(optimizer)
                nn.utils.clip_grad_norm_([p], 1.0, foreach=foreach)
                optimizer.step()
                optimizer.zero_grad()

    watch, told = _run(loop, way)
    (run,) = watch.runs
    events = [(event.kind, event.step) for event in run.watcher.events]
    wrong = [*run.differences(), *told]
    assert not wrong, f"optimizers {way}: {wrong}"
    assert ("overflow", 3) in events, f"optimizers {way}: {events}"
    assert "overflow" in run.watcher.report().kinds


@both_ways
def test_statistics_of_gradients_set_by_hand(way: str) -> None:
    """The statistics that were asked for are there, or one warning says that they cannot be had."""

    def loop(watch: Watch) -> None:
        model = net()
        optimizer = sgd(model)
        with watch(model, optimizer, statistics=("norm", "max", "update_ratio")) as run:
            for i in range(MANY):
                slopes = torch.autograd.grad(loss_of(model, i), list(model.parameters()))
                for p, slope in zip(model.parameters(), slopes, strict=True):
                    p.grad = slope
                run.row(optimizer, 0)
                optimizer.step()

    watch, told = _run(loop, way)
    (run,) = watch.runs
    wrong = list(run.differences())
    frame = run.watcher.history.parameters()
    there = {
        name for name in ("max", "update_ratio") if name in frame and frame[name].notna().all()
    }
    if there != {"max", "update_ratio"} and len(told) != 1:
        wrong.append(f"expected max and update_ratio or one warning, got {there} and {told}")
    assert not wrong, f"optimizers {way}: {wrong}"


def test_a_statistic_without_an_optimizer() -> None:
    """update_ratio of updates by hand is there, or one warning says that it cannot be had."""
    model = net()
    with (
        warnings_of_gradwatch() as told,
        gradwatch.watch(model, statistics=("update_ratio",)) as watcher,
    ):
        for i in range(MANY):
            model.zero_grad()
            loss_of(model, i).backward()
            with torch.no_grad():
                for p in model.parameters():
                    p.sub_(p.grad, alpha=0.01)
    frame = watcher.history.parameters()
    there = "update_ratio" in frame and frame["update_ratio"].notna().any()
    assert there or len(told) == 1, f"no update_ratio, told {told}"


# -- what is around the loop -----------------------------------------------------------------------------------


class Failing(CapturingSink):
    """A sink that raises in its first calls, and cannot be compared."""

    def __init__(self, failures: float) -> None:
        super().__init__()
        self.failures = failures

    def __eq__(self, other: object) -> bool:
        raise ValueError("the truth value of a sink is ambiguous")

    __hash__ = None

    def write(self, batch: Any) -> None:
        if self.failures > 0:
            self.failures -= 1
            raise OSError("no space left")
        super().write(batch)


@both_ways
def test_a_sink_that_raises_once_is_tried_again(way: str) -> None:
    """It gets the later records, is closed, and the failure is told once; the other sink gets all."""
    failing, other = Failing(1), CapturingSink()

    def loop(watch: Watch) -> None:
        model = net()
        optimizer = sgd(model)
        with watch(model, optimizer, sinks=[failing, other], buffer_size=64) as run:
            for start in range(0, 400, 10):
                train(model, optimizer, first=start, steps=10)
                run.watcher.flush()

    _, told = _run(loop, way)
    assert failing.steps, f"never tried again; told {told}"
    assert failing.steps[-1].step == 400
    assert failing.closed
    assert len(other.steps) == 400
    assert len(told) <= 2, told
    assert any("Failing" in message for message in told), told


def test_a_sink_that_always_raises_is_given_up_and_told() -> None:
    """The training goes on, the sink is closed, and the warnings are few."""
    failing, other = Failing(math.inf), CapturingSink()

    def loop(watch: Watch) -> None:
        model = net()
        optimizer = sgd(model)
        with watch(model, optimizer, sinks=[failing, other], buffer_size=64):
            train(model, optimizer, steps=400)

    _, told = _run(loop, "named")
    assert failing.closed
    assert len(other.steps) == 400
    assert 1 <= len(told) <= 3, told


def test_a_finished_run_can_be_pickled_and_copied() -> None:
    """A Watcher and its History go through pickle and deepcopy with their record."""
    model = net()
    optimizer = sgd(model)
    with gradwatch.watch(model, optimizer) as watcher:
        train(model, optimizer, steps=5)
    for name, one in {"watcher": watcher, "history": watcher.history}.items():
        for twin in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
            history = twin.history if name == "watcher" else twin
            assert history.steps().equals(watcher.history.steps()), name


ATTACHED = """
import sys

import torch

import gradwatch

model = torch.nn.Linear(8, 1)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
watcher = gradwatch.watch(model, optimizer, run_dir=sys.argv[1]).attach()
for _ in range(40):
    model(torch.randn(4, 8)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
"""


def test_a_script_that_attaches_and_never_closes_keeps_its_run(tmp_path: Any) -> None:
    """What was undelivered is delivered at a normal exit."""
    pytest.importorskip("pyarrow")
    folder = tmp_path / "run"
    done = processes.run(folder, code=ATTACHED)
    assert done.returncode == 0, done.stderr
    assert len(gradwatch.load(folder)) == 40


def test_one_rank_writes_before_the_process_group_is_there(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RANK and WORLD_SIZE of torchrun decide who writes the run folder, and no rank dies of it."""
    pytest.importorskip("pyarrow")
    with contextlib.ExitStack() as ranks:
        for rank in ("0", "1"):
            for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}.items():
                monkeypatch.setenv(name, value)
            model = net()
            watcher = ranks.enter_context(gradwatch.watch(model, run_dir=tmp_path / "run"))
            loss_of(model, 0).backward()
            assert watcher is not None
