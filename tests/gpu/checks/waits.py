"""What a step gains: kernels that do not grow with the model, and no wait for the device."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch

import gradwatch
from tests.gpu.place import Place, adamw, fused_adamw, sgd
from tests.gpu.registry import Found, check, require
from tests.gpu.training import ALL, Many, Options, added

FUSED: dict[str, Any] = {"make": fused_adamw}
FREE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "watch": ({}, {}),
    "a clip of the loop's own": ({}, {"clip": 1e-3}),
    "clip, nothing clipped": ({"clip": 1e9}, {}),
    "clip": ({"clip": 1e-3}, {}),
    "clip, fused": ({"clip": 1e-3}, FUSED),
    "clip='auto'": ({"clip": "auto"}, {}),
    "ZClip": ({"clip": gradwatch.ZClip(warmup_steps=2)}, {}),
    "statistics": ({"statistics": ALL}, {}),
    "skip, fused": ({"on_nonfinite": "skip"}, FUSED),
    "skip_spikes, fused": ({"skip_spikes": "auto"}, FUSED),
    "skip and clip, fused": ({"on_nonfinite": "skip", "clip": 1e-3}, FUSED),
    "scaler": ({}, {"scaled": True}),
    "scaler, fused": ({}, {"scaled": True, **FUSED}),
    "accumulate by hand": ({}, {"micro": 4}),
    "accumulate": ({"accumulate": 4}, {"micro": 4}),
    "managed": ({}, {"managed": True}),
    "managed, accumulate and clip": (
        {"accumulate": 4, "clip": 1e-3},
        {"micro": 4, "managed": True},
    ),
    "managed skip, fused": ({"on_nonfinite": "skip"}, {"managed": True, **FUSED}),
}
"""What docs/settings.md calls free of waits: options, and how the loop trains."""

ONE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "skip": ({"on_nonfinite": "skip"}, {}),
    "raise": ({"on_nonfinite": "raise"}, {}),
    "managed skip": ({"on_nonfinite": "skip"}, {"managed": True}),
}
"""What waits once in a step."""


@check()
def waits(place: Place) -> Found:
    """No wait to watch, to clip, for statistics, managed and for a fused skip; one for the others."""
    found, bad = {}, []
    for expected, cases in ((0, FREE), (1, ONE)):
        for name, (options, how) in cases.items():
            found[name] = added(place, 20, options, **how).waits
            if found[name] != expected:
                bad.append(f"{name}: {found[name]:g} per step, not {expected}")
    require(not bad, "; ".join(bad))
    return found


@check(cuda=True)
def sync_debug_mode(place: Place) -> Found:
    """torch.cuda.set_sync_debug_mode("warn") says nothing that it does not say without gradwatch."""
    found, bad = {}, []
    for name, (options, how) in FREE.items():
        watched, plain = (_told(place, one, how) for one in (options, None))
        found[name] = len(watched) - len(plain)
        if found[name] > 0:
            bad.append(f"{name}: {sorted(set(watched))}")
    require(not bad, "; ".join(bad))
    return found


def _told(place: Place, options: Options | None, how: Mapping[str, Any]) -> list[str]:
    """Returns the places at which torch says that four steps wait for the device."""
    many = Many(place, 50, options, **how)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            for _ in range(4):
                many.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    many.close()
    ours = [one for one in told if issubclass(one.category, gradwatch.GradwatchWarning)]
    require(not ours, str([str(one.message) for one in ours]))
    return [f"{w.filename}:{w.lineno}" for w in told if "synchroniz" in str(w.message)]


TWO = (torch.bfloat16, torch.float32)
THREE = (*TWO, torch.float16)  # in which the eps of AdamW is 0
KERNELS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "watch": ({}, {}),
    "clip, nothing clipped": ({"clip": 1e9}, {}),
    "clip": ({"clip": 1e-3}, {}),
    "clip='auto'": ({"clip": "auto"}, {}),
    "skip": ({"on_nonfinite": "skip"}, {}),
    "clip, fused": ({"clip": 1e-3}, FUSED),
    "skip, fused": ({"on_nonfinite": "skip"}, FUSED),
    "watch, two dtypes": ({}, {"dtypes": TWO}),
    "clip, two dtypes": ({"clip": 1e-3}, {"dtypes": TWO}),
    "skip, two dtypes": ({"on_nonfinite": "skip"}, {"dtypes": TWO}),
    "clip, three dtypes": ({"clip": 1e-3}, {"dtypes": THREE, "make": sgd}),
}


@check()
def kernels(place: Place) -> Found:
    """As many calls with 3,000 parameters as with 10, of one dtype and of several."""
    sizes = (12, 120) if place.small else (10, 300, 3000)
    found, bad = {}, []
    for name, (options, how) in KERNELS.items():
        counts = [added(place, number, options, **how).kernels for number in sizes]
        found[name] = dict(zip(map(str, sizes), counts, strict=True))
        # A kernel of many tensors takes some hundred of them at a time, so on a GPU a call over
        # 3,000 is some 30 launches. One call for each parameter would be 3,000.
        more = 0 if place.small else sizes[-1] / 10
        if counts[-1] > counts[0] + more:
            bad.append(f"{name}: {found[name]}")
    require(not bad, "; ".join(bad))
    return found


@check()
def foreign_optimizer(place: Place) -> Found:
    """An optimizer that is found at its first step costs no wait either."""

    def step(parameters: Any, optimizer: Any) -> None:
        sum(p.square().sum() for p in parameters).backward()
        optimizer.step()
        optimizer.zero_grad()

    waits = []
    for watched in (True, False):
        ones = [torch.ones(8, device=place.device, requires_grad=True) for _ in range(4)]
        optimizer = adamw(ones)
        names = dict(zip("abcd", ones, strict=True))
        with place.late(), gradwatch.watch(names) as watcher:
            if not watched:
                watcher.close()
            for _ in range(8):
                step(ones, optimizer)
            with place.counting() as count:
                for _ in range(4):
                    step(ones, optimizer)
        waits.append(count.waits)
    require(waits[0] == waits[1], f"waits in four steps, watched and not: {waits}")
    return {"waits": waits[0] - waits[1]}
