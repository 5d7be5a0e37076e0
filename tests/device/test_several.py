"""Parameters on several devices and of several dtypes: as with torch's own clip, and as on the CPU."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_, clip_grad_value_

import gradwatch
from gradwatch import (
    AdaGC,
    AdaptiveGradientClip,
    AutoClip,
    ClipByNorm,
    ClipByValue,
    ZClip,
)
from tests.support import device, state

CPU = torch.device("cpu")
MIXED = {"cpu, device": (CPU, device.DEVICE), "device, cpu": (device.DEVICE, CPU)}
ACCELERATORS = (
    {"first, second": device.DEVICES, "second, first": device.DEVICES[::-1]}
    if len(device.DEVICES) > 1
    else {}
)
PLACES = {**MIXED, **ACCELERATORS}
STEPS = 6

places = pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
accelerators = pytest.mark.parametrize("places", ACCELERATORS.values(), ids=ACCELERATORS)


class Parts(nn.Module):
    """Three parts: the first and the last on one device, of one dtype, the middle one on another."""

    def __init__(self, places, dtypes=(torch.float32, torch.float32), width=6):
        super().__init__()
        torch.manual_seed(0)
        self.kinds = [*zip(places, dtypes, strict=True), (places[0], dtypes[0])]
        parts = [
            nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 6)) for _ in range(3)
        ]
        for part, (place, dtype) in zip(parts, self.kinds, strict=True):
            part.to(dtype)
            if place != CPU:
                device.to(part, place.index)
        self.parts = nn.ModuleList(parts)

    def forward(self, x):
        for part, (place, dtype) in zip(self.parts, self.kinds, strict=True):
            x = part(x.to(place).to(dtype))
        return x


def sgd(parameters):
    """SGD with one operation per parameter, as torch's batched one rounds bfloat16 otherwise."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, foreach=False)


def two_groups(parameters):
    """An optimizer with two parameter groups."""
    first, *others = parameters
    return torch.optim.SGD([{"params": [first]}, {"params": others}], lr=0.1, foreach=False)


def fused(parameters):
    """One kernel, which can scale gradients and skip the step."""
    return torch.optim.AdamW(parameters, lr=1e-2, fused=True)


def fused_sgd(parameters):
    """One whose first step makes state."""
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9, fused=True)


def batch(number):
    """One batch; that of step 4 is an outlier."""
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(number))
    return x * 30 if number == 4 else x


def train(
    places,
    options=None,
    optimizer=sgd,
    dtypes=(torch.float32,) * 2,
    own_clip=None,
    bad=(),
    steps=STEPS,
):
    """Trains; returns the state, the history, and the waits of each step."""
    model = Parts(places, dtypes)
    optimizer = optimizer(model.parameters())
    watcher = None if options is None else gradwatch.watch(model, optimizer, **options).attach()
    waits = []
    for step in range(steps):
        with device.counting() as counts:
            x = batch(step)
            loss = model(x * math.nan if step in bad else x).float().square().mean()
            loss.backward()
            if own_clip is not None:
                own_clip(list(model.parameters()))
            optimizer.step()
            optimizer.zero_grad()
        waits.append(counts.waits)
    if watcher is not None:
        watcher.close()
    found = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    return found, None if watcher is None else watcher.history, waits


def on_cpu(tree):
    """The same tree with all tensors on the CPU."""
    if isinstance(tree, torch.Tensor):
        return tree.detach().cpu()
    if isinstance(tree, dict):
        return {key: on_cpu(value) for key, value in tree.items()}
    return [on_cpu(value) for value in tree] if isinstance(tree, (list, tuple)) else tree


def assert_same(found, expected):
    """Neither weights nor optimizer state differ by a bit."""
    assert list(state.differences(on_cpu(found), on_cpu(expected))) == []


def assert_recorded_alike(history, expected):
    """Norms agree to 1e-6, events and outcomes exactly."""
    steps, others = history.steps(), expected.steps()
    for name in ("grad_norm", "grad_norm_clipped", "clip_coef", "loss"):
        np.testing.assert_allclose(steps[name], others[name], rtol=2e-6, atol=1e-9, err_msg=name)
    assert steps["outcome"].tolist() == others["outcome"].tolist()
    rows, other_rows = history.parameters(), expected.parameters()
    assert rows["parameter"].tolist() == other_rows["parameter"].tolist()
    for name in rows.columns.difference(["parameter", "step", "optimizer"]):
        np.testing.assert_allclose(rows[name], other_rows[name], rtol=1e-5, atol=1e-7, err_msg=name)
    what = ["step", "kind", "parameter"]
    assert history.events()[what].values.tolist() == expected.events()[what].values.tolist()


STATISTICS = ("norm", "max", "mean", "std", "zeros", "weight_norm", "update_ratio")


