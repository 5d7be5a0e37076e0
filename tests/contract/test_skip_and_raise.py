"""A poisoned batch that is skipped is a batch left out; an error comes before any weight changes."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradwatch
from tests.support import zoo
from tests.support.optimizers import CLOSURES, DENSE
from tests.support.state import identical, snapshot

from .poison import (
    BAD,
    BATCHES,
    bad_events,
    late_poison,
    run_with_poison,
    state_of,
    three_leaves,
    train_with_poison,
    with_bad_backward,
)


@pytest.mark.parametrize("poison", [0, 2, BATCHES - 1])
@pytest.mark.parametrize("name", DENSE)
def test_skip_equals_leaving_the_batch_out(name: str, poison: int) -> None:
    """One poisoned batch costs one step: weights and optimizer state are those of a run without that batch."""
    expected, _ = train_with_poison(DENSE[name], left_out=poison)
    skipped, watcher = train_with_poison(DENSE[name], poison=poison, on_nonfinite="skip")
    assert identical(skipped, expected)
    outcomes = list(watcher.history.steps()["outcome"])
    assert outcomes == ["skipped_nonfinite" if i == poison else "applied" for i in range(BATCHES)]


@pytest.mark.parametrize("mode", ["named", "found"])
@pytest.mark.parametrize("poison", [0, 2, BATCHES - 1])
@pytest.mark.parametrize("name", CLOSURES)
def test_skip_equals_leaving_the_batch_out_under_a_closure(
    name: str, poison: int, mode: str
) -> None:
    """The same where the backward runs inside step(closure), LBFGS with its line search included."""
    expected, _ = train_with_poison(CLOSURES[name], left_out=poison, closure=True)
    skipped, watcher = train_with_poison(
        CLOSURES[name], poison=poison, closure=True, mode=mode, on_nonfinite="skip"
    )
    assert identical(skipped, expected)
    outcomes = list(watcher.history.steps()["outcome"])
    assert outcomes == ["skipped_nonfinite" if i == poison else "applied" for i in range(BATCHES)]


@pytest.mark.parametrize("spread", ["everywhere", "one_layer"])
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("mode", ["unmanaged", "managed", "found"])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_skip_in_every_mode(mode: str, bad: str, spread: str, clip: float | None) -> None:
    """Skip equals leave-out for NaN and Inf, all gradients bad or some, managed or found, with a clip or without."""
    kind: dict[str, Any] = {"mode": mode, "clip": clip}
    for poison in (0, 3):
        expected, _ = train_with_poison(DENSE["AdamW"], left_out=poison, **kind)
        skipped, watcher = train_with_poison(
            DENSE["AdamW"],
            poison=poison,
            on_nonfinite="skip",
            bad=BAD[bad],
            spread=spread,
            **kind,
        )
        assert identical(skipped, expected)
        assert watcher.history.steps().loc[poison + 1, "outcome"] == "skipped_nonfinite"


@pytest.mark.parametrize("name", ["SGD", "AdamW", "AdamW_fused"])
def test_skip_with_gradients_zeroed_in_place(name: str) -> None:
    """Skip equals leave-out with zero_grad(set_to_none=False): the NaN does not come back."""
    expected, _ = train_with_poison(DENSE[name], left_out=2, set_to_none=False)
    skipped, _ = train_with_poison(DENSE[name], poison=2, on_nonfinite="skip", set_to_none=False)
    assert identical(skipped, expected)


@pytest.mark.parametrize("managed", [False, True], ids=["unmanaged", "managed"])
def test_skip_drops_the_whole_window(managed: bool) -> None:
    """One bad micro-batch costs its window, and nothing of it is left in the next."""
    results = []
    for poison in (True, False):
        case = zoo.mlp()
        optimizer = torch.optim.AdamW(case.model.parameters(), lr=0.01)
        accumulate = 3 if managed else 1
        with gradwatch.watch(
            case.model, optimizer, on_nonfinite="skip", accumulate=accumulate
        ) as watcher:
            for step in range(4):
                if step == 1 and not poison:
                    continue
                for i in range(3):
                    loss = case.loss(case.model, case.batch(3 * step + i))
                    loss = loss * math.nan if (poison and step == 1 and i == 1) else loss
                    if managed:
                        watcher.backward(loss)
                        watcher.step()
                    else:
                        (loss / 3).backward()
                if not managed:
                    optimizer.step()
                    optimizer.zero_grad()
        results.append(state_of(case, optimizer))
        if poison:
            assert list(bad_events(watcher)["micro_batch"]) == [2]
            assert list(watcher.history.steps()["micro_batches"]) == [3, 3, 3, 3]
    assert identical(*results)


def test_skip_of_sparse_adam() -> None:
    """SparseAdam's state stays as it was over a skipped step."""
    results = []
    for poison in (True, False):
        case = zoo.sparse_only()
        optimizer = torch.optim.SparseAdam(case.model.parameters(), lr=0.1)
        with gradwatch.watch(case.model, optimizer, on_nonfinite="skip"):
            for index in range(4):
                if index == 2 and not poison:
                    continue
                loss = case.loss(case.model, case.batch(index))
                (loss * math.nan if index == 2 else loss).backward()
                optimizer.step()
                optimizer.zero_grad()
        results.append(state_of(case, optimizer))
    assert identical(*results)


