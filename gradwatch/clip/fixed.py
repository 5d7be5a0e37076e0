"""The fixed clipping rules: by norm and by value."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gradwatch.checks import check_choice, check_positive
from gradwatch.clip.policy import SCOPES, ClipDecision, Stateless
from gradwatch.measure.deferred import is_at_hand
from gradwatch.pickles import stable_name


@stable_name
@dataclass(frozen=True)
class ClipByNorm(Stateless):
    r"""Scales gradients down when their norm exceeds a limit: all together, or in parts.

    The factor is :math:`c = \min(1, m / (n + 10^{-6}))` for the norm :math:`n` and the limit
    :math:`m`, computed as in ``torch.nn.utils.clip_grad_norm_``, so that finite float32 or
    float64 gradients come out bit for bit the same, unless the optimizer is fused. Unlike there,
    gradients are not changed if the norm is not finite: no NaN spreads, and no finite gradient is
    zeroed because another is Inf.

    Attributes:
        max_norm: The limit m, positive; with ``math.inf`` nothing is ever clipped.
        norm_type: The p of the norm, positive; ``math.inf`` for the largest magnitude.
        scope: Which norm is limited: ``"global"`` for the norm of all gradients together;
            ``"group"`` or ``"parameter"`` for the norm of each parameter group of the optimizer, or
            of each parameter, which are then scaled independently.

    Raises:
        TypeError: If a number is not a number, or the scope is not a string.
        ValueError: If a number is not positive, or the scope is another word.

    References:
        Pascanu, Mikolov, Bengio: On the difficulty of training recurrent neural networks.
        ICML 2013, arXiv 1211.5063.

    Example:
        >>> import torch
        >>> round(float(ClipByNorm(1.0).decide(torch.tensor(4.0)).coefficient), 3)
        0.25
    """

    max_norm: float
    norm_type: float = 2.0
    scope: str = "global"

    def __post_init__(self) -> None:
        check_positive("ClipByNorm(max_norm=)", self.max_norm)
        check_positive("ClipByNorm(norm_type=)", self.norm_type)
        check_choice("ClipByNorm(scope=)", self.scope, SCOPES)

    def decide(self, total_norm: Tensor) -> ClipDecision:
        """Computes the factors for norms; see :class:`~gradwatch.clip.policy.ClipPolicy`."""
        # With another scope the limit is per part, and there is none for the total norm.
        threshold = float(self.max_norm) if self.scope == "global" else math.nan
        if _surely_below(total_norm, self.max_norm):
            return ClipDecision(threshold=threshold)
        coefficient = torch.clamp(self.max_norm / (total_norm + 1e-6), max=1.0)
        return ClipDecision(coefficient=coefficient, threshold=threshold)


@stable_name
@dataclass(frozen=True)
class ClipByValue(Stateless):
    """Limits every element of every gradient to ``[-clip_value, clip_value]``.

    This changes the direction of the gradient. The recorded ``clip_coef`` is the ratio of the total
    norm after the clip to that before.

    Attributes:
        clip_value: The limit, positive, in the unit of the gradient.
        norm_type: The p of the norm that is recorded, positive; it does not affect the clip.

    Raises:
        TypeError: If ``clip_value`` is not a number.
        ValueError: If ``clip_value`` is not positive.

    Example:
        >>> import torch
        >>> ClipByValue(0.5).decide(torch.tensor(4.0)).clip_value
        0.5
    """

    clip_value: float
    norm_type: float = 2.0
    scope: str = field(default="global", init=False, repr=False)

    def __post_init__(self) -> None:
        check_positive("ClipByValue(clip_value=)", self.clip_value)
        check_positive("ClipByValue(norm_type=)", self.norm_type)

    def decide(self, total_norm: Tensor) -> ClipDecision:
        """Returns the limit, whatever the norm; see ``ClipPolicy``."""
        return ClipDecision(threshold=float(self.clip_value), clip_value=float(self.clip_value))


def _surely_below(norm: Tensor, limit: float) -> bool:
    # Most steps are below the limit, and this one comparison saves them the arithmetic. Close to
    # the limit, the 1e-6 and the rounding of float32 can still make the factor less than 1; the
    # margin covers both.
    if not is_at_hand(norm) or not norm.numel():
        return False
    largest = norm.max() if norm.ndim else norm
    return largest.item() < limit * (1 - 1e-5) - 2e-6