@places
@pytest.mark.parametrize(
    ("optimizer", "statistics"),
    [(sgd, STATISTICS), (two_groups, ("norm",)), (fused, STATISTICS), (fused_sgd, ("norm",))],
    ids=["SGD", "groups", "fused AdamW", "fused SGD"],
)
def test_watching_changes_nothing_and_does_not_wait(places, optimizer, statistics):
    """Not a bit of weights or state, and the host waits as often as it does unwatched."""
    options = {"statistics": statistics}
    found, history, waits = train(places, options, optimizer)
    plain, _, plain_waits = train(places, None, optimizer)
    assert_same(found, plain)
    assert waits == plain_waits
    assert_recorded_alike(history, train((CPU, CPU), options, optimizer)[1])


@places
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.float64),
        (torch.float64, torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("options", "own_clip"),
    [
        ({"clip": 0.05}, lambda p: clip_grad_norm_(p, 0.05)),
        ({"clip": ClipByNorm(0.05, math.inf)}, lambda p: clip_grad_norm_(p, 0.05, math.inf)),
        ({"clip": ClipByValue(0.01)}, lambda p: clip_grad_value_(p, 0.01)),
    ],
    ids=["norm", "largest magnitude", "value"],
)
def test_the_clip_is_that_of_torch(places, dtypes, options, own_clip):
    """Bit for bit, whichever device comes first."""
    found, _, _ = train(places, options, dtypes=dtypes)
    assert_same(found, train(places, None, dtypes=dtypes, own_clip=own_clip)[0])


POLICIES = {
    "auto": lambda: "auto",
    "ZClip": lambda: ZClip(warmup_steps=2),
    "AutoClip": lambda: AutoClip(percentile=50, warmup=2, window=4),
    "AdaGC": lambda: AdaGC(warmup=2),
    "AdaptiveGradientClip": lambda: AdaptiveGradientClip(0.01),
    "group": lambda: ClipByNorm(0.05, scope="group"),
    "parameter": lambda: ClipByNorm(0.02, scope="parameter"),
    "parameter, largest magnitude": lambda: ClipByNorm(0.01, math.inf, scope="parameter"),
}


