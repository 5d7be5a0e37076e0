"""Windows that do not go to plan: thrown away, left, mixed up, or asked for in a wrong way."""

import itertools
import math
from typing import Any

import pytest
import torch

import gradwatch

from .full_batch import (
    Batch,
    Trained,
    assert_equal,
    at_once,
    batch_of,
    count,
    joined,
    loss_of,
    sgd,
    start,
    watched,
    weights_of,
    windows_of,
)
from .windows import to_none

AGAIN = r"watcher\.backward\(\) was called again before .* Add the losses of a part up"
LEFT_OUT = r"handed out parts without a backward.*Call watcher\.backward\(\) inside the loop"
NOT_ALONE = r"went on after another one had begun.*End one loop before the next begins"


def _run(**options: Any) -> tuple[Any, torch.optim.Optimizer, Any]:
    model, optimizers = start(sgd, None)
    return model, optimizers[0], gradwatch.watch(model, optimizers, **options)


@to_none
@pytest.mark.parametrize("kept", [1, 2, 3])
def test_a_window_that_is_thrown_away(kept: int, set_to_none: bool) -> None:
    """zero_grad() after some micro-batches, or all, begins the window anew: gradient, weight and loss."""
    model, optimizer, watching = _run(accumulate=3)
    lost, [window] = windows_of([[3, 1, 2]])[0], windows_of([[2, 4, 1]])
    with watching as watcher:
        for part in lost[:kept]:
            watcher.backward(loss_of(model, part), weight=10 * count(part))
        optimizer.zero_grad(set_to_none=set_to_none)
        if kept == 3 and not set_to_none:
            return  # a full window of zeros cannot be told from one to be stepped
        for index, part in enumerate(window):
            watcher.backward(loss_of(model, part), weight=count(part))
            assert watcher.step() is (index == 2)
    expected = at_once(sgd, [window])
    assert_equal(Trained(weights_of(model)), expected)
    assert watcher.last.weight == sum(map(count, window))
    assert watcher.last.micro_batches == 3
    assert watcher.last.loss == pytest.approx(expected.losses[0], rel=1e-12)
    assert watcher.last.grad_norm == pytest.approx(expected.norms[0], rel=1e-10)


def test_a_direct_step_ends_the_window() -> None:
    """optimizer.step() on a full window applies the mean, split batches counted once each."""
    model, optimizer, watching = _run(accumulate=2)
    windows = windows_of([[5, 3], [4, 4]], ignored=0.0)
    with watching as watcher:
        for window in windows:
            for index, batch in enumerate(window):
                for part in watcher.micro_batches(batch, 2):
                    watcher.backward(loss_of(model, part))
                if index == 0:
                    with pytest.raises(gradwatch.AccumulationError, match="after 1 of the 2"):
                        optimizer.step()
            optimizer.step()
            optimizer.zero_grad()
    assert_equal(Trained(weights_of(model)), at_once(sgd, windows))


@pytest.mark.parametrize("parts", [0, 1, 2])
def test_a_loop_that_is_left(parts: int) -> None:
    """After a break the parts that had their backward count as a batch; without one nothing does."""
    model, _, watching = _run()
    [[batch], [after]] = windows_of([[6], [5]], ignored=0.0)
    with watching as watcher:
        for index, part in enumerate(watcher.micro_batches(batch, 2)):
            if index == parts:
                break
            watcher.backward(loss_of(model, part))
        assert watcher.step() is (parts > 0)
        for part in watcher.micro_batches(after, 2):
            watcher.backward(loss_of(model, part))
        assert watcher.step() is True
    kept = tuple(column[: 2 * parts] for column in batch)
    windows = [[kept], [after]] if parts else [[after]]
    assert_equal(Trained(weights_of(model)), at_once(sgd, windows))


def test_an_error_inside_a_loop() -> None:
    """After an error in the loop and zero_grad() the next batch trains as if nothing had been."""
    model, optimizer, watching = _run()
    [[batch], [after]] = windows_of([[6], [5]], ignored=0.0)
    with watching as watcher:
        with pytest.raises(ZeroDivisionError):  # noqa: PT012 - an error of the user's own
            for index, part in enumerate(watcher.micro_batches(batch, 2)):
                watcher.backward(loss_of(model, part) * (1 / (1 - index)))
        optimizer.zero_grad()
        for part in watcher.micro_batches(after, 2):
            watcher.backward(loss_of(model, part))
        assert watcher.step() is True
    expected = at_once(sgd, [[after]])
    assert_equal(Trained(weights_of(model)), expected)
    assert watcher.last.loss == pytest.approx(expected.losses[0], rel=1e-12)