def test_skip_of_one_of_two_optimizers() -> None:
    """Where one backward serves two optimizers and only one has the NaN, only that one skips."""
    case = zoo.mlp()
    parts = [case.model[0], case.model[4]]
    optimizers = [torch.optim.Adam(part.parameters(), lr=0.1) for part in parts]
    before = [snapshot(part) for part in parts]
    with gradwatch.watch(case.model, optimizers, on_nonfinite="skip") as watcher:
        run_with_poison(case.model, case.batch(0)[0], 1, {0: math.nan}).pow(2).mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    assert identical(before[0], snapshot(parts[0]))
    assert not identical(before[1], snapshot(parts[1]))
    assert list(watcher.history.steps()["outcome"]) == ["skipped_nonfinite", "applied"]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("on_nonfinite", ["record", "skip"])
def test_the_loops_own_clip_does_not_hide_the_first_offender(on_nonfinite: str, bad: str) -> None:
    """clip_grad_norm_ spreads the NaN over all gradients; the event still names where it began, with its counts."""
    leaves = three_leaves()
    optimizer = torch.optim.SGD(list(leaves.values()), lr=0.1)
    before = copy.deepcopy(list(leaves.values()))
    with gradwatch.watch(leaves, optimizer, on_nonfinite=on_nonfinite) as watcher:
        values = {1: BAD[bad], 7: BAD[bad]}
        sum(
            (with_bad_backward(w, values) if name == "b" else w).sum() for name, w in leaves.items()
        ).backward()
        nn.utils.clip_grad_norm_(list(leaves.values()), 0.1)
        optimizer.step()
    event = bad_events(watcher).iloc[0]
    assert event["parameter"] == "b"
    assert event["kind"] == ("nan" if bad == "nan" else "inf")
    assert event["nan_count"] + event["inf_count"] == 2
    assert identical(before, list(leaves.values())) == (on_nonfinite == "skip")


def test_skip_leaves_groups_options_and_other_parameters_alone() -> None:
    """A skipped step touches no parameter that has no gradient, no group, no learning rate."""
    leaves = three_leaves()
    optimizer = torch.optim.SGD(
        [{"params": [leaves["a"]], "lr": 0.5}, {"params": [leaves["b"], leaves["c"]]}],
        lr=0.1, momentum=0.9, weight_decay=0.1,
    )  # fmt: skip
    before = copy.deepcopy((optimizer.state_dict(), list(leaves.values())))
    with gradwatch.watch(leaves, optimizer, on_nonfinite="skip") as watcher:
        with_bad_backward(leaves["a"], {0: math.nan}).sum().backward()
        optimizer.step()
        assert identical((optimizer.state_dict(), list(leaves.values())), before)
    assert watcher.history.steps().loc[1, "outcome"] == "skipped_nonfinite"


def test_a_skipped_step_is_an_event() -> None:
    """Beside the nan event there is one `skipped` event with the same step; the clip coefficient claims nothing."""
    _, watcher = train_with_poison(DENSE["SGD"], poison=1, on_nonfinite="skip")
    events = watcher.history.events()
    assert list(events[events["kind"] == "skipped"]["step"]) == [2]
    assert list(bad_events(watcher)["step"]) == [2]
    assert {event.kind for event in watcher.events} == {"nan", "skipped"}


