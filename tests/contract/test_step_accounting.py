"""A micro-batch is a backward or several, a window what one optimizer step used, a step one optimizer step."""

import re

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.support.float64 import gradient_norm

from .windows import found_or_named, new_run, norms_and_counts, to_none


@found_or_named
@to_none
@pytest.mark.parametrize("zero", ["optimizer", "model", "by_hand"])
@pytest.mark.parametrize("when", ["before_backward", "after_step"])
def test_one_backward_per_step(zero: str, when: str, set_to_none: bool, found: bool) -> None:
    """However and whenever the loop empties its gradients, each step is one micro-batch with its own norm."""
    case, optimizer, watching = new_run(found)
    expected = []

    def empty() -> None:
        if zero == "by_hand":
            for parameter in case.model.parameters():
                if set_to_none or parameter.grad is None:
                    parameter.grad = None
                else:
                    parameter.grad.zero_()
        else:
            (optimizer if zero == "optimizer" else case.model).zero_grad(set_to_none=set_to_none)

    with watching as watcher:
        for index in range(5):
            if when == "before_backward":
                empty()
            case.loss(case.model, case.batch(index)).backward()
            expected.append(gradient_norm(case.model))
            optimizer.step()
            if when == "after_step":
                empty()
    norms, micro_batches = norms_and_counts(watcher)
    assert norms == pytest.approx(expected, rel=1e-5)
    assert micro_batches == [1] * 5
    assert list(watcher.history.steps().index) == [1, 2, 3, 4, 5]


@found_or_named
@to_none
def test_two_backwards_per_step(set_to_none: bool, found: bool) -> None:
    """Two backwards before a step are two micro-batches of one window, its norm that of the sum."""
    case, optimizer, watching = new_run(found)
    expected = []
    with watching as watcher:
        for index in range(4):
            for i in range(2):
                case.loss(case.model, case.batch(2 * index + i)).backward()
            expected.append(gradient_norm(case.model))
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
    norms, micro_batches = norms_and_counts(watcher)
    assert norms == pytest.approx(expected, rel=1e-5)
    assert micro_batches == [2] * 4


@found_or_named
def test_windows_of_different_lengths(found: bool) -> None:
    """Each step has its own number of micro-batches."""
    case, optimizer, watching = new_run(found)
    with watching as watcher:
        for count in (1, 3, 2, 1, 5):
            for index in range(count):
                case.loss(case.model, case.batch(index)).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert norms_and_counts(watcher)[1] == [1, 3, 2, 1, 5]


@found_or_named
@to_none
def test_a_backward_that_is_thrown_away_does_not_count(set_to_none: bool, found: bool) -> None:
    """A backward whose gradients zero_grad drops before any step belongs to no window."""
    case, optimizer, watching = new_run(found)
    expected = []
    with watching as watcher:
        for index in range(4):
            case.loss(case.model, case.batch(90 + index)).backward()
            optimizer.zero_grad(set_to_none=set_to_none)
            case.loss(case.model, case.batch(index)).backward()
            expected.append(gradient_norm(case.model))
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
    norms, micro_batches = norms_and_counts(watcher)
    assert norms == pytest.approx(expected, rel=1e-5)
    assert micro_batches == [1] * 4


def test_a_backward_without_a_step_is_no_step() -> None:
    """Where an optimizer is named, a last backward that is never stepped leaves no row."""
    case, optimizer, watching = new_run()
    with watching as watcher:
        case.loss(case.model, case.batch(0)).backward()
        optimizer.step()
        optimizer.zero_grad()
        case.loss(case.model, case.batch(1)).backward()
    assert list(watcher.history.steps().index) == [1]


@found_or_named
@to_none
def test_a_step_without_a_backward(set_to_none: bool, found: bool) -> None:
    """A step without any gradient is a row with norm 0 and no micro-batch; the next row is right again."""
    case, optimizer, watching = new_run(found)
    with watching as watcher:
        case.loss(case.model, case.batch(0)).backward()
        first = gradient_norm(case.model)
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
        optimizer.step()
        case.loss(case.model, case.batch(1)).backward()
        third = gradient_norm(case.model)
        optimizer.step()
    norms, micro_batches = norms_and_counts(watcher)
    assert norms == pytest.approx([first, 0.0, third], rel=1e-5)
    assert micro_batches == [1, 0, 1]
    assert watcher.history.steps().loc[2, "clip_coef"] == 1.0


