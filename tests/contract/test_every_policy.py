"""Every clipping policy in a real run: what it decides is what the weights get and what is recorded."""

import math

import pytest
import torch

import gradwatch
from tests.support import zoo
from tests.support.float64 import norms, total
from tests.support.places import HOST

STEPS = 40
SPIKED = (12, 30)
POLICIES = {
    "auto": lambda: "auto",
    "RobustClip": lambda: gradwatch.RobustClip(window=16, warmup=8),
    "AutoClip": lambda: gradwatch.AutoClip(percentile=50, warmup=3),
    "ZClip": lambda: gradwatch.ZClip(warmup_steps=5),
    "published ZClip": lambda: gradwatch.ZClip(warmup_steps=5, update="clipped"),
    "AdaGC": lambda: gradwatch.AdaGC(warmup=5, lambda_abs=0.2),
    "AGC": lambda: gradwatch.AdaptiveGradientClip(0.05),
    "norm": lambda: gradwatch.ClipByNorm(0.1),
    "norm of groups": lambda: gradwatch.ClipByNorm(0.1, scope="group"),
    "norm of parameters": lambda: gradwatch.ClipByNorm(0.1, scope="parameter"),
    "max norm of parameters": lambda: gradwatch.ClipByNorm(0.05, math.inf, scope="parameter"),
    "max norm of groups": lambda: gradwatch.ClipByNorm(0.05, math.inf, scope="group"),
    "value": lambda: gradwatch.ClipByValue(0.02),
}
UNIT = ("AGC",)


def _optimizer(model, **options):
    groups = [{"params": list(layer.parameters())} for layer in (model[0], model[2])]
    return torch.optim.SGD(groups, lr=0.05, **options)


def _loss(model, step, place=HOST):
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
    return model(place.tensor(x)).square().mean() * (100.0 if step in SPIKED else 1.0)


def _train(policy, place, *, steps=range(STEPS), watcher_state=None, states=None, **options):
    model = place.to(zoo.small())
    optimizer = _optimizer(model, **options)
    watcher = gradwatch.watch(model, optimizer, clip=POLICIES[policy]())
    if states is not None:
        model.load_state_dict(states[0])
        optimizer.load_state_dict(states[1])
        watcher.load_state_dict(states[2])
    seen = []
    with place.late(), watcher:
        for step in steps:
            optimizer.zero_grad()
            _loss(model, step, place).backward()
            before = [p.grad.cpu().clone() for p in model.parameters()]
            optimizer.step()
            after = [p.grad.cpu().clone() for p in model.parameters()]
            seen.append((before, after))
    states = model.state_dict(), optimizer.state_dict(), watcher.state_dict()
    return watcher.history, seen, states


@pytest.mark.parametrize("policy", POLICIES)
def test_the_record_is_what_was_done(policy, place):
    """Norms before and after, in total and per parameter, are those of the gradients themselves."""
    kind = float(getattr(POLICIES[policy](), "norm_type", 2.0))
    history, seen, _ = _train(policy, place)
    names = [name for name, _ in zoo.small().named_parameters()]
    rows = history.parameters().set_index(["step", "parameter"])
    for number, (before, after) in enumerate(seen, start=1):
        step = history.steps().loc[number]
        for norm, gradients in (("grad_norm", before), ("grad_norm_clipped", after)):
            each = norms(dict(zip(names, gradients, strict=True)), kind)
            recorded = [rows.loc[(number, name), norm] for name in names]
            assert recorded == pytest.approx(list(each.values()), rel=1e-4, abs=1e-9)
            assert step[norm] == pytest.approx(total(each, kind), rel=1e-4)
        changed = any(not torch.equal(b, a) for b, a in zip(before, after, strict=True))
        assert bool(step["clipped"]) == changed
        assert step["grad_norm_clipped"] == pytest.approx(step["clip_coef"] * step["grad_norm"])