@pytest.mark.parametrize("found", [False, True], ids=["named", "found"])
def test_skip_with_a_scheduler_raises_no_warning(found: bool) -> None:
    """A skipped first step followed by scheduler.step() warns of nothing."""
    case = zoo.mlp()
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with gradwatch.watch(case.model, None if found else optimizer, on_nonfinite="skip") as watcher:
        for index in range(2):
            loss = case.loss(case.model, case.batch(index))
            (loss * math.nan if index == 0 else loss).backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    assert list(watcher.history.steps()["outcome"]) == ["skipped_nonfinite", "applied"]


@pytest.mark.parametrize("bad_from", [1, 2, 3])
@pytest.mark.parametrize("name", ["LBFGS", "LBFGS_strong_wolfe"])
@pytest.mark.parametrize("on_nonfinite", ["skip", "raise"])
def test_a_nan_late_in_a_closure_undoes_the_whole_step(
    on_nonfinite: str, name: str, bad_from: int
) -> None:
    """Where LBFGS meets the NaN only in a later evaluation, weights and state are those before the step."""
    case = zoo.mlp()
    optimizer = CLOSURES[name](case.model.parameters())

    def good() -> Tensor:
        optimizer.zero_grad()
        loss = case.loss(case.model, case.batch(1))
        loss.backward()
        return loss

    with gradwatch.watch(case.model, optimizer, on_nonfinite=on_nonfinite) as watcher:
        optimizer.step(good)
        before = state_of(case, optimizer)
        if on_nonfinite == "raise":
            with pytest.raises(gradwatch.NonFiniteGradientError):
                optimizer.step(late_poison(case, optimizer, bad_from))
        else:
            optimizer.step(late_poison(case, optimizer, bad_from))
        assert identical(state_of(case, optimizer), before)
        optimizer.step(good)
    steps = watcher.history.steps()
    assert steps["outcome"].iloc[-1] == "applied"
    assert math.isfinite(steps["grad_norm"].iloc[-1])


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("mode", ["unmanaged", "managed", "found"])
@pytest.mark.parametrize("name", ["SGD_bare", "SGD", "AdamW", "AdamW_fused", "Rprop"])
def test_raise_changes_no_weight(name: str, mode: str, bad: str) -> None:
    """NonFiniteGradientError comes before any weight or optimizer state changes, and names the parameter."""
    case = zoo.mlp()
    optimizer = DENSE[name](case.model.parameters())
    found = mode == "found"
    with (  # noqa: PT012
        pytest.raises(gradwatch.NonFiniteGradientError, match=r"4\.(weight|bias)"),
        gradwatch.watch(case.model, None if found else optimizer, on_nonfinite="raise") as watcher,
    ):
        for index in range(3):
            before = state_of(case, optimizer)
            loss = case.loss(case.model, case.batch(index))
            loss = loss * BAD[bad] if index == 2 else loss
            if mode == "managed":
                watcher.backward(loss)
                watcher.step()
            else:
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
    assert identical(state_of(case, optimizer), before)


@pytest.mark.parametrize("found", [False, True], ids=["named", "found"])
@pytest.mark.parametrize("name", CLOSURES)
def test_raise_changes_no_weight_under_a_closure(name: str, found: bool) -> None:
    """The same where the backward runs inside step(closure)."""
    case = zoo.mlp()
    optimizer = CLOSURES[name](case.model.parameters())
    before = state_of(case, optimizer)
    with (
        pytest.raises(gradwatch.NonFiniteGradientError),
        gradwatch.watch(case.model, None if found else optimizer, on_nonfinite="raise"),
    ):
        optimizer.step(late_poison(case, optimizer, 1))
    assert identical(state_of(case, optimizer), before)


def test_raise_tells_where() -> None:
    """The error carries the step, the micro-batch, the parameter and the counts."""
    leaves = three_leaves()
    optimizer = torch.optim.SGD(list(leaves.values()), lr=0.1)
    with (  # noqa: PT012
        pytest.raises(gradwatch.NonFiniteGradientError) as caught,
        gradwatch.watch(leaves, optimizer, on_nonfinite="raise"),
    ):
        for step in range(3):
            values = {0: math.nan, 1: math.nan, 2: math.inf} if step == 1 else {}
            leaves["a"].sum().backward()
            with_bad_backward(leaves["b"], values).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    error = caught.value
    assert (error.step, error.micro_batch, error.parameter) == (2, 2, "b")
    assert (error.nan_count, error.inf_count) == (2, 1)
    assert "b" in str(error)


