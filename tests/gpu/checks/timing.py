"""Time: what gradwatch adds to a step, beside what clip_grad_norm_ adds."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

from tests.gpu.place import Place, adamw, fused_adamw
from tests.gpu.registry import Found, check, require
from tests.gpu.training import ALL, Many

CASES: dict[str, tuple[dict[str, Any] | None, Any, float | None]] = {
    "unwatched": (None, adamw, None),
    "clip_grad_norm_": (None, adamw, 1e-3),
    "watch": ({}, adamw, None),
    "clip, nothing clipped": ({"clip": 1e9}, adamw, None),
    "clip": ({"clip": 1e-3}, adamw, None),
    "clip='auto'": ({"clip": "auto"}, adamw, None),
    "statistics": ({"statistics": ALL}, adamw, None),
    "fused, unwatched": (None, fused_adamw, None),
    "fused, clip_grad_norm_": (None, fused_adamw, 1e-3),
    "fused, clip": ({"clip": 1e-3}, fused_adamw, None),
    "fused, skip": ({"on_nonfinite": "skip"}, fused_adamw, None),
}
LIMITS = {"watch": 2.0, "clip": 3.0, "fused, clip": 3.0}
"""The most that a step of 3,000 parameters may gain, as a multiple of what clip_grad_norm_ adds."""

LEAST_MS = 0.5  # what is below it is not judged: a clock that changes adds as much


@check()
def timing(place: Place) -> Found:
    """Milliseconds of a step on host and device, and their ratios to clip_grad_norm_."""
    sizes = (10,) if place.small else (10, 300, 3000)
    found = {str(number): _timed(place, number) for number in sizes}
    if place.cuda:
        last = found[str(sizes[-1])]
        for name, most in LIMITS.items():
            start = "fused, " if name.startswith("fused") else ""
            base = last[f"{start}unwatched"]["device"]
            one, clip = (last[n]["device"] - base for n in (name, f"{start}clip_grad_norm_"))
            text = f"{name} adds {one:.3f} ms, clip_grad_norm_ {clip:.3f} ms"
            require(one <= most * max(clip, 0.0) + LEAST_MS, text)
    return found


def _timed(place: Place, number: int) -> dict[str, Any]:
    cases = {n: c for n, c in CASES.items() if n != "statistics" or number < 1000}
    repeats, steps = (2, 2) if place.small else (7, 20 if number < 1000 else 8)
    host: dict[str, list[float]] = {name: [] for name in cases}
    device: dict[str, list[float]] = {name: [] for name in cases}
    with place.late():
        runs = {
            name: Many(place, number, options, make, clip=clip)
            for name, (options, make, clip) in cases.items()
        }
        for _ in range(repeats):  # in turns, so that a clock that changes meets all of them
            for name, many in runs.items():
                took = _milliseconds(place, many, steps)
                host[name].append(took[0])
                device[name].append(took[1])
        for many in runs.values():
            many.close()
    row: dict[str, Any] = {
        name: {
            "host": round(statistics.median(host[name]), 4),
            "device": round(statistics.median(device[name]), 4),
        }
        for name in cases
    }
    if place.cuda:
        judged = [name for name in cases if cases[name][0] is not None and name != "statistics"]
        row["ratios to clip_grad_norm_"] = {name: _ratios(row, name) for name in judged}
    return row


def _ratios(row: dict[str, Any], name: str) -> dict[str, float]:
    start = "fused, " if name.startswith("fused") else ""
    base, clip = row[f"{start}unwatched"], row[f"{start}clip_grad_norm_"]
    return {
        side: round((row[name][side] - base[side]) / max(clip[side] - base[side], 1e-6), 2)
        for side in ("host", "device")
    }


def _milliseconds(place: Place, many: Many, steps: int) -> tuple[float, float]:
    """Returns how long the host takes for a step, and how long the device."""
    place.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if place.cuda else []
    start = time.perf_counter()
    for event in events[:1]:
        event.record()
    for _ in range(steps):
        many.step()
    host = time.perf_counter() - start
    for event in events[1:]:
        event.record()
    place.synchronize()
    whole = 1e3 * (time.perf_counter() - start)
    if events:
        whole = events[0].elapsed_time(events[1])
    return 1e3 * host / steps, whole / steps
