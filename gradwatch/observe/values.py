"""The elements of a gradient, dense or sparse."""

from __future__ import annotations

import torch
from torch import Tensor


def gradient_values(gradient: Tensor) -> Tensor:
    """Returns the elements that a gradient stores.

    Args:
        gradient: A tensor of any shape and dtype, dense or sparse.

    Returns:
        The gradient itself where it is dense; else its values, duplicate indices added up.
    """
    return gradient if gradient.layout is torch.strided else gradient.coalesce().values()
