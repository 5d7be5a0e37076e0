"""The noise scale by brute force, in float64: every micro-batch's gradient by itself."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

BETA = 0.99


@dataclass
class Oracle:
    """Takes windows of (weight, gradient) pairs, and averages what they tell."""

    terms: list[tuple[float, float]] = field(default_factory=list)

    def add(self, window: Sequence[tuple[float, np.ndarray]]) -> None:
        """Adds a window by the identities: the spread around the weighted mean, and what is left."""
        weights = np.array([weight for weight, _ in window])
        gradients = np.array([gradient for _, gradient in window])
        mean = weights @ gradients / weights.sum()
        spread = (weights * ((gradients - mean) ** 2).sum(1)).sum()
        tr_sigma = spread / (len(window) - 1)
        self.terms.append((tr_sigma, (mean**2).sum() - tr_sigma / weights.sum()))

    @property
    def means(self) -> tuple[float, float]:
        """tr(Sigma) and |G|^2, each a weighted mean over the windows."""
        ages = BETA ** np.arange(len(self.terms))[::-1]
        tr_sigma, grad_sq = ages @ np.array(self.terms) / ages.sum()
        return float(tr_sigma), float(grad_sq)

    @property
    def b_simple(self) -> float:
        """Their ratio."""
        tr_sigma, grad_sq = self.means
        return tr_sigma / grad_sq if grad_sq > 0 else math.nan


def gradient_of(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> np.ndarray:
    """The gradient of one loss, as a flat float64 array; leaves no trace in the model."""
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss(model), parameters)
    return torch.cat([g.reshape(-1).double() for g in gradients]).numpy()


def regression(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Return a small network that is taught to add up six numbers."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 1)).to(dtype)


def examples(
    window: int, index: int, size: int, rank: int = 0, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Return so many examples for it: those of a micro-batch of a window, on a rank."""
    generator = torch.Generator().manual_seed(1000 * rank + 100 * window + index)
    return torch.randn(size, 6, generator=generator, dtype=torch.float64).to(dtype)


def regression_loss(model: nn.Module, x: Tensor) -> Tensor:
    """Return its mean square error."""
    return (model(x) - x.sum(1, keepdim=True)).square().mean()


class KnownCovariance(nn.Module):
    """A model whose gradient is the mean of its inputs: draws around a known gradient."""

    def __init__(self, size: int, parts: int = 4) -> None:
        super().__init__()
        shapes = [nn.Parameter(torch.zeros(size // parts)) for _ in range(parts)]
        self.parts = nn.ParameterList(shapes)

    def forward(self, draws: Tensor) -> Tensor:
        return (torch.cat(list(self.parts)) * draws).sum(1).mean()


def draws(noise_scale: float, size: int, seed: int) -> Callable[[int], Tensor]:
    """A function that draws examples: |G|^2 = 1, a power-law covariance of trace `noise_scale`."""
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.randn(size, generator=torch.Generator().manual_seed(0))
    gradient /= gradient.norm()
    spectrum = 1 / torch.arange(1, size + 1)
    spectrum *= noise_scale / spectrum.sum()
    return lambda count: gradient + torch.randn(count, size, generator=generator) * spectrum.sqrt()
