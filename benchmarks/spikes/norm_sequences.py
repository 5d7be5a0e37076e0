"""Policies on plain sequences of norms where the truth is known: steady, or risen for good."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache

import torch

import gradwatch
from benchmarks.spikes.measures import steps_to_stop

Make = Callable[[], gradwatch.ClipPolicy]
POLICIES: dict[str, Make] = {
    "AutoClip p10, published": lambda: gradwatch.AutoClip(10, 1_000_000, 1, True),
    "AutoClip p90": gradwatch.AutoClip,
    "ZClip, published": lambda: gradwatch.ZClip(update="clipped"),
    "ZClip, winsorized": gradwatch.ZClip,
    'clip="auto"': gradwatch.RobustClip,
}
SEEDS = 5
STEADY = 3_000
RISEN = 1_000
RISES = (1.5, 2.0, 3.0, 5.0, 10.0)
SPREADS = (0.05, 0.15, 0.5, 1.0)  # standard deviation over mean
USUAL = 0.15


def lognormal(seed: int, length: int, spread: float = USUAL) -> list[float]:
    """Draws steady norms from a lognormal distribution with a mean of about 1.

    Their standard deviation divided by their mean is ``spread``.
    """
    chance = torch.Generator().manual_seed(seed)
    logs = torch.randn(length, generator=chance, dtype=torch.float64)
    return (logs * math.sqrt(math.log1p(spread**2))).exp().tolist()


def factors(make: Make, norms: Sequence[float]) -> list[float]:
    """Returns the factor by which a new policy multiplies each norm."""
    policy = make()
    decisions = [policy.decide(torch.tensor(norm)) for norm in norms]
    return [1.0 if d.coefficient is None else float(d.coefficient) for d in decisions]


@cache
def false_clip_rate(make: Make, spread: float) -> float:
    """Returns the share of steady norms that are clipped, for the worst seed."""
    return max(
        sum(f < 1 for f in factors(make, lognormal(seed, STEADY, spread))) / STEADY
        for seed in range(SEEDS)
    )


@cache
def stop_after_rise(make: Make, rise: float) -> float:
    """Returns the steps until risen norms are no longer clipped, for the worst seed."""
    return max(_stop(make, rise, seed) for seed in range(SEEDS))


def _stop(make: Make, rise: float, seed: int) -> float:
    norms = lognormal(seed, 2 * RISEN)
    risen = norms[:RISEN] + [rise * norm for norm in norms[RISEN:]]
    return steps_to_stop([factor < 1 for factor in factors(make, risen)], RISEN, span=50)


def spike_passes_as(make: Make) -> float:
    """Returns what is left of a norm of ten times the mean after 500 steady ones, at worst."""
    return max(10 * factors(make, [*lognormal(s, 500), 10.0])[-1] for s in range(SEEDS))


def bumpy(seed: int) -> list[float]:
    """Draws norms of which one in twenty is a spike, so that a policy has something to decide."""
    chance = torch.Generator().manual_seed(seed)
    spikes = (torch.rand(STEADY, generator=chance) < 0.05).tolist()
    return [
        n * (20.0 if spike else 1.0)
        for n, spike in zip(lognormal(seed, STEADY), spikes, strict=True)
    ]


def changed_by_scale(make: Make, scale: float) -> int:
    """Counts the decisions that change when all norms are multiplied by a number."""
    changed = 0
    for seed in range(SEEDS):
        norms = bumpy(seed)
        pairs = zip(factors(make, norms), factors(make, [scale * n for n in norms]), strict=True)
        changed += sum((a < 1) != (b < 1) for a, b in pairs)
    return changed


def changed_by_nan(make: Make) -> int:
    """Counts the factors that change at all if a NaN is inserted somewhere."""
    changed = 0
    for seed in range(SEEDS):
        norms, place = bumpy(seed), 200 * seed + 5
        poisoned = factors(make, [*norms[:place], math.nan, *norms[place:]])
        del poisoned[place]
        changed += sum(a != b for a, b in zip(factors(make, norms), poisoned, strict=True))
    return changed
