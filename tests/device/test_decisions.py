"""What is decided on a device, and recorded of it, is what the same training decides on the CPU."""

import math
import pickle
import re
import warnings

import pandas as pd
import pytest
import torch
from torch import nn

import gradwatch
from tests.neutrality.covering import covering_array, name_of
from tests.support import device

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "fused SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "fused AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
}
BOTH = {"on_nonfinite": "skip", "skip_spikes": 4.0}
POLICIES = {
    "record": {},
    "skip": {"on_nonfinite": "skip"},
    "at most 1": {"on_nonfinite": "skip", "max_consecutive_skips": 1},
    "at most 2": {"on_nonfinite": "skip", "max_consecutive_skips": 2},
    "raise": {"on_nonfinite": "raise"},
    "spikes": {"skip_spikes": 4.0},
    "skip and spikes": BOTH,
    "at most 2 of both": {**BOTH, "max_consecutive_skips": 2},
}
CLIPS = {
    "none": lambda: None,
    "fixed": lambda: 0.5,
    "auto": lambda: "auto",
    "ZClip": lambda: gradwatch.ZClip(warmup_steps=5),
    "AdaGC": lambda: gradwatch.AdaGC(warmup=3),
}
STEPS = 34  # a spike is one from the 26th step on
POISONED = {
    "none": {},
    "first": {0: math.nan},
    "middle": {27: math.inf},
    "in a row": {27: math.nan, 28: math.inf, 29: math.nan},
    "spikes": {27: 1e3, 28: 2e3, 31: 1e3},
    "all": {26: 1e3, 27: math.nan, 28: 2e3, 29: 1e3, 30: 1e3, 31: 1e3},
}
LOOPS = ("own", "scaled", "managed", "managed and scaled")
AXES = {
    "optimizer": OPTIMIZERS,
    "policy": POLICIES,
    "clip": CLIPS,
    "poisoned": POISONED,
    "loop": LOOPS,
}