@pytest.mark.parametrize("found", [False, True], ids=["named", "found"])
def test_a_loop_that_catches_the_error_can_go_on(found: bool) -> None:
    """After the error, gradients zeroed by the user, the next step is trained and recorded right."""
    results, norms = [], []
    for poison in (True, False):
        case = zoo.mlp()
        optimizer = torch.optim.AdamW(case.model.parameters(), lr=0.01)
        with gradwatch.watch(
            case.model, None if found else optimizer, on_nonfinite="raise", clip=0.5
        ) as watcher:
            for index in range(4):
                if index == 1 and not poison:
                    continue
                optimizer.zero_grad()
                loss = case.loss(case.model, case.batch(index))
                if index == 1:
                    with pytest.raises(gradwatch.NonFiniteGradientError):  # noqa: PT012
                        (loss * math.nan).backward()
                        optimizer.step()
                    continue
                loss.backward()
                optimizer.step()
        results.append(state_of(case, optimizer))
        table = watcher.history.steps()
        norms.append(list(table[table["outcome"] == "applied"]["grad_norm"]))
        assert (table["micro_batches"] == 1).all()
    assert identical(*results)
    assert norms[0][-2:] == norms[1][-2:]


@pytest.mark.parametrize("on_nonfinite", ["skip", "raise"])
def test_a_bad_gradient_that_was_thrown_away_costs_nothing(on_nonfinite: str) -> None:
    """A NaN that zero_grad dropped before the step neither skips nor raises at that step."""
    case = zoo.mlp()
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
    with gradwatch.watch(case.model, optimizer, on_nonfinite=on_nonfinite) as watcher:
        try:
            (case.loss(case.model, case.batch(0)) * math.nan).backward()
        except gradwatch.NonFiniteGradientError:
            assert on_nonfinite == "raise"
        optimizer.zero_grad()
        case.loss(case.model, case.batch(1)).backward()
        optimizer.step()
    steps = watcher.history.steps()
    assert list(steps["outcome"]) == ["applied"]
    assert list(steps["nonfinite_parameters"]) == [0]
    assert list(steps["micro_batches"]) == [1]


@pytest.mark.parametrize("on_nonfinite", ["record", "skip", "raise"])
def test_a_bad_gradient_that_the_loop_repaired_is_applied(on_nonfinite: str) -> None:
    """A loop that replaces NaN by zero before the step (nan_to_num_) gets its step."""
    leaves = three_leaves()
    optimizer = torch.optim.SGD(list(leaves.values()), lr=0.1)
    start = leaves["a"].detach().clone()
    with gradwatch.watch(leaves, optimizer, on_nonfinite=on_nonfinite) as watcher:
        try:
            with_bad_backward(leaves["a"], {0: math.nan}).sum().backward()
        except gradwatch.NonFiniteGradientError:
            pytest.skip("this version raises at the backward, before the loop can repair")
        leaves["a"].grad.nan_to_num_(0.0)
        optimizer.step()
    assert watcher.history.steps().loc[1, "outcome"] == "applied"
    assert torch.equal(leaves["a"][0], start[0])
    assert not torch.equal(leaves["a"][1], start[1])


@pytest.mark.parametrize("on_nonfinite", ["skip", "raise"])
def test_a_nan_that_the_loop_made_itself_is_caught_too(on_nonfinite: str) -> None:
    """A NaN that enters between backward and step (the loop's own arithmetic) is not applied either."""
    leaves = three_leaves()
    optimizer = torch.optim.SGD(list(leaves.values()), lr=0.1)
    before = copy.deepcopy(list(leaves.values()))
    with gradwatch.watch(leaves, optimizer, on_nonfinite=on_nonfinite):
        sum(leaf.sum() for leaf in leaves.values()).backward()
        leaves["b"].grad.mul_(math.nan)
        if on_nonfinite == "raise":
            with pytest.raises(gradwatch.NonFiniteGradientError, match="b"):
                optimizer.step()
        else:
            optimizer.step()
    assert identical(list(leaves.values()), before)
