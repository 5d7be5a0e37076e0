"""AdaptiveGradientClip: limits each output unit's gradient by the norm of its own weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from gradwatch.checks import check_names, check_positive
from gradwatch.clip.policy import ClipDecision, Stateless
from gradwatch.pickles import stable_name

_HALF = {torch.float16, torch.bfloat16}


@stable_name
@dataclass(frozen=True)
class AdaptiveGradientClip(Stateless):
    r"""Limits the gradient norm of each output unit to a share of the norm of its weights (AGC).

    For the gradient :math:`g_i` and the weights :math:`w_i` of unit :math:`i` the factor is

    .. math::
        c_i = \min\left(1, \lambda \frac{\max(\|w_i\|, \epsilon)}{\|g_i\|}\right)

    A unit is one index of dimension 0: a row of a linear layer's weight, a filter of a convolution.
    A parameter with at most one dimension, such as a bias or a gain, is one unit as a whole, as in
    timm. A unit whose gradient is zero is not changed, so no further epsilon is needed.

    The paper does not clip the last linear layer, and neither should you: name it in ``exclude``.
    The limit depends on the weights and not on the loss. So unlike the rules with a history, this
    one clips more when the loss is multiplied by a number above 1.

    Attributes:
        clip_factor: λ, positive.
        eps: ε, positive, in the unit of the weights: a lower bound for the norm of the weights, so
            that weights that start at zero can move.
        exclude: Shell-style patterns of the names of parameters that are not clipped, for example
            ``("head.*",)``; case-sensitive.
        norm_type: The p of all norms, positive.

    Raises:
        TypeError: If a number is not a number, or ``exclude`` is not a tuple or list of strings.
        ValueError: If a number is not positive.

    References:
        Brock, De, Smith, Simonyan: High-Performance Large-Scale Image Recognition Without
        Normalization. ICML 2021, arXiv 2102.06171.

    Example:
        >>> import torch
        >>> policy = AdaptiveGradientClip(clip_factor=0.1, exclude=("head.*",))
        >>> gradient, weight = torch.tensor([[3.0, 4.0], [0.3, 0.4]]), torch.eye(2) * 5
        >>> policy.coefficient("body.weight", gradient, weight)
        tensor([[0.1000],
                [1.0000]])
        >>> policy.coefficient("head.weight", gradient, weight) is None
        True
    """

    clip_factor: float = 0.01
    eps: float = 1e-3
    exclude: tuple[str, ...] = ()
    norm_type: float = 2.0
    scope: str = field(default="global", init=False, repr=False)

    def __post_init__(self) -> None:
        check_positive("AdaptiveGradientClip(clip_factor=)", self.clip_factor)
        check_positive("AdaptiveGradientClip(eps=)", self.eps)
        check_positive("AdaptiveGradientClip(norm_type=)", self.norm_type)
        advice = "Write ('head.*',) to leave out the parameters of a module named head."
        check_names("AdaptiveGradientClip(exclude=)", self.exclude, advice)
        object.__setattr__(self, "exclude", tuple(self.exclude))  # a list has no hash

    def decide(self, total_norm: Tensor) -> ClipDecision:
        """Returns a decision that clips unit by unit, whatever the norm; see ``ClipPolicy``."""
        return ClipDecision(threshold=math.nan, units=self)

    def coefficient(self, name: str, gradient: Tensor, weight: Tensor) -> Tensor | None:
        """Computes the factors of the units of one parameter, without waiting for the device.

        Args:
            name: The name of the parameter, to compare with ``exclude``.
            gradient: Its dense gradient, without loss scale.
            weight: Its value, of the same shape as the gradient.

        Returns:
            Tensor ``[units, 1, ...]`` with as many dimensions as the gradient, or ``[]`` if the
            parameter is one unit; float32 for float16 and bfloat16. None if the parameter is
            excluded or empty.

        Raises:
            TypeError: If the gradient is sparse.
        """
        if any(fnmatchcase(name, pattern) for pattern in self.exclude) or not gradient.numel():
            return None
        if gradient.layout is not torch.strided:
            raise TypeError(
                f"AdaptiveGradientClip cannot limit the sparse gradient of {name}: its units are "
                f"not all there. Write exclude=({name!r},), or sparse=False for the embedding."
            )
        limit = self.clip_factor * torch.clamp(self._unit_norm(weight.detach()), min=self.eps)
        # For a gradient of zero the ratio is Inf, which the clamp turns into 1.
        return torch.clamp(limit / self._unit_norm(gradient.detach()), max=1.0)

    def _unit_norm(self, tensor: Tensor) -> Tensor:
        # The largest float16 number is 65504, so the norm of a finite gradient could overflow.
        dtype = torch.float32 if tensor.dtype in _HALF else None
        inner = tuple(range(1, tensor.ndim)) or None
        norms: Tensor = torch.linalg.vector_norm(
            tensor, self.norm_type, inner, keepdim=inner is not None, dtype=dtype
        )
        return norms
