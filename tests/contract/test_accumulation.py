"""The managed loop's windows, and steps with a closure."""

import copy
import math
import threading

import pytest
import torch
from torch import Tensor, nn

import gradwatch
from tests.support import zoo
from tests.support.float64 import gradient_norm
from tests.support.state import identical, snapshot

from .windows import found_or_named, new_run, norms_and_counts


def test_a_direct_step_in_the_middle_of_a_window_is_refused() -> None:
    """With accumulate=4 an optimizer.step() after two micro-batches is an error that says what to call."""
    case, optimizer, watching = new_run(accumulate=4)
    before = snapshot(case.model)
    with watching as watcher:
        for index in range(2):
            watcher.backward(case.loss(case.model, case.batch(index)))
        with pytest.raises(gradwatch.AccumulationError, match=r"watcher\.step\(") as caught:
            optimizer.step()
    assert "2" in str(caught.value)
    assert "4" in str(caught.value)
    assert identical(before, snapshot(case.model))


def test_a_direct_step_in_the_middle_of_an_unmanaged_window_is_refused() -> None:
    """The same where the loop calls loss.backward() itself."""
    case, optimizer, watching = new_run(accumulate=4)
    before = snapshot(case.model)
    with watching:
        for index in range(2):
            case.loss(case.model, case.batch(index)).backward()
        with pytest.raises(gradwatch.AccumulationError, match=r"watcher\.step\("):
            optimizer.step()
    assert identical(before, snapshot(case.model))


def test_a_full_unmanaged_window_is_stepped() -> None:
    """With accumulate=4 a direct optimizer.step() after four micro-batches is the step, also after a refused one."""
    case, optimizer, watching = new_run(accumulate=4)
    with watching as watcher:
        for index in range(8):
            case.loss(case.model, case.batch(index)).backward()
            if index == 5:
                with pytest.raises(gradwatch.AccumulationError):
                    optimizer.step()
            if index % 4 == 3:
                optimizer.step()
                optimizer.zero_grad()
    assert norms_and_counts(watcher)[1] == [4, 4]


@pytest.mark.parametrize("accumulate", [2, 3, 4])
def test_the_managed_loop_equals_the_loop_by_hand(accumulate: int) -> None:
    """Managed windows train like the mean loss over each window, and only the last micro-batch steps."""
    case, _, watching = new_run(accumulate=accumulate)
    twin = copy.deepcopy(case.model)
    by_hand = torch.optim.SGD(twin.parameters(), lr=0.1)
    with watching as watcher:
        for index in range(3 * accumulate):
            watcher.backward(case.loss(case.model, case.batch(index)))
            assert watcher.step() is ((index + 1) % accumulate == 0)
            (case.loss(twin, case.batch(index)) / accumulate).backward()
            if (index + 1) % accumulate == 0:
                by_hand.step()
                by_hand.zero_grad()
    torch.testing.assert_close(snapshot(case.model), snapshot(twin))
    assert norms_and_counts(watcher)[1] == [accumulate] * 3


@pytest.mark.parametrize("short", [1, 2, 3])
@pytest.mark.parametrize("clip", [None, 0.2])
def test_a_short_last_window_is_its_own_mean(clip: float | None, short: int) -> None:
    """step(last=True) on a window of fewer micro-batches applies the mean over those that came."""
    case, _, watching = new_run(accumulate=4, clip=clip)
    twin = copy.deepcopy(case.model)
    by_hand = torch.optim.SGD(twin.parameters(), lr=0.1)
    windows = [range(4), range(4, 4 + short)]
    expected = []
    with watching as watcher:
        for window in windows:
            for index in window:
                watcher.backward(case.loss(case.model, case.batch(index)))
                last = index == windows[-1][-1]
                stepped = watcher.step(last=last)
            assert stepped is True
            for index in window:
                (case.loss(twin, case.batch(index)) / len(window)).backward()
            expected.append(gradient_norm(twin))
            if clip:
                nn.utils.clip_grad_norm_(twin.parameters(), clip)
            by_hand.step()
            by_hand.zero_grad()
    torch.testing.assert_close(snapshot(case.model), snapshot(twin))
    norms, counted = norms_and_counts(watcher)
    assert counted == [4, short]
    assert norms == pytest.approx(expected, rel=1e-5)