@pytest.mark.parametrize("policy", POLICIES)
def test_a_number_that_comes_late_changes_no_decision(policy, away):
    """On an accelerator the gradients are clipped as on the CPU."""
    history, seen, _ = _train(policy, HOST)
    late_history, late_seen, _ = _train(policy, away)
    torch.testing.assert_close(seen, late_seen, rtol=1e-5, atol=1e-8)
    columns = ["grad_norm", "grad_norm_clipped", "clip_coef", "clip_threshold"]
    expected, late = history.steps()[columns], late_history.steps()[columns]
    assert late.to_numpy() == pytest.approx(expected.to_numpy(), rel=1e-5, nan_ok=True)


@pytest.mark.parametrize("cut", [1, 4, 13, 31])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_restored_run_decides_the_same(policy, cut, machine):
    """Stopped and restored at any step, the weights and the records are those of one run."""
    history, _, (weights, _, _) = _train(policy, machine)
    _, _, states = _train(policy, machine, steps=range(cut))
    rest, _, (resumed, _, _) = _train(policy, machine, steps=range(cut, STEPS), states=states)
    torch.testing.assert_close(resumed, weights, rtol=0, atol=0)
    columns = ["grad_norm", "clip_coef", "clip_threshold", "outcome"]
    assert rest.steps()[columns].equals(history.steps()[columns].iloc[cut:])


@pytest.mark.parametrize("policy", [name for name in POLICIES if name not in UNIT])
def test_a_fused_optimizer_gets_the_same(policy, machine):
    """Whether the kernel scales or a pass over the gradients, the weights agree."""
    _, _, (weights, _, _) = _train(policy, machine)
    _, _, (fused, _, _) = _train(policy, machine, fused=True)
    torch.testing.assert_close(fused, weights, rtol=1e-4, atol=1e-6)


def test_each_optimizer_has_a_memory_of_its_own():
    """One that has seen large norms does not make another clip late."""
    large, small = (torch.ones(1, requires_grad=True) for _ in range(2))
    optimizers = [torch.optim.SGD([x], lr=0.0) for x in (large, small)]
    policy = gradwatch.ZClip(warmup_steps=4)
    with gradwatch.watch({"a": large, "b": small}, optimizers, clip=policy) as watcher:
        for step in range(12):
            spike = 1000.0 if step == 10 else 1.0
            (1e3 * large + spike * (1 + 0.01 * (step % 3)) * small).sum().backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    steps = watcher.history.steps()
    assert steps["clipped"][steps["optimizer"] == "SGD"].sum() == 0
    assert steps["clipped"][steps["optimizer"] == "SGD-1"].tolist()[10]


@pytest.mark.parametrize("skip_spikes", ["auto", 8.0])
def test_spikes_are_left_out(skip_spikes, machine):
    """A finite outlier is skipped like a NaN: the weights are those of a run without its batch."""

    def train(steps, **options):
        model = machine.to(zoo.small())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        with gradwatch.watch(model, optimizer, **options) as watcher:
            for step in steps:
                (_loss(model, step, machine) * (1.0 if step != 12 else 0.01)).backward()
                optimizer.step()
                optimizer.zero_grad()
        return watcher.history.steps(), list(model.parameters())

    steps, weights = train(range(STEPS), skip_spikes=skip_spikes)
    _, expected = train([step for step in range(STEPS) if step != 30])
    assert all(map(torch.equal, weights, expected))
    assert steps.index[steps["outcome"] == "skipped_policy"].tolist() == [31]


def test_a_rise_that_lasts_is_no_spike(place):
    """After ten outliers in a row the new level is the usual one, and the run goes on."""
    x = place.tensor(torch.ones(1)).requires_grad_()
    optimizer = torch.optim.AdamW([x], fused=not place.at_hand)
    with (
        place.late(),
        gradwatch.watch({"x": x}, optimizer, skip_spikes="auto") as watcher,
    ):
        for step in range(90):
            ((1.0 + 0.1 * (step % 3)) * (30.0 if step >= 40 else 1.0) * x).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    outcomes = watcher.history.steps()["outcome"].tolist()
    skipped = [number for number, outcome in enumerate(outcomes) if outcome != "applied"]
    assert skipped == list(range(40, 40 + len(skipped)))
    assert 10 <= len(skipped) <= 12