@places
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_policies_decide_as_on_the_cpu(places, policy):
    """Every policy clips gradients on two devices as it does on the CPU."""
    optimizer = two_groups
    found, history, waits = train(places, {"clip": policy()}, optimizer)
    expected = train((CPU, CPU), {"clip": policy()}, optimizer)
    assert_recorded_alike(history, expected[1])
    for one, other in zip(
        on_cpu(found["model"]).values(), on_cpu(expected[0]["model"]).values(), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    # Only a factor for gradients on the CPU is waited for.
    added = np.subtract(waits, train(places, None, optimizer)[2])[1:]
    assert added.max() <= (CPU in places)


@places
@pytest.mark.parametrize(
    ("optimizer", "clip"), [(sgd, 0.05), (fused, None), (fused, 0.05), (fused_sgd, None)]
)
def test_a_skipped_step_leaves_no_trace(places, optimizer, clip):
    """A NaN on any device skips the step on all of them; weights and state are as without it."""
    options = {"on_nonfinite": "skip", "clip": clip}
    found, history, _ = train(places, options, optimizer, bad=(2,))
    assert history.steps()["outcome"].tolist()[2] == "skipped_nonfinite"
    expected = train((CPU, CPU), options, optimizer, bad=(2,))
    for one, other in zip(
        on_cpu(found["model"]).values(), on_cpu(expected[0]["model"]).values(), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    if clip is None:
        plain = train(places, {"on_nonfinite": "skip"}, optimizer)[0]
        unwatched = train(places, None, optimizer)[0]
        assert_same(plain, unwatched)


@accelerators
def test_a_fused_skip_between_accelerators_does_not_wait(places):
    """The flag is sent from one to the other."""
    waits = train(places, {"on_nonfinite": "skip"}, fused, bad=(2,))[2]
    assert waits == train(places, None, fused, bad=(2,))[2]


@places
def test_raise_and_spikes(places):
    """The error comes before any weight has moved; an outlier is skipped."""
    model = Parts(places)
    optimizer = sgd(model.parameters())
    before = [one.detach().cpu().clone() for one in model.parameters()]
    with gradwatch.watch(model, optimizer, on_nonfinite="raise"):
        model(batch(0) * math.nan).square().mean().backward()
        with pytest.raises(gradwatch.NonFiniteGradientError):
            optimizer.step()
    after = [one.detach().cpu() for one in model.parameters()]
    assert all(map(torch.equal, before, after))
    options = {"skip_spikes": 2.0}
    history = train(places, options, steps=3)[1]
    assert_recorded_alike(history, train((CPU, CPU), options, steps=3)[1])


WEIGHTS = {
    "on the device": lambda number: torch.tensor(1 + number % 3).to(device.DEVICE),
    "on any device": lambda number: torch.tensor(1.0 + number % 3).to(
        [CPU, *device.DEVICES][number % (1 + len(device.DEVICES))]
    ),
}


@places
@pytest.mark.parametrize(
    ("optimizer", "options"),
    [(sgd, {}), (sgd, {"clip": 0.05}), (fused, {"clip": 0.05, "on_nonfinite": "skip"})],
    ids=["watch", "clip", "fused"],
)
@pytest.mark.parametrize(
    ("weight", "loss_on"),
    [
        (None, CPU),
        (WEIGHTS["on the device"], None),
        (WEIGHTS["on any device"], CPU),
        (WEIGHTS["on any device"], device.DEVICES[-1]),
    ],
    ids=["loss on the cpu", "weights", "weights, loss on the cpu", "weights, loss elsewhere"],
)
def test_managed_accumulation(places, optimizer, options, weight, loss_on):
    """Weights, losses and parameters may each be on another device."""

    def run(places, weight, loss_on):
        model = Parts(places)
        steps = optimizer(model.parameters())
        with gradwatch.watch(model, steps, accumulate=2, **options) as watcher:
            for number in range(8):
                loss = model(batch(number)).square().mean()
                loss = loss if loss_on is None else loss.to(loss_on)
                given = {} if weight is None else {"weight": weight(number)}
                watcher.backward(loss, **given)
                watcher.step()
        return on_cpu(model.state_dict()), watcher.history

    on_host = None if weight is None else lambda number: float(weight(number))
    (weights, history), (expected, alone) = (
        run(places, weight, loss_on),
        run((CPU, CPU), on_host, None),
    )
    assert_recorded_alike(history, alone)
    assert history.steps()["weight"].tolist() == alone.steps()["weight"].tolist()
    for one, other in zip(weights.values(), expected.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@places
def test_run_batch(places):
    """run_batch() adds up losses and weights wherever they are."""
    model = Parts(places)
    optimizer = sgd(model.parameters())
    with gradwatch.watch(model, optimizer) as watcher:
        loss = watcher.run_batch(
            lambda part: (model(part).square().mean(), torch.tensor(8.0).to(device.DEVICE)),
            batch(0),
        )
        watcher.step()
    expected = Parts((CPU, CPU))(batch(0)).square().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@places
def test_two_optimizers(places):
    """Each has its own devices; the norm over all of them is that of the CPU."""

    def run(places):
        model = Parts(places)
        ends = [*model.parts[0].parameters(), *model.parts[2].parameters()]
        optimizers = [sgd(ends), sgd(model.parts[1].parameters())]
        with gradwatch.watch(model, optimizers, clip=0.05) as watcher:
            for step in range(STEPS):
                model(batch(step)).square().mean().backward()
                for one in optimizers:
                    one.step()
                    one.zero_grad()
        return watcher.history

    history, expected = run(places), run((CPU, CPU))
    assert_recorded_alike(history, expected)
    np.testing.assert_allclose(
        history.steps()["grad_norm_all"], expected.steps()["grad_norm_all"], rtol=2e-6
    )


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.float64),
    ],
    ids=str,
)
@pytest.mark.parametrize("same", [True, False], ids=["one device", "two devices"])
@pytest.mark.parametrize("options", [{}, {"statistics": STATISTICS}, {"clip": 0.05}], ids=str)
def test_several_dtypes(dtypes, same, options):
    """Watching changes no bit, and norms of low precision are added up in float32."""
    places = (device.DEVICE, device.DEVICE if same else device.DEVICES[-1])
    found, history, waits = train(places, options, dtypes=dtypes)
    plain, _, plain_waits = train(places, None, dtypes=dtypes)
    assert waits == plain_waits
    if "clip" not in options:
        assert_same(found, plain)
    expected = train((CPU, CPU), options, dtypes=dtypes)[1].steps()
    np.testing.assert_allclose(history.steps()["grad_norm"], expected["grad_norm"], rtol=1e-6)


KINDS = {
    "two dtypes": ([device.DEVICE], [torch.float32, torch.bfloat16]),
    "four dtypes": (
        [device.DEVICE],
        [torch.float32, torch.bfloat16, torch.float64, torch.complex64],
    ),
    "two devices": ([device.DEVICE, CPU], [torch.float32]),
    "all devices, two dtypes": ([CPU, *device.DEVICES], [torch.float32, torch.bfloat16]),
}


@pytest.mark.parametrize(("devices", "dtypes"), KINDS.values(), ids=KINDS)
@pytest.mark.parametrize(
    "options",
    [{}, {"clip": 0.01}, {"clip": ClipByNorm(0.01, math.inf)}, {"clip": "auto"}],
    ids=["watch", "clip", "largest magnitude", "auto"],
)
def test_calls_do_not_grow_with_the_model(devices, dtypes, options):
    """10 and 200 parameters of several kinds need as many kernels and copies."""

    def cost(number):
        tensors = {
            f"p{i}": torch.ones(2, dtype=dtypes[i % len(dtypes)])
            .to(devices[i % len(devices)])
            .requires_grad_()
            for i in range(number)
        }
        optimizer = torch.optim.SGD(tensors.values(), lr=0.0)
        with gradwatch.watch(tensors, optimizer, **options) as watcher:
            for _ in range(3):  # in the third step nothing is measured again
                for one in tensors.values():
                    one.grad = torch.ones_like(one)
                with device.counting() as counts:
                    optimizer.step()
                plain = watcher.history
        with device.counting() as unwatched:
            optimizer.step()
        return counts.kernels - unwatched.kernels, counts.copies, counts.waits, len(plain.steps())

    # With 12 and 200 each kind has parameters in both.
    assert cost(12) == cost(200)