class _Centered(nn.Module):
    """Keeps a running mean, as BatchNorm does, which changes no buffer on the stand-in in C++."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x):
        self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
        return x - self.mean


def _here(tensor):
    return tensor


def _train(optimizer, policy, clip, poisoned, loop, *, on_device, late=2):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), _Centered(), nn.Tanh(), nn.Linear(6, 1))
    there = device.tensor if on_device else _here
    if on_device:
        model = device.to(model)
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    kind = device.NAME if on_device else "cpu"
    scaler = torch.amp.GradScaler(kind, 1024.0, growth_interval=7) if "scaled" in loop else None
    options = {**POLICIES[policy], "clip": CLIPS[clip](), "scaler": scaler}
    errors, returned = [], []
    watcher = gradwatch.watch(
        model, optimizer, statistics=("weight_norm", "update_ratio"), **options
    ).attach()
    with device.late(late):
        for step in range(STEPS):
            x = there(torch.randn(8, 4, generator=torch.Generator().manual_seed(step)))
            loss = model(x).square().mean() * POISONED[poisoned].get(step, 1.0)
            try:
                if "managed" in loop:
                    watcher.backward(loss)
                    returned.append(watcher.step())
                elif scaler is not None:
                    scaler.scale(loss).backward()
                    scaler.step(optimizer)
                    scaler.update()
                else:
                    loss.backward()
                    optimizer.step()
            except gradwatch.NonFiniteGradientError as error:
                errors.append((step, str(error)))
                if "managed" in loop:
                    break
                if scaler is not None:
                    scaler.update()
            optimizer.zero_grad()
        state = watcher.state_dict()
        watcher.close()
    return watcher.history, [model.state_dict(), state], errors, list(map(bool, returned))


# What the host cannot know without a wait: the number of bad elements of a step that is only
# recorded, whether weights were bad before it, and so when buffers turned bad.
UNKNOWN = r" \(\d+ NaN .*? elements\)| \(not counted: .*?\)|, (the first in .*?)?in micro-batch"
UNKNOWN += r"| Weights were NaN or Inf before.*"


def _comparable(frame, counted):
    frame = frame.drop(columns="time_s", errors="ignore")
    if "message" in frame and not counted:
        frame = frame[frame["kind"] != "poisoned"].reset_index(drop=True)
        frame = frame.drop(columns=["nan_count", "inf_count", "value"])
        frame["message"] = [re.sub(UNKNOWN, "", one).rstrip() for one in frame["message"]]
    return frame


def _numbers(state):
    if isinstance(state, dict):
        return [n for key in state for n in _numbers(state[key])]
    if isinstance(state, (list, tuple)):
        return [n for one in state for n in _numbers(one)]
    if isinstance(state, torch.Tensor):
        return state.detach().cpu().double().flatten().tolist()
    return [state] if isinstance(state, float) else []


@pytest.mark.filterwarnings("ignore:gradwatch. NaN or Inf in 1 buffer:UserWarning")
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler:UserWarning")
@pytest.mark.parametrize(
    "setting", covering_array({name: tuple(choices) for name, choices in AXES.items()}), ids=name_of
)
def test_records_are_those_of_the_cpu(setting):
    """All columns of steps, parameters and events, the errors, the state and the weights."""
    (wanted, *rest), (found, *others) = (
        _train(**setting, on_device=where) for where in (False, True)
    )
    policy, loop = setting["policy"], setting["loop"]
    counted = policy not in ("record", "spikes") and loop in ("own", "managed")
    counted = counted and not setting["optimizer"].startswith("fused")
    for name in ("steps", "parameters", "events"):
        pd.testing.assert_frame_equal(
            _comparable(getattr(found, name)(), counted),
            _comparable(getattr(wanted, name)(), counted),
            rtol=3e-6,
            atol=1e-12,
        )
    if not counted:
        rest[1], others[1] = (
            [(step, re.sub(UNKNOWN, "", text)) for step, text in one[1]] for one in (rest, others)
        )
    assert others[1:] == rest[1:]
    torch.testing.assert_close(
        torch.tensor(_numbers(others[0])),
        torch.tensor(_numbers(rest[0])),
        rtol=1e-5,
        atol=1e-6,
        equal_nan=True,
    )


def _waits(optimizer, loop, poisoned, **options):
    """Counts what a training of 60 steps waits for, more than unwatched."""
    counts = []
    for watched in (False, True):
        model = device.to(nn.Linear(4, 1))
        one = OPTIMIZERS[optimizer](model.parameters())
        watcher = gradwatch.watch(model, one, **options)
        attached = watched or loop == "managed"
        if attached:
            watcher.attach()
        x = device.tensor(torch.randn(8, 4))
        with device.late(2), device.counting() as counting:
            for step in range(60):
                loss = model(x).square().mean() * (math.nan if step in poisoned else 1.0)
                if loop == "managed":
                    watcher.backward(loss)
                    watcher.step()
                else:
                    loss.backward()
                    one.step()
                    one.zero_grad()
            counts.append(counting.waits)
        if attached:
            watcher.close()
    return counts[1] - (0 if loop == "managed" else counts[0])


@pytest.mark.parametrize("loop", ["own", "managed"])
@pytest.mark.parametrize("options", [POLICIES["skip"], BOTH, {**BOTH, "clip": 0.5}])
def test_a_fused_optimizer_skips_without_a_wait(loop, options):
    """Also in a managed loop, and while outcomes are known a few steps late."""
    assert _waits("fused AdamW", loop, {3, 20, 21}, **options) == 0


def test_an_unfused_skip_waits_once_per_step():
    """A bad step waits once more, for everything that its event says."""
    assert _waits("AdamW", "own", (), on_nonfinite="skip") == 60
    assert _waits("AdamW", "own", {3, 20}, on_nonfinite="skip") <= 60 + 2


def _never_zeroed(on_device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1))
    model, there = (device.to(model), device.tensor) if on_device else (model, _here)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    watcher, x = gradwatch.watch(model, optimizer).attach(), there(torch.ones(2, 4))
    with warnings.catch_warnings(record=True), device.late(2), device.counting() as counting:
        for _ in range(16):
            model(x).sum().backward()
            optimizer.step()
        waits = counting.waits
    watcher.close()
    return waits, [(event.kind, event.step, event.message) for event in watcher.events]


def test_gradients_that_are_never_zeroed_cost_no_wait():
    """That they are left from the step before is known later, and told of the right step."""
    (waits, found), (_, wanted) = _never_zeroed(on_device=True), _never_zeroed(on_device=False)
    assert waits == 0
    assert found == wanted != []


def _stepped(poisoned):
    model = device.to(nn.Linear(2, 1))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with gradwatch.watch(model, optimizer, on_nonfinite="skip") as watcher:
        x = device.tensor(torch.full((1, 2), math.nan if poisoned else 1.0))
        watcher.backward(model(x).sum())
        return watcher.step()


@pytest.mark.parametrize("poisoned", [True, False])
def test_what_step_returns_can_be_used_as_a_bool(poisoned):
    """In a condition, a comparison, a sum, a text and a pickle; it waits only then."""
    taken, wanted = _stepped(poisoned), not poisoned
    assert (True if taken else False) is wanted  # noqa: SIM210
    assert taken == wanted
    assert taken != poisoned
    assert {taken: 1}[wanted] == 1
    assert 1 + taken == taken + 1 == sum([taken, True]) == 1 + wanted
    assert (taken or False) == wanted
    assert (taken | False) == (False | taken) == (taken & True) == wanted
    assert f"{taken}" == str(taken) == repr(taken) == str(wanted)
    assert [0, 1][taken] == wanted
    assert pickle.loads(pickle.dumps(taken)) is wanted
