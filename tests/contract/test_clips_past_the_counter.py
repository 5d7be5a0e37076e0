"""Clips of the loop that write past autograd's version counter."""

import math

import pytest
import torch

import gradwatch
from tests.support.places import HOST

LIMIT = 0.3


def _by_data(gradient, factor):
    gradient.data.mul_(factor)


def _by_numpy(gradient, factor):
    gradient.numpy()[...] *= factor


def _by_dlpack(gradient, factor):
    torch.from_dlpack(gradient.detach()).data.mul_(factor)


WRITERS = {"data": _by_data, "numpy": _by_numpy, "dlpack": _by_dlpack}


def _train(steps, write, place=HOST, clips=lambda step: True, **options):
    """Trains with a clip of the loop in the steps that ``clips`` says; returns watcher and norms."""
    torch.manual_seed(0)
    model = place.to(torch.nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    sides = []
    with gradwatch.watch(model, optimizer, **options) as watcher:
        for step in range(1, steps + 1):
            (model(place.tensor(torch.randn(16, 8))) - 3).square().mean().backward()
            before = _norm(model)
            if clips(step):
                for parameter in model.parameters():
                    write(parameter.grad, min(1.0, LIMIT / before))
            sides.append((before, _norm(model)))
            optimizer.step()
            if options.get("clip"):
                sides[-1] = (*sides[-1], _norm(model))
            optimizer.zero_grad()
    return watcher, sides


def _norm(model):
    return torch.stack([p.grad.double().norm() for p in model.parameters()]).norm().item()


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_both_sides_of_the_clip_are_recorded(write, place):
    """Every step has the norm before and after it, on an accelerator once a look has arrived."""
    if place.type != "cpu" and write is not _by_data:
        pytest.skip("it shares the memory of the host")
    with place.late():
        watcher, sides = _train(12, write, place)
        steps = watcher.history.steps()
    assert steps["grad_norm"].tolist() == pytest.approx([before for before, _ in sides])
    seen = steps["clipped"].to_numpy(bool)
    after = [one for (_, one), known in zip(sides, seen, strict=True) if known]
    assert steps["grad_norm_clipped"][seen].tolist() == pytest.approx(after)
    assert seen[[0, 1, 3, 7]].all()
    assert seen.all() or (not place.at_hand and seen[4:].all())


def test_the_norms_of_parameters_are_those_after_it():
    """The norms per parameter after the clip add up to the total after it."""
    watcher, sides = _train(3, _by_data)
    each = watcher.history.parameters().groupby("step")["grad_norm_clipped"]
    totals = each.apply(lambda norms: (norms**2).sum() ** 0.5)
    assert totals.tolist() == pytest.approx([after for _, after in sides])


def test_our_own_clip_works_on_what_the_loop_has_left(place):
    """Both clips act: ours on the norm after that of the loop."""
    with place.late():
        watcher, sides = _train(8, _by_data, place, clip=0.1)
        steps = watcher.history.steps()
    looked = steps.loc[[1, 2, 4, 8]]
    ends = [side[2] for side in sides]
    assert looked["grad_norm_clipped"].tolist() == pytest.approx([ends[i] for i in (0, 1, 3, 7)])
    assert looked["grad_norm_clipped"].tolist() == pytest.approx([0.1] * 4, rel=1e-4)
    if place.at_hand:
        assert steps["grad_norm_clipped"].tolist() == pytest.approx(ends)


def test_a_clip_that_begins_late_is_found_and_followed():
    """The next look finds it; earlier steps stay as recorded, later ones are all seen."""
    watcher, _ = _train(80, _by_data, clips=lambda step: step > 40)
    steps = watcher.history.steps()
    assert steps["clipped"].tolist() == [False] * 63 + [True] * 17


@pytest.mark.parametrize(
    "scaled", [None, {}, {"init_scale": 1000.0}], ids=["unscaled", "scaler", "scale of no power"]
)
def test_a_look_changes_no_number_of_a_loop_without_a_clip(scaled, place):
    """Nothing is clipped, and no bit is different from the steps without a look."""

    def steps():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.Linear(8, 1))
        place.to(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        scaler = torch.amp.GradScaler(place.type, enabled=scaled is not None, **(scaled or {}))
        with gradwatch.watch(model, optimizer, scaler=scaler) as watcher:
            for _ in range(9):
                x = place.tensor(torch.randn(16, 8))
                scaler.scale((model(x) - 3).square().mean()).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
            return watcher.history.steps()

    with place.late():
        found = steps()
    assert found["clipped"].eq(False).all()
    assert (found["clip_coef"] == 1.0).all()
    assert (found["grad_norm_clipped"] == found["grad_norm"]).all()


def test_zeros_written_past_the_counter_are_a_step_without_gradient():
    """`p.grad.data.zero_()` after the backward is a zero_grad(), not a clip."""
    x = torch.ones(3, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=0.1)
    with gradwatch.watch({"x": x}, optimizer) as watcher:
        x.sum().backward()
        x.grad.data.zero_()
        optimizer.step()
    (step,) = watcher.history.steps().itertuples()
    assert (step.micro_batches, step.grad_norm, step.clipped) == (0, 0.0, False)


def test_a_look_waits_for_nothing(away):
    """On an accelerator the second pass is measured, and read only with the record."""
    x = away.tensor(torch.ones(3)).requires_grad_()
    optimizer = torch.optim.SGD([x], lr=0.1)
    with away.late(3), gradwatch.watch({"x": x}, optimizer):
        for _ in range(9):
            with away.counting() as counter:
                x.sum().backward()
                optimizer.step()
                optimizer.zero_grad()
            assert counter.waits == 0


def test_a_nan_that_comes_past_the_counter_is_told():
    """A gradient that the loop spoils through `.data` is an event, as one spoiled in the open is."""
    x = torch.ones(3, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=0.1)
    with gradwatch.watch({"x": x}, optimizer) as watcher:
        x.sum().backward()
        x.grad.data[1] = math.nan
        optimizer.step()
    assert [(event.kind, event.nan_count) for event in watcher.events] == [("nan", 1)]
