"""The whole state of a training, in plain pieces that can be compared bit by bit."""

import random
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def state_of(model: nn.Module, *optimizers: Optimizer) -> dict[str, Any]:
    """Return copies of everything that the next step depends on, and of the last gradients."""
    return {
        "parameters": {n: pieces(p) for n, p in model.named_parameters()},
        "gradients": {n: pieces(p.grad) for n, p in model.named_parameters()},
        "versions": {n: _versions(p) for n, p in model.named_parameters()},
        "buffers": {n: pieces(b) for n, b in model.named_buffers()},
        "requires_grad": {n: p.requires_grad for n, p in model.named_parameters()},
        "training": {n: m.training for n, m in model.named_modules()},
        "optimizers": [pieces(optimizer.state_dict()) for optimizer in optimizers],
        "random": {
            "torch": torch.get_rng_state(),
            "device": _generators({p.device for p in model.parameters()}),
            "python": random.getstate(),
            "numpy": pieces(np.random.get_state()),
        },
        "grad_enabled": torch.is_grad_enabled(),
    }


def snapshot(model: nn.Module) -> list[Tensor]:
    """Return copies of all parameters and buffers."""
    return [t.detach().clone() for t in (*model.parameters(), *model.buffers())]


def identical(left: Any, right: Any) -> bool:
    """Return whether two nested states are equal, bit for bit and in their layout."""
    return not any(differences(pieces(left), pieces(right)))


def pieces(value: Any) -> Any:
    """Return a copy of a nested state in which every tensor is plain and dense."""
    if hasattr(value, "placements"):
        return {"placements": str(value.placements), "local": pieces(value.to_local())}
    if isinstance(value, Tensor) and value.is_sparse:
        parts = {"indices": value._indices().clone(), "values": value.detach()._values().clone()}
        return {"coalesced": value.is_coalesced(), **parts}
    if isinstance(value, Tensor):
        return {"strides": value.stride(), "dense": value.detach().clone()}
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return {str(key): pieces(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [pieces(item) for item in value]
    return value


def differences(left: Any, right: Any, path: str = "") -> Iterator[str]:
    """Yield where two states differ, be it in one bit; NaN equals itself."""
    if type(left) is not type(right):
        yield f"{path}: {type(left).__name__} is not {type(right).__name__}"
    elif isinstance(left, Mapping):
        yield from _differences_of_mappings(left, right, path)
    elif isinstance(left, (list, tuple)):
        if len(left) != len(right):
            yield f"{path}: {len(left)} items are not {len(right)}"
        for number, pair in enumerate(zip(left, right, strict=False)):
            yield from differences(*pair, f"{path}/{number}")
    elif not _same(left, right):
        yield f"{path}: {left!r} is not {right!r}"


def _differences_of_mappings(
    left: Mapping[str, Any], right: Mapping[str, Any], path: str
) -> Iterator[str]:
    if list(left) != list(right):
        yield f"{path}: {list(left)} is not {list(right)}"
    for key in left:
        if key in right:
            yield from differences(left[key], right[key], f"{path}/{key}")


def _generators(devices: Collection[torch.device]) -> list[Tensor]:
    """Return the states of the generators of accelerators."""
    away = [device for device in devices if device.type not in ("cpu", "meta")]
    return [getattr(torch, device.type).get_rng_state(device).clone() for device in away]


def _versions(parameter: Tensor) -> list[int]:
    """Return how often a parameter and its gradient were written to, which autograd checks."""
    return [tensor._version for tensor in (parameter, parameter.grad) if tensor is not None]


def _same(left: Any, right: Any) -> bool:
    if not isinstance(left, Tensor):
        return bool(left == right) or (left != left and right != right)
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return _bytes(left).equal(_bytes(right))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().resolve_conj().contiguous().reshape(-1).view(torch.uint8)
