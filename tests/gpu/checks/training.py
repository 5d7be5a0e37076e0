"""The training stays what it was: bits of weights and state, clips, skips, decisions."""

from __future__ import annotations

import json
from typing import Any

import gradwatch
from tests.gpu.place import MAKE, Place, adamw, fused_adamw
from tests.gpu.registry import Found, check, require
from tests.gpu.training import ALL, Training, apart, batch, equal, loss_of, net, relative


@check()
def neutral(place: Place) -> Found:
    """Watching changes no bit of weights and state, with four optimizers."""
    found = {}
    for name, make in MAKE.items():
        one, two = (Training(None, make).run(place.device) for _ in range(2))
        require(equal(one.weights, two.weights), f"{name}: two unwatched runs differ already")
        with place.late():
            watched = Training({"statistics": ALL}, make).run(place.device)
        found[name] = equal(one.weights, watched.weights) and equal(one.state, watched.state)
    require(all(found.values()), f"bit-identical: {found}")
    return found


@check()
def clip_parity(place: Place) -> Found:
    """`clip=` gives the bits of clip_grad_norm_, and nearly so inside of a fused optimizer."""
    found = {}
    for name, make in MAKE.items():
        for limit in (1e-2, 1e9):
            expected = Training(None, make, clip=limit).run(place.device)
            with place.late():
                got = Training({"clip": limit}, make).run(place.device)
            found[f"{name}, clip={limit:g}"] = apart(expected.weights, got.weights)
    # A fused optimizer multiplies inside of its kernel: one rounding less.
    limits = {one: 1e-5 if one.startswith("fused") and "0.01" in one else 0.0 for one in found}
    bad = {one: error for one, error in found.items() if error > limits[one]}
    require(not bad, f"differences of weights: {bad}")
    return found


POLICIES: dict[str, dict[str, Any]] = {
    "auto": {"clip": "auto"},
    "ZClip": {"clip": gradwatch.ZClip(warmup_steps=5)},
    "AutoClip": {"clip": gradwatch.AutoClip()},
    "AdaGC": {"clip": gradwatch.AdaGC(warmup=5)},
    "AdaptiveGradientClip": {"clip": gradwatch.AdaptiveGradientClip()},
    "ClipByValue": {"clip": gradwatch.ClipByValue(1e-3)},
    "skip_spikes": {"skip_spikes": "auto"},
}


@check()
def policies(place: Place) -> Found:
    """Every policy decides as on a CPU: norms and outcomes of 30 steps, one of them bad."""
    found = {}
    for name, options in POLICIES.items():
        # A policy that only watches would go on with NaN weights.
        how: dict[str, Any] = {"on_nonfinite": "skip", **options}
        expected = Training(how, steps=30, poisoned=(20,)).run("cpu")
        with place.late():
            got = Training(how, steps=30, poisoned=(20,)).run(place.device)
        require(got.outcomes == expected.outcomes, f"{name}: outcomes differ")
        found[name] = relative(got.norms, expected.norms)
    require(max(found.values()) < 1e-2, f"relative differences of norms: {found}")
    return found


@check()
def skip_exact(place: Place) -> Found:
    """A skipped step leaves weights and state as if its batch had not been, bit for bit."""
    cases = 0
    for name, make in MAKE.items():
        for managed in (False, True):
            for bad in (0, 3):
                how: dict[str, Any] = {"make": make, "managed": managed}
                expected = Training({}, left_out=(bad,), **how).run(place.device)
                with place.late():
                    got = Training({"on_nonfinite": "skip"}, poisoned=(bad,), **how)
                    got.run(place.device)
                case = f"{name}, step {bad + 1}, managed={managed}"
                require(equal(expected.weights, got.weights), f"{case}: weights differ")
                require(equal(expected.state, got.state), f"{case}: state differs")
                require(got.outcomes.count("skipped_nonfinite") == 1, f"{case}: {got.outcomes}")
                cases += 1
    return {"cases": cases}


@check()
def consecutive_skips(place: Place) -> Found:
    """`max_consecutive_skips` raises in the step in which it does on a CPU."""
    found = {}
    for name, make in MAKE.items():
        for managed in (False, True):
            expected = _raising_step("cpu", make, managed)
            with place.late():
                got = _raising_step(place.device, make, managed)
            require(got == expected == 6, f"{name}, managed={managed}: {got}, {expected} on a CPU")
            found[f"{name}, managed={managed}"] = got
    return found


def _raising_step(device: Any, make: Any, managed: bool) -> int:
    """Returns the step, counted from 1, in which too many skips in a row end the training."""
    options = {"on_nonfinite": "skip", "max_consecutive_skips": 3}
    training = Training(options, make, steps=20, managed=managed, poisoned=range(2, 20))
    try:
        training.run(device)
    except gradwatch.NonFiniteGradientError as error:
        return error.step
    return 0


@check()
def resume(place: Place) -> Found:
    """A run that goes on from a state_dict() decides as the one that was never stopped."""
    options = {"clip": "auto", "skip_spikes": "auto", "on_nonfinite": "skip"}
    thresholds: list[float] = []
    with place.late():
        whole = Training(options, fused_adamw, steps=40).run(place.device)
        model = net(place.device)
        optimizer = fused_adamw(list(model.parameters()))
        state: dict[str, Any] = {}
        for start, end in ((0, 25), (25, 40)):
            watcher = gradwatch.watch(model, optimizer, **options)
            if state:
                watcher.load_state_dict(json.loads(json.dumps(state)))
            with watcher:
                for step in range(start, end):
                    loss_of(model, batch(step, place.device)).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                state = watcher.state_dict()
            thresholds += watcher.history.steps()["clip_threshold"].tolist()
    expected = whole.watcher.history.steps()["clip_threshold"].tolist()
    error = relative(thresholds, expected)
    require(error < 1e-6, f"thresholds differ by {error}")
    return {"largest relative difference": error}


@check(alone_s=90)
def default_device(place: Place) -> Found:
    """With torch.set_default_device(), models on it and on the CPU are watched and clipped."""
    import torch

    rows = {}
    cases: dict[str, dict[str, Any]] = {
        "watch": {"statistics": ALL},
        "clip": {"clip": 1e-3},
        "auto, spikes": {"clip": "auto", "skip_spikes": "auto", "on_nonfinite": "skip"},
        "accumulate": {"accumulate": 2},
    }
    torch.set_default_device(place.device)
    try:
        for device in (place.device, "cpu"):
            for name, options in cases.items():
                micro = options.get("accumulate", 1)
                got = Training(options, adamw, steps=30, micro=micro).run(device)
                require(len(got.norms) == 30, f"{name} on {device}: {len(got.norms)} of 30 steps")
                rows[f"{name} on {device}"] = len(got.norms)
    finally:
        torch.set_default_device(None)
    return rows
