"""Micro-batches: the noise scale of loops of three kinds."""

from __future__ import annotations

import math
from typing import Any

from tests.gpu.place import Place
from tests.gpu.registry import Found, check, require
from tests.gpu.training import Training

LOOPS: dict[str, tuple[dict[str, Any], bool]] = {
    "by hand": ({}, False),
    "declared": ({"accumulate": 4}, False),
    "managed": ({"accumulate": 4}, True),
}


@check()
def noise_scale(place: Place) -> Found:
    """A loop that accumulates has the noise scale that it has on a CPU."""
    found = {}
    for name, (options, managed) in LOOPS.items():
        how: dict[str, Any] = {"steps": 25, "micro": 4, "managed": managed}
        expected = Training(options, **how).run("cpu").watcher.noise_scale
        with place.late():
            got = Training(options, **how).run(place.device).watcher.noise_scale
        require(got.updates == expected.updates == 25, f"{name}: {got.updates} updates")
        close = math.isclose(got.tr_sigma, expected.tr_sigma, rel_tol=1e-2)
        require(close, f"{name}: {got}, on a CPU {expected}")
        found[name] = [got.b_simple, expected.b_simple]
    return found
