"""Thresholds: every number on which a rule of the report decides."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from gradwatch.checks import shown
from gradwatch.pickles import stable_name
from gradwatch.record.schema import loads_older


@stable_name
@loads_older
@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """What a report calls too much, too little or too often.

    ``docs/report.md`` says how the thresholds were tuned, and how often the rules are wrong.
    "Healthy" runs below are the ones that were trained for that.

    Attributes:
        few_steps: With fewer steps than this, only the rules that need few steps run; NaN and Inf
            are always reported. Medians of ten steps at both ends of a run need twenty.
        rise: If norms grew by this factor before the first NaN, the advice blames the learning
            rate. The norms of two healthy mini-batches seldom differ by a factor of ten.
        exploding: Norm divided by the norm at the start. Healthy runs grew up to ten times, deep
            plain networks that begin with tiny gradients eighty times; runs that diverge pass
            1,000 within a few steps.
        start_leap: Growth of the norm within the first six steps. Healthy runs grew up to three
            times there, runs with a hundred times the right learning rate six times and more.
        loss_rise: Loss at the end divided by the loss at the start. Twice the loss of an untrained
            model is worse than guessing.
        vanishing: Typical gradient element in the first quarter of the layers divided by that in
            the last quarter. Healthy networks stay above 1/100, also with ten layers; a sigmoid
            passes on at most a quarter, so ten of them reach a millionth.
        vanishing_layers: Number of weight matrices needed to speak of a trend over depth; with
            fewer, a single odd layer would make one.
        vanishing_trend: Rank correlation of gradient and depth. It separates a geometric fall from
            a single weak layer, such as an embedding of rare words.
        spike: Norm divided by the usual norm around it. ``clip="auto"`` treats eight times the
            median as an outlier, whatever the spread; ten is beyond that.
        spike_z: Number of deviations of the log norm that a spike must exceed as well. Once the
            training data are learned, norms spread over factors of ten without being spikes.
        zero_share: Share of steps in which the gradient of a parameter is exactly 0. A layer may
            have no gradient for one step, behind another layer that starts at zero, but not in
            half of the steps.
        dead_units: Share of the elements of a bias whose gradient is exactly 0. A ReLU unit is off
            for half of the inputs, but seldom for a whole batch; in healthy runs up to six units
            in ten were off for a batch.
        skipped: Share of skipped steps above which the finding is a warning: one in a hundred
            costs little.
        scaler_skips: Steps that a ``GradScaler`` may skip besides that share while it searches
            for its scale: it takes ten from 65,536 down to 64.
        scaler_halvings: Halvings of the loss scale below its largest value. Ten more than that
            search takes is a collapse.
        clip_steps: Number of newest applied steps that clipping is judged on, as in
            ``History.advice()``.
        clip_often: Share of clipped steps above which the clip sets the size of most updates.
        clip_far: A limit this many times the largest norm catches nothing that matters.
        update_large: Median size of an update divided by the size of the weights. The rule of thumb
            is 1e-3 (Karpathy 2015); small healthy networks reach 0.03, and at 0.1 ten steps
            rewrite the weights.
        update_leap: The same for a single step. The first step of Adam reached 0.15 in small
            healthy networks; at 0.5, it replaces the initialization.
        update_small: The same as a lower bound: at 1e-6, a million steps move a weight by its own
            size if all go the same way.
        noise: Noise scale divided by batch size, or batch size by noise scale. At ten, nine tenths
            of the steps (or of the examples) are wasted (McCandlish et al. 2018).
        rank: Median of the norm over all ranks divided by the norm of this rank. A mean is never
            larger than its largest part, so at two another rank has at least twice this norm.
        accumulating: Growth of the norm over the first ``accumulating_steps`` steps. If gradients
            of ordinary batches add up, it is about half of the number of steps, or more.
        accumulating_steps: Number of first steps in which the norm must grow along a straight line.
        accumulating_fit: Share of the variance that a line explains there. The noise of ordinary
            batches keeps it below 0.9; growth by a factor per step bends the line.
        half_share: Share of small norms that fit on the grid of float16 (multiples of its smallest
            positive value), without a loss scale. By chance one in five does.
        sample_blocks: Number of step ranges, from the first to the last step, in which numbers per
            parameter are read.
        sample_steps: Number of steps in each range; fewer if ``sample_rows`` allows no more.
        sample_rows: About how many rows to read at most; a row is one parameter at one step.
        discarded: Share of gradients that were thrown away, of these and of all steps, above which
            it is a finding although they were finite: a loop now and then leaves one over.
    """

    few_steps: int = 20
    rise: float = 10.0
    exploding: float = 100.0
    start_leap: float = 5.0
    loss_rise: float = 2.0
    vanishing: float = 1e-4
    vanishing_layers: int = 8
    vanishing_trend: float = 0.8
    spike: float = 10.0
    spike_z: float = 6.0
    zero_share: float = 0.5
    dead_units: float = 0.7
    skipped: float = 0.01
    scaler_skips: int = 10
    scaler_halvings: int = 20
    clip_steps: int = 1_000
    clip_often: float = 0.5
    clip_far: float = 3.0
    update_large: float = 0.1
    update_leap: float = 0.5
    update_small: float = 1e-6
    noise: float = 10.0
    rank: float = 2.0
    accumulating: float = 3.0
    accumulating_steps: int = 12
    accumulating_fit: float = 0.95
    half_share: float = 0.9
    sample_blocks: int = 8
    sample_steps: int = 64
    sample_rows: int = 400_000
    # Pickles of earlier versions hold the values in this order: a new field goes to the end.
    discarded: float = 0.05

    def __post_init__(self) -> None:
        """Checks every number.

        Raises:
            TypeError: If one is not a number.
            ValueError: If one is not positive and finite, or a share is above 1.
        """
        for entry in fields(self):
            _check(entry.name, getattr(self, entry.name), whole=entry.type == "int")


SHARES = (
    "vanishing_trend",
    "zero_share",
    "dead_units",
    "skipped",
    "discarded",
    "clip_often",
    "accumulating_fit",
    "half_share",
)


def _check(name: str, value: object, *, whole: bool) -> None:
    wanted = "an integer" if whole else "a number"
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        raise TypeError(f"Thresholds({name}=) must be {wanted}, got {shown(value)}.")
    if not 0 < value < math.inf:
        raise ValueError(f"Thresholds({name}=) must be positive and finite, got {shown(value)}.")
    if name in SHARES and value > 1:
        raise ValueError(
            f"Thresholds({name}=) is a share and must be at most 1, got {shown(value)}."
        )
