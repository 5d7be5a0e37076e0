"""Descriptions: what a run folder says of the optimizers and options of its run."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from gradwatch.options import Options

_PLAIN = (str, int, float, bool, type(None))


def described_optimizer(optimizer: Optimizer) -> dict[str, Any]:
    """Describes an optimizer.

    Args:
        optimizer: The optimizer.

    Returns:
        Its class, and for each parameter group its settings and the number of its parameters.
    """
    kind = type(optimizer)
    return {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "groups": [
            {
                "parameters": len(group["params"]),
                **{name: _plain(value) for name, value in group.items() if name != "params"},
            }
            for group in optimizer.param_groups
        ],
    }


def described_options(options: Options) -> dict[str, Any]:
    """Describes the arguments of ``watch()``, those that are objects as their ``repr``."""
    left_out = ("sinks", "run_dir")
    names = [field.name for field in fields(options) if field.name not in left_out]
    return {name: _plain(getattr(options, name)) for name in names}


def _plain(value: object) -> Any:
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, Tensor):
        return value.tolist() if value.numel() <= 8 else f"tensor {tuple(value.shape)}"
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return repr(value)