def test_a_full_last_window_is_not_divided_again() -> None:
    """step(last=True) on a full window is the ordinary step."""
    weights = []
    for last in (True, False):
        case, _, watching = new_run(accumulate=2)
        with watching as watcher:
            for index in range(2):
                watcher.backward(case.loss(case.model, case.batch(index)))
                stepped = watcher.step(last=last and index == 1)
        assert stepped is True
        weights.append(snapshot(case.model))
    assert identical(*weights)


def test_the_managed_loop_without_accumulation() -> None:
    """backward(loss) and step() alone train bit for bit like the loop by hand, gradients emptied after each step."""
    case, _, watching = new_run()
    twin = copy.deepcopy(case.model)
    by_hand = torch.optim.SGD(twin.parameters(), lr=0.1)
    with watching as watcher:
        for index in range(4):
            watcher.backward(case.loss(case.model, case.batch(index)))
            assert watcher.step() is True
            assert all(p.grad is None or not p.grad.any() for p in case.model.parameters())
            case.loss(twin, case.batch(index)).backward()
            by_hand.step()
            by_hand.zero_grad()
    assert identical(snapshot(case.model), snapshot(twin))


@pytest.mark.parametrize("call", ["backward", "step"])
def test_a_managed_loop_must_be_told_its_optimizer(call: str) -> None:
    """watcher.backward() and watcher.step() without a named optimizer say what to write."""
    case, _, watching = new_run(found=True)
    with (  # noqa: PT012
        watching as watcher,
        pytest.raises(RuntimeError, match=r"optimizer.*watch\(model, optimizer"),
    ):
        if call == "backward":
            watcher.backward(case.loss(case.model, case.batch(0)))
        else:
            watcher.step()


def test_windows_are_counted_anew_after_a_short_one() -> None:
    """After step(last=True) the next window is a full one again."""
    case, _, watching = new_run(accumulate=3)
    stepped = []
    with watching as watcher:
        for index in range(7):
            watcher.backward(case.loss(case.model, case.batch(index)))
            stepped.append(watcher.step(last=index == 3))
    assert stepped == [False, False, True, True, False, False, True]
    assert norms_and_counts(watcher)[1] == [3, 1, 3]


def test_loss_is_the_mean_of_the_window() -> None:
    """The managed loop records the window's mean loss, in the loss's own units; the unmanaged one cannot know it."""
    case, _, watching = new_run(accumulate=2)
    losses = []
    with watching as watcher:
        for index in range(4):
            loss = case.loss(case.model, case.batch(index))
            losses.append(loss.item())
            watcher.backward(loss)
            watcher.step()
    means = [(losses[0] + losses[1]) / 2, (losses[2] + losses[3]) / 2]
    assert list(watcher.history.steps()["loss"]) == pytest.approx(means, rel=1e-6)


@found_or_named
def test_lbfgs_is_one_step_per_call(found: bool) -> None:
    """LBFGS evaluates its closure several times: one row per step(), with the norm of the last evaluation."""
    case = zoo.mlp()
    optimizer = torch.optim.LBFGS(case.model.parameters(), lr=0.1, max_iter=4)
    norms: list[float] = []
    last: list[float] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = case.loss(case.model, case.batch(0))
        loss.backward()
        norms.append(gradient_norm(case.model))
        return loss

    with gradwatch.watch(case.model, None if found else optimizer) as watcher:
        for _ in range(3):
            optimizer.step(closure)
            last.append(norms[-1])
    assert len(norms) > 3
    recorded, counted = norms_and_counts(watcher)
    assert recorded == pytest.approx(last, rel=1e-5)
    assert counted == [1, 1, 1]


