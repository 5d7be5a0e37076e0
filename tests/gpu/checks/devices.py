"""Several devices: a model spread over two of them, and one that is not on the current device."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import gradwatch
from tests.gpu.place import MAKE, Place, adamw
from tests.gpu.registry import Found, Skipped, check, require
from tests.gpu.training import ALL, Training, apart, batch, equal, relative


class _Two(nn.Module):
    """Two layers, each on a device of its own."""

    def __init__(self, first: torch.device, second: torch.device) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = first, second
        self.enter = nn.Linear(64, 64).to(first)
        self.leave = nn.Linear(64, 1).to(second)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(torch.tanh(self.enter(x.to(self.first))).to(self.second))


def _pairs(place: Place) -> list[tuple[torch.device, torch.device]]:
    """Returns the device beside the CPU, and two devices, each in both orders."""
    if place.dry:
        raise Skipped("needs a device beside the CPU")
    others = [torch.device("cpu"), *place.devices[1:2]]
    pairs = [(place.devices[0], other) for other in others]
    return pairs + [(b, a) for a, b in pairs]


class _Spread:
    """A training of a model on two devices."""

    def __init__(
        self,
        devices: tuple[torch.device, torch.device],
        options: dict[str, Any] | None,
        make: Callable[[Any], torch.optim.Optimizer] = adamw,
        clip: float | None = None,
        micro: int = 1,
        managed: bool = False,
        poisoned: int = -1,
    ) -> None:
        model = _Two(*devices)
        optimizer = make(list(model.parameters()))
        self.watcher: Any = None
        if options is not None:
            self.watcher = gradwatch.watch(model, optimizer, **options).attach()
        for step in range(8):
            for part in range(micro):
                x = batch(100 * part + step, "cpu")
                target = (x.sum(1, keepdim=True) / 8).to(devices[1])
                loss = (model(x) - target).square().mean()
                loss = loss * (math.nan if step == poisoned else 1.0)
                if managed:
                    self.watcher.backward(loss)
                    self.watcher.step()
                else:
                    (loss / micro).backward()
            if managed:
                continue
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            if step != poisoned or options is not None:
                optimizer.step()
            optimizer.zero_grad()
        if self.watcher is not None:
            self.watcher.close()
        self.weights = [p.detach().cpu() for p in model.parameters()]

    @property
    def norms(self) -> list[float]:
        return self.watcher.history.steps()["grad_norm"].tolist()


@check()
def two_devices_watched(place: Place) -> Found:
    """Half of the parameters elsewhere: norms are those of one device, and no bit changes."""
    found = {}
    cpu = (torch.device("cpu"),) * 2
    for pair in _pairs(place):
        for name, make in MAKE.items():
            expected = _Spread(cpu, {}, make).norms
            plain = _Spread(pair, None, make)
            watched = _Spread(pair, {"statistics": ALL}, make)
            error = relative(watched.norms, expected)
            require(error < 1e-3, f"{pair}, {name}: norms differ by {error}")
            require(equal(plain.weights, watched.weights), f"{pair}, {name}: weights differ")
            found[f"{pair[0]} and {pair[1]}, {name}"] = error
    return found


@check()
def two_devices_clip(place: Place) -> Found:
    """Half of the parameters elsewhere: `clip=` works as clip_grad_norm_ does."""
    found = {}
    for pair in _pairs(place):
        for name, make in MAKE.items():
            expected = _Spread(pair, None, make, clip=1e-2)
            got = _Spread(pair, {"clip": 1e-2}, make)
            error = apart(expected.weights, got.weights)
            require(error < 1e-5, f"{pair}, {name}: weights differ by {error}")
            found[f"{pair[0]} and {pair[1]}, {name}"] = error
    return found


@check()
def two_devices_skip(place: Place) -> Found:
    """Half of the parameters elsewhere: a skip leaves no trace, and where nothing is bad none."""
    cases = 0
    for pair in _pairs(place):
        for name, make in MAKE.items():
            for bad in (-1, 3):
                place.busy(5)
                expected = _Spread(pair, None, make, poisoned=bad)
                got = _Spread(pair, {"on_nonfinite": "skip"}, make, poisoned=bad)
                same = equal(expected.weights, got.weights)
                require(same, f"{pair}, {name}, bad step {bad}: weights differ")
                cases += 1
    return {"cases": cases}


@check()
def two_devices_accumulate(place: Place) -> Found:
    """Half of the parameters elsewhere: a managed window has the mean gradient, and its norm."""
    found = {}
    cpu = (torch.device("cpu"),) * 2
    for pair in _pairs(place):
        how: dict[str, Any] = {"micro": 2, "managed": True}
        expected = _Spread(cpu, {"accumulate": 2}, **how)
        got = _Spread(pair, {"accumulate": 2}, **how)
        error = relative(got.norms, expected.norms)
        require(error < 1e-3, f"{pair}: norms differ by {error}")
        plain = _Spread(pair, None, micro=2)
        by = apart(plain.weights, got.weights)
        require(by < 1e-4, f"{pair}: weights differ by {by} from those of a loop that divides")
        found[f"{pair[0]} and {pair[1]}"] = error
    return found


@check(devices=2)
def other_current_device(place: Place) -> Found:
    """A model that is not on the current device: its numbers are waited for on its own stream."""
    first, second = place.devices[:2]
    getattr(torch, place.device.type).set_device(0)
    held = torch.cuda.memory_reserved(first) if place.cuda else 0
    expected = Training({}, steps=10).run("cpu").norms
    got = Training({}, steps=10, before_step=lambda step: place.busy(10, second)).run(second)
    error = relative(got.norms, expected)
    require(error < 1e-3, f"norms {got.norms[:4]}, expected {expected[:4]}")
    more = torch.cuda.memory_reserved(first) - held if place.cuda else 0
    require(more == 0, f"{more} bytes were taken on {first}, where the model is not")
    return {"largest relative difference": error}


@check()
def moved_model(place: Place) -> Found:
    """A model that moves to the device after watch() is measured and clipped there."""
    torch.manual_seed(0)
    model = nn.Linear(64, 1)
    with place.late(), gradwatch.watch(model, clip=1e-2) as watcher:
        model.to(place.device)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        for step in range(4):
            model(batch(step, place.device)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    steps = watcher.history.steps()
    require(len(steps) == 4, f"{len(steps)} of 4 steps are recorded")
    require(bool((steps["grad_norm"] > 1e-2).all()), f"norms {steps['grad_norm'].tolist()}")
    clipped = steps["grad_norm_clipped"]
    require(bool((clipped < 1.001e-2).all()), f"clipped norms {clipped.tolist()}")
    return {"steps": len(steps)}
