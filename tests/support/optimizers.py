"""The optimizers that step: plain, fused and foreach ones, with a closure, and in two parts."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

Make = Callable[[Iterable[Tensor]], Optimizer]


class SAM(Optimizer):
    """Sharpness-aware minimization around SGD, written as its users write it.

    References:
        Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization", 2021.
    """

    def __init__(self, params: Iterable[Tensor], rho: float = 0.05, **base: Any) -> None:
        super().__init__(params, {"rho": rho, **base})
        self.base = torch.optim.SGD(self.param_groups, **base)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        """Climb to the worst point nearby."""
        scale = self.param_groups[0]["rho"] / (self._norm() + 1e-12)
        for parameter in self._with_gradient():
            self.state[parameter]["before"] = parameter.clone()
            parameter.add_(parameter.grad, alpha=scale)

    @torch.no_grad()
    def second_step(self) -> None:
        """Come back, and step with the gradient of the worst point."""
        for parameter in self._with_gradient():
            parameter.copy_(self.state[parameter]["before"])
        self.base.step()

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> Tensor:
        """Do both, the closure called for each."""
        with torch.enable_grad():
            loss = closure()
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()
        return loss

    def _with_gradient(self) -> list[Tensor]:
        parameters = [p for group in self.param_groups for p in group["params"]]
        return [parameter for parameter in parameters if parameter.grad is not None]

    def _norm(self) -> float:
        squares = [p.grad.abs().square().sum() for p in self._with_gradient()]
        return sum(_whole(square).item() for square in squares) ** 0.5


def _whole(tensor: Tensor) -> Tensor:
    """Return a tensor summed over the ranks that hold parts of it: `item()` would give a part."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


PLAIN: dict[str, Make] = {
    "SGD_bare": lambda p: torch.optim.SGD(p, lr=0.05),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "AdamW_fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "AdamW_foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "Adagrad_fused": lambda p: torch.optim.Adagrad(p, lr=0.01, fused=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "SparseAdam": lambda p: torch.optim.SparseAdam(p, lr=0.01),
}
WITH_A_CLOSURE: dict[str, Make] = {
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3, history_size=3),
    "SAM": lambda p: SAM(p, lr=0.05, momentum=0.9),
}
IN_TWO_PARTS: dict[str, Make] = {"SAM_by_hand": lambda p: SAM(p, lr=0.05, momentum=0.9)}
OPTIMIZERS: dict[str, Make] = {**PLAIN, **WITH_A_CLOSURE, **IN_TWO_PARTS}


def _adafactor(parameters: Iterable[Tensor]) -> Optimizer:
    if not hasattr(torch.optim, "Adafactor"):
        pytest.skip("torch.optim.Adafactor needs torch 2.5 or newer")
    return torch.optim.Adafactor(parameters, lr=0.01)


# Trained once per way to name them, not in every combination: what they ask of a watcher, another
# of their kind above asks as well.
RARER: dict[str, Make] = {
    "SGD_nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "SGD_foreach": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "SGD_fused": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "Adam_amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, maximize=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "RAdam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.01),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "Adadelta": lambda p: torch.optim.Adadelta(p, lr=0.5),
    "Adafactor": _adafactor,
    "Rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "ASGD": lambda p: torch.optim.ASGD(p, lr=0.01),
}
RARER_WITH_A_CLOSURE: dict[str, Make] = {
    "LBFGS_strong_wolfe": lambda p: torch.optim.LBFGS(p, max_iter=5, line_search_fn="strong_wolfe"),
    "SGD_closure": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "AdamW_closure": lambda p: torch.optim.AdamW(p, lr=0.01),
}


# Those of torch, without and with a closure, for dense gradients.
DENSE: dict[str, Make] = {n: make for n, make in {**PLAIN, **RARER}.items() if n != "SparseAdam"}
CLOSURES: dict[str, Make] = {"LBFGS": WITH_A_CLOSURE["LBFGS"], **RARER_WITH_A_CLOSURE}


def make_optimizer(name: str, parameters: Iterable[Tensor]) -> Optimizer:
    """Return an optimizer by its name."""
    return {**OPTIMIZERS, **RARER, **RARER_WITH_A_CLOSURE}[name](parameters)


def takes_a_closure(name: str) -> bool:
    """Return whether an optimizer's step() is given a closure."""
    return name in WITH_A_CLOSURE or name in RARER_WITH_A_CLOSURE
