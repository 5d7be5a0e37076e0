"""What a step costs, counted exactly: ATen calls that do not grow with the model."""

import sys
from collections import Counter
from contextlib import nullcontext

import pytest
import torch

import gradwatch
from gradwatch.hooks.snapshot import EARLY, EVERY
from gradwatch.testing import late_readings
from tests.support.calls import CountCalls

WITHOUT_A_LOOK = 3
"""The first step in which unchanged gradients are not measured once more."""


def _calls(parameters, watched, **options):
    tensors = {f"p{i}": torch.ones(2, requires_grad=True) for i in range(parameters)}
    optimizer = torch.optim.SGD(tensors.values(), lr=0.1)
    watcher = gradwatch.watch(tensors, optimizer, **options)

    def step():
        optimizer.zero_grad()
        torch.stack(torch._foreach_norm(list(tensors.values()))).sum().backward()
        optimizer.step()

    if watched:
        watcher.attach()
    for _ in range(WITHOUT_A_LOOK - 1):
        step()
    watcher.flush()
    with CountCalls() as counter:
        step()
        watcher.close()  # what was left for later counts, too
    return counter.calls


def _added(parameters, **options):
    added = _calls(parameters, True, **options)
    added.subtract(_calls(parameters, False, **options))
    return sum(added.values())


@pytest.mark.parametrize(
    ("options", "limit"),
    [({}, 5), ({"clip": 1e9}, 6), ({"clip": 1e-3}, 12), ({"on_nonfinite": "skip"}, 5)],
    ids=["watch", "clip, nothing clipped", "clip, clipped", "skip"],
)
def test_calls_do_not_grow_with_the_model(options, limit):
    """10 and 1,000 parameters cost the same number of ATen calls, at most 12."""
    assert _added(10, **options) == _added(1_000, **options) == limit <= 12


MIXED = (torch.float32, torch.bfloat16, torch.float64)


def _calls_of_dtypes(parameters, dtypes, watched, options):
    kinds = [dtypes[i % len(dtypes)] for i in range(parameters)]
    tensors = {f"p{i}": torch.ones(2, dtype=kind) for i, kind in enumerate(kinds)}
    for tensor in tensors.values():
        tensor.requires_grad_().grad = torch.ones_like(tensor)
    optimizer = torch.optim.SGD(tensors.values(), lr=0.1)
    watcher = gradwatch.watch(tensors, optimizer, **options).attach() if watched else None
    with CountCalls() as counter:
        optimizer.step()
        if watcher is not None:
            watcher.close()
    return sum(counter.calls.values())


@pytest.mark.parametrize(
    ("dtypes", "options", "limit"),
    [
        (MIXED[:2], {}, 6),
        (MIXED[:2], {"clip": 1e-3}, 16),
        (MIXED, {}, 12),
        (MIXED, {"clip": 1e-3}, 22),
        (MIXED, {"clip": gradwatch.ClipByValue(0.5)}, 28),
    ],
    ids=["watch two", "clip two", "watch three", "clip three", "clip values of three"],
)
def test_calls_grow_with_the_dtypes_only(dtypes, options, limit):
    """Each dtype has a batched call of its own; 12 and 600 parameters cost the same."""
    added = [
        _calls_of_dtypes(number, dtypes, True, options)
        - _calls_of_dtypes(number, dtypes, False, options)
        for number in (12, 600)
    ]
    assert added == [limit, limit]