@found_or_named
@to_none
def test_a_step_after_its_gradients_were_thrown_away(set_to_none: bool, found: bool) -> None:
    """backward, zero_grad, step: nothing was applied, so the row says norm 0, no micro-batch, nothing clipped."""
    case, optimizer, watching = new_run(found)
    with watching as watcher:
        case.loss(case.model, case.batch(0)).backward()
        optimizer.zero_grad(set_to_none=set_to_none)
        optimizer.step()
        case.loss(case.model, case.batch(1)).backward()
        expected = gradient_norm(case.model)
        optimizer.step()
    assert norms_and_counts(watcher) == (pytest.approx([0.0, expected], rel=1e-5), [0, 1])
    assert not watcher.history.steps()["clipped"].any()


@found_or_named
def test_a_step_before_any_backward(found: bool) -> None:
    """The first step of a run without a gradient is a row as well."""
    case, optimizer, watching = new_run(found)
    with watching as watcher:
        optimizer.step()
        case.loss(case.model, case.batch(0)).backward()
        expected = gradient_norm(case.model)
        optimizer.step()
    norms, micro_batches = norms_and_counts(watcher)
    assert norms == pytest.approx([0.0, expected], rel=1e-5)
    assert micro_batches == [0, 1]


@found_or_named
def test_stale_gradients_keep_their_norm(found: bool) -> None:
    """A second step on the same gradients applies them again: its norm is theirs, with no micro-batch of its own."""
    case, optimizer, watching = new_run(found)
    with watching as watcher:
        case.loss(case.model, case.batch(0)).backward()
        expected = gradient_norm(case.model)
        optimizer.step()
        optimizer.step()
    norms, micro_batches = norms_and_counts(watcher)
    assert norms == pytest.approx([expected, expected], rel=1e-5)
    assert micro_batches == [1, 0]


@found_or_named
def test_a_loop_that_never_empties_its_gradients(found: bool) -> None:
    """Without zero_grad each step's norm is that of the running sum, which is what is applied."""
    case, optimizer, watching = new_run(found)
    expected = []
    with watching as watcher:
        for index in range(3):
            case.loss(case.model, case.batch(index)).backward()
            expected.append(gradient_norm(case.model))
            optimizer.step()
    assert norms_and_counts(watcher)[0] == pytest.approx(expected, rel=1e-5)


ACTIONS = ("backward", "backward", "part", "drop", "zero", "step", "clip_step")


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(
    actions=st.lists(st.sampled_from(ACTIONS), max_size=14),
    found=st.booleans(),
    clip=st.sampled_from([None, 0.2]),
)
@example(actions=["backward", "zero", "step", "zero", "backward"], found=False, clip=None)
@example(actions=["backward", "zero", "backward", "part"], found=True, clip=0.2)
@example(actions=["part", "step", "part", "backward", "clip_step", "step"], found=False, clip=None)
def test_any_order_of_calls(actions: list[str], found: bool, clip: float | None) -> None:
    """Whatever the order of backwards, zeroings, own clips and steps: each row is the window that was applied.

    Backwards of the first layer alone do not count where equally many, two or more, come before each
    backward of the whole model.
    """
    case, optimizer, watching = new_run(found, clip=clip)
    expected: list[tuple[float, float, int]] = []
    window = ""
    with watching as watcher:
        for index, action in enumerate([*actions, "step"]):
            if action == "backward":
                case.loss(case.model, case.batch(index)).backward()
                window += "w"
            elif action == "part":
                case.model[0](case.batch(index)[0]).pow(2).mean().backward()
                window += "p"
            elif action in ("drop", "zero"):
                optimizer.zero_grad(set_to_none=action == "drop")
                window = ""
            else:
                before = gradient_norm(case.model)
                if action == "clip_step" and window:
                    for parameter in case.model.parameters():
                        if parameter.grad is not None:
                            parameter.grad.mul_(0.5)
                optimizer.step()
                in_parts = re.fullmatch(r"(pp+w)\1*", window)
                count = window.count("w") if in_parts else len(window)
                expected.append((before, gradient_norm(case.model), count))
                window = ""
    steps = watcher.history.steps()
    assert list(steps["micro_batches"]) == [count for _, _, count in expected]
    assert list(steps["grad_norm"]) == pytest.approx(
        [norm for norm, _, _ in expected], rel=1e-5, abs=1e-12
    )
    assert list(steps["grad_norm_clipped"]) == pytest.approx(
        [norm for _, norm, _ in expected], rel=1e-5, abs=1e-12
    )
