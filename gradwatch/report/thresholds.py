"""Thresholds: every number that a rule of the report decides by."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from gradwatch.pickles import stable_name


@stable_name
@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """What a report calls too much, too little or too often.

    ``docs/report.md`` says how they were tuned, and how often they are wrong.

    Attributes:
        few_steps: Fewer steps than this are said to be too few; NaN and Inf are reported anyway.
            Medians of ten steps at both ends of a run need twenty.
        rise: Norms that grew by this factor before the first NaN make the learning rate its cause.
            Two sound mini-batches seldom differ by ten.
        exploding: Growth of the norm over that at the start. Sound runs were seen to grow ten
            times, deep plain networks that begin with tiny gradients eighty; those that diverge
            pass 1,000 within some steps.
        start_leap: Growth of the norm within the first six steps. Sound runs were seen to grow
            three times there, those with a hundred times the learning rate six and more.
        loss_rise: Growth of the loss over that at the start. Twice what an untrained model
            has is worse than guessing.
        vanishing: Typical gradient element of the first quarter of the layers over that of the last
            quarter. Sound networks stay above 1/100, also with ten layers; a sigmoid passes on a
            quarter at most, so ten of them reach a millionth.
        vanishing_layers: Weights that there must be for a trend over depth; with fewer,
            one odd layer makes it.
        vanishing_trend: Rank correlation of gradient and depth. It tells a geometric fall from a
            single weak layer, such as an embedding of rare words.
        spike: Norm over the usual one around it. ``clip="auto"`` calls eight times the median out,
            whatever the spread; ten is beyond that.
        spike_z: Deviations of the logarithm that it must be above as well: once the training data
            are learnt, norms spread over factors of ten, and none of them is a spike.
        zero_share: Share of the steps in which the gradient of a parameter is exactly 0. A layer
            may wait for another one that begins at zero, for a step, but not half of the time.
        dead_units: Share of the elements of a bias whose gradient is exactly 0. A ReLU unit is off
            for half of the inputs, but not for a whole batch of them; sound runs were seen to
            have up to six in ten units off in a batch.
        skipped: Share of steps left out above which it is a warning: one in a hundred costs little.
        scaler_skips: Steps that a ``GradScaler`` may leave out besides that share, while it
            looks for its scale: from 65,536 down to 64 are ten.
        scaler_halvings: Halvings of the loss scale below its largest value. Ten more than that
            search is a collapse.
        clip_steps: Applied steps that clipping is judged on, the newest; as ``History.advice()``.
        clip_often: Share of them clipped, above which the clip sets the size of most updates.
        clip_far: A limit this many times above the largest norm can catch nothing that matters.
        update_large: Size of a step over that of the weights, median. The rule of thumb is 1e-3
            (Karpathy 2015); small sound networks reach 0.03, and at 0.1 ten steps rewrite them.
        update_leap: The same of a single step. The first step of Adam was seen to reach 0.15 in
            small sound networks; at 0.5, it replaces the initialisation.
        update_small: The same from below: at 1e-6, a million steps move a weight by its own size
            if all go the same way.
        noise: Noise scale over batch, or batch over noise scale. At ten times, nine tenths of
            the examples (or of the steps) bring nothing (McCandlish et al. 2018).
        rank: Norm over all ranks over that of this rank, median. A mean is never larger than its
            largest part, so at two another rank has at least twice this one's.
        accumulating: Growth of the norm from step 1 over the first ``accumulating_steps``. Where
            gradients of sound batches add up, it is about half of their number, or more.
        accumulating_steps: Steps from the first one in which the norm grows on a line.
        accumulating_fit: Share of the variance that a line explains there. Noise of sound batches
            leaves it below 0.9, growth by a factor per step bends it.
        half_share: Share of small norms that are whole numbers of float16's smallest step, with
            no loss scale. One in five is by chance.
        sample_blocks: Ranges of steps in which per-parameter numbers are read, from first to last.
        sample_steps: Steps in each of them; fewer where a model has more than ``sample_rows``
            allow.
        sample_rows: Rows of per-parameter numbers to read at most, about.
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

    def __post_init__(self) -> None:
        """Checks every number.

        Raises:
            TypeError: If one is no number.
            ValueError: If one is not positive and finite, or a share is above 1.
        """
        for entry in fields(self):
            _check(entry.name, getattr(self, entry.name), whole=entry.type == "int")


SHARES = (
    "vanishing_trend",
    "zero_share",
    "dead_units",
    "skipped",
    "clip_often",
    "accumulating_fit",
    "half_share",
)


def _check(name: str, value: object, *, whole: bool) -> None:
    wanted = "an integer" if whole else "a number"
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        raise TypeError(f"Thresholds({name}=) must be {wanted}, got {value!r}.")
    if not 0 < value < math.inf:
        raise ValueError(f"Thresholds({name}=) must be positive and finite, got {value!r}.")
    if name in SHARES and value > 1:
        raise ValueError(f"Thresholds({name}=) is a share and must be at most 1, got {value!r}.")
