"""What the lifecycle suites share: the hooks of a model, a short training."""

from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as nn_module
from torch.optim import optimizer as torch_optimizer

from tests.support import zoo

GLOBAL_OPTIMIZER_HOOKS = (
    torch_optimizer._global_optimizer_pre_hooks,
    torch_optimizer._global_optimizer_post_hooks,
)


GLOBAL_MODULE_HOOKS = (
    nn_module._global_forward_pre_hooks,
    nn_module._global_forward_hooks,
    nn_module._global_backward_hooks,
    nn_module._global_backward_pre_hooks,
)


OF_MODULES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks",
              "_state_dict_hooks", "_load_state_dict_pre_hooks")  # fmt: skip


OF_OPTIMIZERS = ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks",
                 "_optimizer_state_dict_pre_hooks", "_optimizer_state_dict_post_hooks",
                 "_optimizer_load_state_dict_pre_hooks", "_optimizer_load_state_dict_post_hooks")  # fmt: skip


def hooks(model: nn.Module, *optimizers: torch.optim.Optimizer) -> list[Any]:
    """Return all hooks, and all attributes that somebody hung on the objects, of a model and its optimizers."""
    found: list[Any] = [dict(hooks) for hooks in (*GLOBAL_OPTIMIZER_HOOKS, *GLOBAL_MODULE_HOOKS)]
    for parameter in model.parameters():
        found += [parameter._post_accumulate_grad_hooks or {}, parameter._backward_hooks or {}]
        found.append(sorted(vars(parameter)))
    for part in model.modules():
        found += [dict(getattr(part, name)) for name in OF_MODULES]
        found.append(sorted(vars(part)))
    for optimizer in optimizers:
        found += [dict(getattr(optimizer, name)) for name in OF_OPTIMIZERS]
        found.append({key: value for key, value in vars(optimizer).items() if callable(value)})
    return found


def model_and_optimizer(kind: str = "SGD") -> tuple[zoo.Case, torch.optim.Optimizer]:
    """Return a perceptron and its optimizer."""
    case = zoo.mlp()
    return case, getattr(torch.optim, kind)(case.model.parameters(), lr=0.1)


def train(case: zoo.Case, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    """Run some plain steps."""
    for index in range(steps):
        case.loss(case.model, case.batch(index)).backward()
        optimizer.step()
        optimizer.zero_grad()


class Stop(Exception):
    """Ends a loop."""