@found_or_named
def test_an_ordinary_closure(found: bool) -> None:
    """step(closure) of SGD is one micro-batch and one step; a closure with two backwards is two."""
    case = zoo.mlp()
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
    expected = []
    with gradwatch.watch(case.model, None if found else optimizer) as watcher:
        for count in (1, 2, 1):

            def closure(count: int = count) -> Tensor:
                optimizer.zero_grad()
                for index in range(count):
                    loss = case.loss(case.model, case.batch(index))
                    loss.backward()
                expected.append(gradient_norm(case.model))
                return loss

            optimizer.step(closure)
    recorded, counted = norms_and_counts(watcher)
    assert recorded == pytest.approx(expected, rel=1e-5)
    assert counted == [1, 2, 1]
    assert list(watcher.history.steps().index) == [1, 2, 3]


@found_or_named
def test_the_loss_of_a_closure(found: bool) -> None:
    """It is that of the step if all backwards ran inside; else nothing tells that of the others."""
    case = zoo.mlp()
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
    expected = []
    with gradwatch.watch(case.model, None if found else optimizer) as watcher:
        for before in (0, 2, 0):
            optimizer.zero_grad()
            for index in range(before):
                (case.loss(case.model, case.batch(index)) / (before + 1)).backward()

            def closure(before: int = before) -> Tensor:
                loss = case.loss(case.model, case.batch(before)) / (before + 1)
                loss.backward()
                expected.append(math.nan if before else loss.item())
                return loss

            optimizer.step(closure)
    steps = watcher.history.steps()
    assert steps.micro_batches.tolist() == [1, 3, 1]
    assert steps.loss.tolist() == pytest.approx(expected, nan_ok=True)


@found_or_named
def test_the_loss_of_a_closure_after_zero_grad(found: bool) -> None:
    """A closure that throws earlier gradients away returns the loss of the step."""
    case = zoo.mlp()
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
    expected = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = case.loss(case.model, case.batch(1))
        loss.backward()
        expected.append(loss.item())
        return loss

    with gradwatch.watch(case.model, None if found else optimizer) as watcher:
        for _ in range(3):
            case.loss(case.model, case.batch(0)).backward()
            optimizer.step(closure)
    assert watcher.history.steps().loss.tolist() == pytest.approx(expected)


@found_or_named
@pytest.mark.parametrize("kind", ["LBFGS", "AdamW"])
def test_a_closure_that_clips_for_itself(kind: str, found: bool) -> None:
    """clip_grad_norm_ inside the closure is seen from both sides, of the last evaluation."""
    case = zoo.mlp()
    options = {"max_iter": 3} if kind == "LBFGS" else {}
    optimizer = getattr(torch.optim, kind)(case.model.parameters(), lr=0.1, **options)
    log: list[tuple[float, float]] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = case.loss(case.model, case.batch(0))
        loss.backward()
        before = gradient_norm(case.model)
        nn.utils.clip_grad_norm_(case.model.parameters(), 0.05)
        log.append((before, gradient_norm(case.model)))
        return loss.detach()

    last = []
    with gradwatch.watch(case.model, None if found else optimizer) as watcher:
        for _ in range(3):
            optimizer.step(closure)
            last.append(log[-1])
    steps = watcher.history.steps()
    assert list(steps["grad_norm"]) == pytest.approx([before for before, _ in last], rel=1e-5)
    assert list(steps["grad_norm_clipped"]) == pytest.approx([after for _, after in last], rel=1e-5)
    assert list(steps["micro_batches"]) == [1, 1, 1]


def test_a_backward_in_another_thread() -> None:
    """A backward that runs in a thread of the user's counts like any other."""
    case, optimizer, watching = new_run()
    expected = []
    with watching as watcher:
        for index in range(3):
            loss = case.loss(case.model, case.batch(index))
            thread = threading.Thread(target=loss.backward)
            thread.start()
            thread.join()
            expected.append(gradient_norm(case.model))
            optimizer.step()
            optimizer.zero_grad()
    assert norms_and_counts(watcher) == (pytest.approx(expected, rel=1e-5), [1, 1, 1])
