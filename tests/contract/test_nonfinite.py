"""NaN and Inf in gradients: who was first, in which micro-batch, how many."""

import copy
import math

import pytest
import torch
from torch import nn

import gradwatch
from tests.support import float64, zoo

from .poison import (
    BAD,
    bad_events,
    run_with_poison,
    three_leaves,
    with_bad_backward,
)


@pytest.mark.parametrize("discover", [False, True], ids=["named", "found"])
@pytest.mark.parametrize(
    ("values", "nans", "infs"),
    [
        ({0: math.nan}, 1, 0),
        ({0: math.nan, 4: math.nan, 9: math.nan}, 3, 0),
        ({2: math.inf}, 0, 1),
        ({2: -math.inf, 3: math.inf}, 0, 2),
        ({1: math.nan, 2: math.inf, 3: -math.inf, 5: math.nan, 6: math.nan}, 3, 2),
    ],
)
def test_counts_are_exact(values: dict[int, float], nans: int, infs: int, discover: bool) -> None:
    """The event names the parameter, the step and the numbers of NaN and Inf elements, exactly."""
    leaves = three_leaves()
    optimizer = torch.optim.SGD(list(leaves.values()), lr=0.1)
    with gradwatch.watch(leaves, None if discover else optimizer) as watcher:
        for step in range(3):
            poisoned = with_bad_backward(leaves["b"], values) if step == 1 else leaves["b"]
            loss = leaves["a"].sum() + poisoned.sum() + leaves["c"].sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    events = bad_events(watcher)
    assert set(events["kind"]) <= {kind for kind, n in (("nan", nans), ("inf", infs)) if n}
    assert set(events["step"]) == {2}
    assert set(events["parameter"]) == {"b"}
    assert set(events["micro_batch"]) == {1}
    assert set(events["nan_count"]) == {nans}
    assert set(events["inf_count"]) == {infs}
    steps = watcher.history.steps()
    assert list(steps["nonfinite_parameters"]) == [0, 1, 0]
    assert set(steps["outcome"]) == {"applied"}
    assert not math.isfinite(steps.loc[2, "grad_norm"])
    assert steps.loc[3, "grad_norm"] == pytest.approx(math.sqrt(30))


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("before", [1, 2, 3, 4])
def test_the_first_in_backward_order_is_named(before: int, bad: str) -> None:
    """Of several bad parameters the event names the one whose gradient arrived first, with that one's counts."""
    case, values = (
        zoo.mlp(),
        dict.fromkeys(range(16), BAD[bad]),
    )  # a row: some of its units are active
    twin = copy.deepcopy(case.model)
    order = []
    for name, parameter in twin.named_parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda p, name=name: None if p.grad.isfinite().all() else order.append((name, p.grad))
        )
    run_with_poison(twin, case.batch(0)[0], before, values).pow(2).mean().backward()
    first, gradient = order[0]
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
    with gradwatch.watch(case.model, optimizer) as watcher:
        run_with_poison(case.model, case.batch(0)[0], before, values).pow(2).mean().backward()
        optimizer.step()
    event = bad_events(watcher).iloc[0]
    assert event["parameter"] == first
    assert first.startswith(event["module"])
    assert event["module"] == first.rsplit(".", 1)[0]
    assert event["nan_count"] == int(gradient.isnan().sum())
    assert event["inf_count"] == int(gradient.isinf().sum())
    assert first in event["message"]
    assert watcher.history.steps().loc[1, "nonfinite_parameters"] == len(order)


@pytest.mark.parametrize("managed", [False, True], ids=["unmanaged", "managed"])
@pytest.mark.parametrize("micro_batch", [1, 2, 3, 4])
def test_the_micro_batch_is_named(micro_batch: int, managed: bool) -> None:
    """In a window of four the event names the micro-batch in which it began, once, with the counts of then."""
    leaves = three_leaves()
    optimizer = torch.optim.SGD(list(leaves.values()), lr=0.1)
    accumulate = 4 if managed else 1
    with gradwatch.watch(leaves, optimizer, accumulate=accumulate) as watcher:
        for step in (1, 2):
            for index in range(1, 5):
                values = {0: math.nan, 1: math.inf}
                bad = step == 1 and index == micro_batch
                loss = (
                    leaves["a"].sum()
                    + (with_bad_backward(leaves["b"], values) if bad else leaves["b"]).sum()
                )
                if managed:
                    watcher.backward(loss)
                    watcher.step()
                else:
                    loss.backward()
            if not managed:
                optimizer.step()
                optimizer.zero_grad()
    events = bad_events(watcher)
    assert set(events["step"]) == {1}
    assert set(events["micro_batch"]) == {micro_batch}
    assert set(events["parameter"]) == {"b"}
    assert set(events["nan_count"]) == {1}
    assert set(events["inf_count"]) == {1}
    assert list(watcher.history.steps()["nonfinite_parameters"]) == [1, 0]


def test_a_second_bad_parameter_later_in_the_window_does_not_hide_the_first() -> None:
    """Where b goes bad in micro-batch 2 and a in micro-batch 3, b in 2 is named."""
    leaves = three_leaves()
    optimizer = torch.optim.SGD(list(leaves.values()), lr=0.1)
    with gradwatch.watch(leaves, optimizer) as watcher:
        for name in ("c", "b", "a"):
            values = {0: math.nan} if name in "ba" else {}
            loss = sum(
                (with_bad_backward(w, values) if key == name else w).sum()
                for key, w in leaves.items()
            )
            loss.backward()
        optimizer.step()
    event = bad_events(watcher).iloc[0]
    assert (event["parameter"], event["micro_batch"]) == ("b", 2)
    assert watcher.history.steps().loc[1, "nonfinite_parameters"] == 2


def test_a_nan_in_a_sparse_or_complex_gradient_is_found() -> None:
    """Sparse and complex gradients are searched as well."""
    table = nn.Embedding(5, 3, sparse=True)
    spectrum = torch.ones(4, dtype=torch.complex64, requires_grad=True)
    leaves = {"table": table.weight, "spectrum": spectrum}
    optimizer = torch.optim.SGD(list(leaves.values()), lr=0.1)
    with gradwatch.watch(leaves, optimizer) as watcher:
        with_bad_backward(table(torch.tensor([1, 2])), {0: math.nan, 4: math.nan}).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        with_bad_backward(torch.view_as_real(spectrum), {0: math.inf, 1: 0.0}).sum().backward()
        optimizer.step()
    events = bad_events(watcher)
    assert list(events["parameter"]) == ["table", "spectrum"]
    assert list(events["nan_count"]) == [2, 0]
    assert list(events["inf_count"]) == [0, 1]


def test_recording_goes_on_after_a_bad_step() -> None:
    """After a recorded NaN, weights put back by the user, the following steps are right again."""
    case = zoo.mlp()
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
    saved = copy.deepcopy(case.model.state_dict())
    with gradwatch.watch(case.model, optimizer, clip=1.0) as watcher:
        for index in range(4):
            loss = case.loss(case.model, case.batch(index))
            (loss * math.nan if index == 1 else loss).backward()
            norms = float64.gradient_norms(dict(case.model.named_parameters()))
            optimizer.step()
            optimizer.zero_grad()
            if index == 1:
                case.model.load_state_dict(saved)
    steps = watcher.history.steps()
    assert list(steps["nonfinite_parameters"]) == [0, 6, 0, 0]
    assert steps.loc[4, "grad_norm"] == pytest.approx(float64.total(norms), rel=1e-5)
    assert set(bad_events(watcher)["step"]) == {2}
