"""Rules: each one yields findings about a run, or none.

A rule is a function of the run and the thresholds; it reads nothing beyond its arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from gradwatch.report.finding import Finding
from gradwatch.report.rules.accumulating import accumulating
from gradwatch.report.rules.clipping import clipping
from gradwatch.report.rules.discarded import discarded
from gradwatch.report.rules.exploding import exploding
from gradwatch.report.rules.half import half
from gradwatch.report.rules.loop import loop
from gradwatch.report.rules.loss import rising_loss
from gradwatch.report.rules.loss_scale import loss_scale
from gradwatch.report.rules.no_gradient import no_gradient
from gradwatch.report.rules.noise import noise
from gradwatch.report.rules.nonfinite import nonfinite
from gradwatch.report.rules.poisoned import poisoned
from gradwatch.report.rules.ranks import ranks
from gradwatch.report.rules.skipped import skipped
from gradwatch.report.rules.spikes import spikes
from gradwatch.report.rules.unstable_start import unstable_start
from gradwatch.report.rules.updates import updates
from gradwatch.report.rules.vanishing import vanishing
from gradwatch.report.rules.zero_gradient import zero_gradient
from gradwatch.report.run_data import RunData
from gradwatch.report.thresholds import Thresholds

Rule = Callable[[RunData, Thresholds], Iterator[Finding]]

RULES: tuple[Rule, ...] = (
    loop,
    accumulating,
    half,
    nonfinite,
    poisoned,
    discarded,
    loss_scale,
    exploding,
    rising_loss,
    vanishing,
    no_gradient,
    ranks,
    updates,
    unstable_start,
    zero_gradient,
    spikes,
    skipped,
    clipping,
    noise,
)
"""The order within a severity: causes come before their effects."""

ALWAYS: tuple[Rule, ...] = (
    loop,
    nonfinite,
    poisoned,
    discarded,
    no_gradient,
    loss_scale,
    skipped,
    exploding,
    half,
)
"""The rules that need no minimum number of steps."""

KINDS = (
    "mistake",
    "changed",
    "accumulating",
    "half_precision",
    "nan",
    "inf",
    "overflow",
    "poisoned",
    "discarded",
    "loss_scale",
    "exploding",
    "loss_rising",
    "vanishing",
    "no_gradient",
    "rank",
    "same_data",
    "update_large",
    "update_small",
    "unstable_start",
    "zero_gradient",
    "dead_units",
    "spike",
    "skipped",
    "clip_always",
    "clip_never",
    "batch_small",
    "batch_large",
)
"""The kinds of findings; those of one rule stand together."""
