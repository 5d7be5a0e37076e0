"""AdaGC: limits every parameter's gradient norm by the moving average of its own norms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gradwatch.checks import check_at_least, check_between, check_count, check_positive
from gradwatch.clip.norm_history import moving_average
from gradwatch.clip.policy import ClipDecision
from gradwatch.measure.deferred import is_at_hand
from gradwatch.measure.devices import in_exact, sent, sent_as
from gradwatch.pickles import stable_name


@stable_name
@dataclass
class _AdaGCState:
    """The memory of AdaGC, kept apart because the policy itself is a frozen dataclass."""

    steps: int | Tensor = 0  # a number on the host, or an int64 tensor []
    averages: Tensor | None = None  # [n]: each parameter's gamma; 0 before its first gradient


@stable_name
@dataclass(frozen=True, eq=False)
class AdaGC:
    r"""Limits the norm of each parameter's gradient by the average of its own earlier norms.

    For the norm :math:`n_i` of parameter :math:`i` and its average :math:`\gamma_i`:

    .. math::
        h_i = \min(1, \lambda_{rel}\,\gamma_i / n_i), \qquad
        \gamma_i \leftarrow \beta\gamma_i + (1 - \beta)\,h_i n_i

    During the first ``warmup`` steps all gradients are instead scaled together by
    :math:`h = \min(1, \lambda_{abs} / \|n\|)`, and :math:`\gamma_i` becomes the smallest
    :math:`h n_i` so far. With λ_rel close to 1, most steps are clipped a little.

    λ_abs is in the unit of the gradients; with ``math.inf``, nothing is clipped in the warm-up and
    the rule is independent of the scale of the loss. A norm of zero carries no information and
    enters no average. If a parameter gets its first gradient only after the warm-up, that gradient
    is not clipped, and its norm starts the average. Steps with a norm that is not finite, or with
    zeros only, are ignored.

    Attributes:
        lambda_rel: λ_rel, the largest ratio of a parameter's norm to its average; at least 1.
        beta: The weight of the old average at each step, between 0 and 1.
        lambda_abs: λ_abs, the limit of the total norm in the warm-up; positive, or ``math.inf``.
        warmup: The length of the warm-up in steps, at least 0.
        norm_type: The p of the norms, positive.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of bounds.

    References:
        Wang et al.: AdaGC: Enhancing LLM Pretraining Stability via Adaptive Gradient Clipping.
        2025, arXiv 2502.11034.

    Example:
        >>> import torch
        >>> policy = AdaGC(warmup=1)
        >>> _ = policy.decide(torch.tensor([0.6, 0.3]))
        >>> policy.decide(torch.tensor([0.6, 3.0])).coefficient
        tensor([1.0000, 0.1050])
    """

    lambda_rel: float = 1.05
    beta: float = 0.98
    lambda_abs: float = 1.0
    warmup: int = 100
    norm_type: float = 2.0
    scope: str = field(default="parameter", init=False, repr=False)
    _state: _AdaGCState = field(init=False, repr=False, default_factory=_AdaGCState)

    def __post_init__(self) -> None:
        check_positive("AdaGC(lambda_rel=)", self.lambda_rel)
        reason = ": less would clip every step by more than the one before. Write 1.05."
        check_at_least("AdaGC(lambda_rel=)", self.lambda_rel, 1, reason)
        check_between("AdaGC(beta=)", self.beta, 0.0, 1.0, "Write 0.98 for about 50 steps.")
        check_positive("AdaGC(lambda_abs=)", self.lambda_abs)
        check_count("AdaGC(warmup=)", self.warmup, 0)
        check_positive("AdaGC(norm_type=)", self.norm_type)

    def decide(self, total_norm: Tensor) -> ClipDecision:
        """Computes the factors for one step.

        Args:
            total_norm: Tensor ``[n]``: the norm of each parameter's gradient; 0 for one without.
        """
        norms = in_exact(total_norm.detach())
        averages = self._averages(norms)
        if is_at_hand(norms):
            return self._on_host(norms, averages, total_norm.dtype)
        return self._on_device(norms, averages, total_norm.dtype)

    def _on_host(self, norms: Tensor, averages: Tensor, dtype: torch.dtype) -> ClipDecision:
        state, steps = self._state, int(self._state.steps)
        # One sum decides nearly always; only if finite norms overflow it is each norm checked.
        if not (0.0 < norms.sum().item() < math.inf or bool(_says_something(norms))):
            return ClipDecision()
        warm = steps < self.warmup
        rule = self._together if warm else self._apart
        factors, state.averages = rule(norms, averages)
        state.steps = steps + 1
        limit = self.lambda_abs if warm else math.nan
        if not len(factors) or factors.min().item() == 1.0:
            return ClipDecision(threshold=limit)
        return ClipDecision(factors.to(dtype), limit)

    def _on_device(self, norms: Tensor, averages: Tensor, dtype: torch.dtype) -> ClipDecision:
        state = self._state
        # Both rules are computed, as only the device knows whether the warm-up is over.
        steps = state.steps
        if not isinstance(steps, Tensor):  # full() fills it on the device; a copy would wait
            steps = torch.full((), steps, dtype=torch.int64, device=norms.device)
        steps = sent(steps, norms.device)
        keep, warm = _says_something(norms), steps < self.warmup
        together, apart = self._together(norms, averages), self._apart(norms, averages)
        factors, new = (torch.where(warm, *pair) for pair in zip(together, apart, strict=True))
        state.averages = torch.where(keep, new, averages)
        state.steps = steps + keep
        limit = torch.where(warm & keep, norms.new_full((), self.lambda_abs), math.nan)
        return ClipDecision(torch.where(keep, factors, 1.0).to(dtype), limit.to(dtype))

    def _together(self, norms: Tensor, averages: Tensor) -> tuple[Tensor, Tensor]:
        # Norms are divided by the largest one, so that no power leaves the range of the dtype.
        largest = norms.max() if len(norms) else norms.sum()
        scaled = norms / torch.where(largest > 0, largest, 1.0)
        total = largest * torch.linalg.vector_norm(scaled, self.norm_type)
        factor = torch.clamp(self.lambda_abs / total, max=1.0)
        least = torch.where(averages > 0, averages, math.inf)
        kept = torch.minimum(factor * norms, least)
        return factor.expand_as(norms), torch.where(norms > 0, kept, averages)

    def _apart(self, norms: Tensor, averages: Tensor) -> tuple[Tensor, Tensor]:
        # A zero means that there is no gradient. In the average it would hold the parameter at 0.
        known, present = averages > 0, norms > 0
        kept = torch.where(known, torch.minimum(norms, self.lambda_rel * averages), norms)
        moved = torch.where(known, moving_average(averages, kept, self.beta), kept)
        factors = torch.where(present, kept / norms, 1.0)
        return factors, torch.where(present, moved, averages)

    def _averages(self, norms: Tensor) -> Tensor:
        averages = self._state.averages
        if averages is None:
            return torch.zeros_like(norms)
        if averages.shape != norms.shape:
            raise ValueError(
                f"AdaGC has averages of {len(averages)} parameters and is asked about "
                f"{len(norms)}. Use a policy of its own for each optimizer, and load the state of "
                "the same model."
            )
        return sent_as(averages, norms.device, norms.dtype)

    def state_dict(self) -> dict[str, Any]:
        """Returns the number of steps and the averages; on an accelerator this waits for them."""
        averages = self._state.averages
        return {
            "steps": int(self._state.steps),
            "averages": None if averages is None else averages.cpu().tolist(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the state that :meth:`state_dict` returned."""
        averages, own = state["averages"], self._state
        own.steps = int(state["steps"])
        own.averages = None
        if averages is not None:
            own.averages = torch.tensor(averages, dtype=torch.float64, device="cpu")


def _says_something(norms: Tensor) -> Tensor:
    """Returns a bool tensor ``[]``: whether all norms are finite and at least one is not zero."""
    return torch.isfinite(norms).all() & (norms > 0).any()