def test_a_part_that_is_left_out_with_weights_given() -> None:
    """Where weights are given, a part may go without a backward: it is not in the mean."""
    model, _, watching = _run(accumulate=2)
    [window] = windows_of([[6, 4]])
    with watching as watcher:
        parts = []
        for batch in window:
            for index, part in enumerate(watcher.micro_batches(batch, 2)):
                if index != 1:
                    watcher.backward(loss_of(model, part), weight=count(part))
                    parts.append(part)
            stepped = watcher.step()
    assert stepped is True
    assert_equal(Trained(weights_of(model)), at_once(sgd, [parts]))


def test_two_backwards_of_one_part_are_refused() -> None:
    """A second backward before the next part is an error, as the first part would count as two."""
    model, _, watching = _run()
    with watching as watcher:
        parts = watcher.micro_batches(batch_of(4, 0), 2)
        part = next(parts)
        watcher.backward(loss_of(model, part))
        with pytest.raises(gradwatch.AccumulationError, match=AGAIN):
            watcher.backward(loss_of(model, part))


@pytest.mark.parametrize("read", [list, lambda parts: itertools.islice(list(parts), 1, None)])
def test_a_list_of_parts_is_refused(read: Any) -> None:
    """A backward after the loop has handed out everything is an error, rather than a wrong weight."""
    model, _, watching = _run()
    with watching as watcher:
        for part in read(watcher.micro_batches(batch_of(5, 0), 2)):
            with pytest.raises(gradwatch.AccumulationError, match=LEFT_OUT):
                watcher.backward(loss_of(model, part))


def test_reading_ahead_is_refused() -> None:
    """A backward for a part while the next one is handed out already is an error without a weight."""
    model, _, watching = _run()
    with watching as watcher:
        for part, _ in itertools.pairwise(watcher.micro_batches(batch_of(5, 0), 2)):
            with pytest.raises(gradwatch.AccumulationError, match=LEFT_OUT):
                watcher.backward(loss_of(model, part))


def test_a_loop_inside_a_loop_is_refused() -> None:
    """An outer loop that goes on after an inner one is an error."""
    model, _, watching = _run(accumulate=2)
    with (  # noqa: PT012 - the loop itself raises
        watching as watcher,
        pytest.raises(gradwatch.AccumulationError, match=NOT_ALONE),
    ):
        for part in watcher.micro_batches(batch_of(4, 0), 2):
            for smaller in watcher.micro_batches(part, 1):
                watcher.backward(loss_of(model, smaller))


def test_two_loops_at_once_are_refused() -> None:
    """Two loops side by side are an error at the second backward."""
    model, _, watching = _run(accumulate=2)
    with watching as watcher:
        loops = [watcher.micro_batches(batch_of(4, seed), 2) for seed in (0, 1)]
        first, second = next(zip(*loops, strict=True))
        watcher.backward(loss_of(model, first))
        with pytest.raises(gradwatch.AccumulationError, match=AGAIN):
            watcher.backward(loss_of(model, second))


def test_a_step_in_the_middle_of_a_loop_is_refused() -> None:
    """watcher.step(last=True) inside the loop steps; the loop cannot go on after it."""
    model, _, watching = _run()
    parts = []
    with (  # noqa: PT012 - the loop itself raises
        watching as watcher,
        pytest.raises(gradwatch.AccumulationError, match=NOT_ALONE),
    ):
        for part in watcher.micro_batches(batch_of(4, 0, ignored=0.0), 2):
            watcher.backward(loss_of(model, part))
            parts.append(part)
            assert watcher.step(last=True) is True
    assert_equal(Trained(weights_of(model)), at_once(sgd, [parts]))


WEIGHTS = [math.nan, math.inf, -1, -0.5, 10**400, torch.tensor(-1.0), torch.tensor(math.nan)]
NO_WEIGHTS = ["3", True, 1j, [1], torch.ones(2), torch.tensor(True), torch.tensor(1j)]


@pytest.mark.parametrize("weight", [*WEIGHTS, *NO_WEIGHTS], ids=lambda weight: repr(weight)[:30])
def test_a_weight_that_is_none(weight: Any) -> None:
    """A weight must be a finite number of at least 0; the error says so, and the window stays."""
    model, _, watching = _run(accumulate=2)
    [window] = windows_of([[3, 2]])
    kind = TypeError if any(weight is one for one in NO_WEIGHTS) else ValueError
    with watching as watcher:
        watcher.backward(loss_of(model, window[0]), weight=count(window[0]))
        with pytest.raises(kind, match=r"weight=\) must be .* at least 0, .*got .*Pass the number"):
            watcher.backward(loss_of(model, window[1]), weight=weight)
        watcher.backward(loss_of(model, window[1]), weight=count(window[1]))
        assert watcher.step() is True
    assert_equal(Trained(weights_of(model)), at_once(sgd, [window]))