def _calls_with_buffers(layers, late, **options):
    torch.manual_seed(0)
    blocks = [
        torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False), torch.nn.BatchNorm1d(8))
        for _ in range(layers)
    ]
    model = torch.nn.Sequential(*blocks)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=late)

    def step():
        (model(torch.randn(16, 8)) * torch.arange(8.0)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    with (
        late_readings() if late else nullcontext(),
        gradwatch.watch(model, optimizer, **options) as watcher,
    ):
        for _ in range(WITHOUT_A_LOOK - 1):
            step()
        watcher.flush()
        with CountCalls() as counter:
            step()
    return sum(counter.calls.values()), counter.waits


@pytest.mark.parametrize("late", [False, True], ids=["at hand", "late"])
def test_buffers_are_copied_in_as_many_calls_as_they_have_dtypes(late):
    """Skipping adds 2 calls with BatchNorm's two dtypes, however many layers; recording adds none."""
    added = []
    for layers in (5, 50):
        skips, waits = _calls_with_buffers(layers, late, on_nonfinite="skip")
        records, fewer_waits = _calls_with_buffers(layers, late)
        assert waits == fewer_waits
        added.append(skips - records)
    assert added[0] == added[1]
    assert added[0] == 2 or late


def _python_calls(parameters, watched, **options):
    tensors = {f"p{i}": torch.ones(2, requires_grad=True) for i in range(parameters)}
    optimizer = torch.optim.SGD(tensors.values(), lr=0.1)
    calls = Counter()

    def step():
        optimizer.zero_grad()
        torch.stack(torch._foreach_norm(list(tensors.values()))).sum().backward()
        optimizer.step()

    def count(frame, event, argument):
        calls[event] += 1

    watcher = gradwatch.watch(tensors, optimizer, **options)
    if watched:
        watcher.attach()
    for _ in range(WITHOUT_A_LOOK - 1):
        step()
    sys.setprofile(count)
    try:
        step()
    finally:
        sys.setprofile(None)
    watcher.close()
    return calls["call"]


@pytest.mark.parametrize("options", [{}, {"clip": 1e9}, {"clip": 1e-3}], ids=str)
def test_python_calls_do_not_grow_with_the_model(options):
    """A step makes as many calls of Python functions with 10 parameters as with 1,000, and few."""
    few, many = (
        _python_calls(number, True, **options) - _python_calls(number, False)
        for number in (10, 1_000)
    )
    assert abs(few - many) <= 10  # one for each gradient that is looked after, of at most 17
    assert many <= 125


def test_an_accumulated_window_is_measured_once_per_micro_batch():
    """The step itself adds no pass where nothing changed since the last backward."""
    x = torch.ones(3, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=0.1)
    with gradwatch.watch({"x": x}, optimizer):
        for _ in range(WITHOUT_A_LOOK):
            with CountCalls() as counter:
                for _ in range(4):
                    x.sum().backward()
                optimizer.step()
    assert counter.calls["aten._foreach_norm.Scalar"] == 4


def test_unchanged_gradients_are_measured_once_more_in_few_steps():
    """A pass more in steps 1, 2, 4 to 64 and in every 128th, and in no other."""
    x = torch.ones(3, requires_grad=True)
    optimizer, twice = torch.optim.SGD([x], lr=0.1), []
    with gradwatch.watch({"x": x}, optimizer) as watcher:
        for step in range(1, 300):
            with CountCalls() as counter:
                x.sum().backward()
                optimizer.step()
            if counter.calls["aten._foreach_norm.Scalar"] > 1:
                twice.append(step)
    assert twice == [1, 2, 4, 8, 16, 32, EARLY, EVERY, 2 * EVERY]
    assert watcher.history.steps()["clipped"].eq(False).all()


def test_curvature_costs_calls_only_where_it_is_taken():
    """Steps between two takings have the calls of a run without it, and each taking the same number."""
    x = torch.ones(3, requires_grad=True)
    optimizer, counts = torch.optim.SGD([x], lr=0.1), []
    asked = gradwatch.CurvatureEvery(3, lambda: x.pow(4).sum(), iterations=2, probes=1)
    for curvature in (None, asked):
        with gradwatch.watch({"x": x}, optimizer, curvature=curvature):
            for _ in range(18):  # the next look is in step 32
                x.sum().backward()
                optimizer.step()
            for _ in range(6):
                with CountCalls() as counter:
                    x.sum().backward()
                    optimizer.step()
                counts.append(sum(counter.calls.values()))
    without, bent = counts[:6], counts[6:]
    assert [more > less for less, more in zip(without, bent, strict=True)] == [
        True, False, False, True, False, False,
    ]  # fmt: skip
    assert bent[1:3] == bent[4:] == without[4:]


FORWARDS_PYTHON, FORWARDS_ATEN = 16, 0
"""What explain adds to a micro-batch: calls of Python functions, and of torch's operations."""


def _of_a_linear(count, **options):
    model = torch.nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inputs = [torch.randn(3, 4) for _ in range(4)]

    def step():
        for x in inputs:
            model(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    with gradwatch.watch(model, optimizer, **options):
        for _ in range(20):  # beyond the first looks
            step()
        return count(step)


def _frames(step):
    counts = []
    for _ in range(5):  # what the collector runs in between is no part of it
        calls = Counter()

        def note(frame, event, argument, calls=calls):
            calls[event] += 1

        sys.setprofile(note)
        try:
            step()
        finally:
            sys.setprofile(None)
        counts.append(calls["call"])
    return min(counts)


def _operations(step):
    with CountCalls() as counter:
        step()
    return sum(counter.calls.values()), counter.waits


@pytest.mark.parametrize("mode", ["record", "skip", "raise"])
def test_keeping_forwards_costs_no_operation_and_few_python_calls(mode):
    """Per micro-batch explain adds no call of torch's operations, no wait, and few Python calls."""
    plain, explained = (
        _of_a_linear(_operations, on_nonfinite=mode, explain=explain) for explain in (False, True)
    )
    assert explained[0] - plain[0] == 4 * FORWARDS_ATEN
    assert explained[1] == plain[1]
    plain, explained = (
        _of_a_linear(_frames, on_nonfinite=mode, explain=explain) for explain in (False, True)
    )
    assert explained - plain <= 4 * FORWARDS_PYTHON