WRONG: list[tuple[Any, type[Exception], str]] = [
    (0, ValueError, r"accumulate=\) must be at least 1, got 0"),
    (2.0, TypeError, r"must be an integer of at least 1.*got 2\.0 of type float"),
    (True, TypeError, "got True of type bool"),
    ("often", ValueError, "got 'often'.*accumulate=\"auto\""),
    ({}, ValueError, r"step 0 has, got \{\}\. Add 0 to it"),
    ({5: 2}, ValueError, r"step 0 has, got \{5: 2\}"),
    ({0: 1, 5: 0}, ValueError, r"for step 5 must be at least 1, got 0\. Write \{5: 1\}"),
    ({0: 1, -5: 2}, ValueError, "must be at least 0, got -5"),
    ({0: 1, 5: 1.5}, TypeError, "for step 5 must be an integer.*got 1.5"),
    (lambda step: step, ValueError, "for step 0 must be at least 1, got 0"),
    (lambda step: "2", TypeError, "for step 0 must be an integer.*got '2'"),
    (gradwatch.AccumulateByNoiseScale, TypeError, "of type type"),
    (gradwatch.AccumulateByNoiseScale(min=1), ValueError, r"Write min=2"),
]


@pytest.mark.parametrize(("wanted", "error", "text"), WRONG, ids=lambda v: repr(v)[:25])
def test_an_accumulation_that_is_none(wanted: Any, error: type[Exception], text: str) -> None:
    """A wrong accumulate= is refused before the training begins, with argument, bound and value."""
    with pytest.raises(error, match=text):
        _run(accumulate=wanted)


def test_an_infinite_loss_is_left_out_of_the_weights() -> None:
    """on_nonfinite="skip" leaves out a window with one bad micro-batch, and the next one is right."""
    model, _, watching = _run(accumulate=3, on_nonfinite="skip")
    windows = windows_of([[3, 1, 2], [2, 2, 1], [4, 1]])
    with watching as watcher:
        for w, window in enumerate(windows):
            for index, part in enumerate(window):
                factor = math.inf if (w, index) == (1, 1) else 1.0
                watcher.backward(loss_of(model, part) * factor, weight=count(part))
                watcher.step(last=index + 1 == len(window))
    assert list(watcher.history.steps()["outcome"]) == ["applied", "skipped_nonfinite", "applied"]
    assert_equal(Trained(weights_of(model)), at_once(sgd, [windows[0], windows[2]]))


def test_a_closure_may_accumulate() -> None:
    """LBFGS with watcher.backward() inside its closure sees the gradient of the whole batch."""

    def lbfgs(model: Any) -> list[torch.optim.Optimizer]:
        return [torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)]

    [window] = windows_of([[3, 1, 2]])
    found, norm = _minimise(
        lbfgs, window, lambda watcher, loss, share: watcher.backward(loss, share)
    )
    expected, wanted = _minimise(lbfgs, window, lambda _, loss, share: (loss * share).backward())
    assert_equal(found, expected)
    assert norm == pytest.approx(wanted, rel=1e-10)


def _minimise(make: Any, window: list[Batch], backward: Any) -> tuple[Trained, float]:
    """Step once with a closure that runs the micro-batches; return weights and recorded norm."""
    model, [optimizer] = start(make, None)
    total = sum(map(count, window))

    def closure() -> float:
        optimizer.zero_grad()
        for part in window:
            backward(watcher, loss_of(model, part), count(part) / total)
        with torch.no_grad():
            return loss_of(model, joined(window)).item()

    with gradwatch.watch(model, optimizer, accumulate=3) as watcher:
        optimizer.step(closure)
    return Trained(weights_of(model)), watcher.last.grad_norm


def test_numbers_that_come_late() -> None:
    """Where numbers stay on a device, weights and corrections do as well: the same weights."""
    from gradwatch.testing import late_readings

    windows = windows_of([[2, 3, 1], [4, 1], [3], [1, 1, 4]])
    windows[2] = [batch_of(2, 5), *windows[2]]
    weigh = lambda part: (part[1] != -100).sum()  # noqa: E731
    with late_readings(1):
        found = watched(sgd, windows, accumulate=3, clip=0.05, weigh=weigh)
    expected = watched(sgd, windows, accumulate=3, clip=0.05)
    assert_equal(found, expected)
    assert list(found.steps()["weight"]) == list(expected.steps()["weight"])


def test_micro_batches_that_reach_few_experts() -> None:
    """A loop of the user's own: one micro-batch of a window reaches less than half of the other."""
    gate, *experts = model = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.watch(model, optimizer, accumulate=2) as watcher:
        for reached in (experts[:1], experts), (experts, experts[:1]):
            for some in reached:
                out = gate(torch.ones(1, 4)) + sum(expert(torch.ones(1, 4)) for expert in some)
                (out.square().mean() / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert len(watcher.history.steps()) == 2
