"""The Hessian of a loss by the parameters of a model, while a training is left as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gradwatch.explain.hessian.hessian_product import HessianProduct
from gradwatch.explain.hessian.loss_of import Loss, evaluate_loss
from gradwatch.explain.hessian.undisturbed import (
    undisturbed_buffers,
    undisturbed_communication,
    undisturbed_gradients,
    undisturbed_random,
    without_tensor_hooks,
)
from gradwatch.observe.parameters import ParameterTable

_TOO_COARSE = (
    "curvature was given {name} in {dtype}, whose rounding is larger than the differences that "
    "curvature is about. Write copy.deepcopy(model).float() and a loss of that model."
)
_SHARDED = (
    "curvature was given {name} as a DTensor, of which this rank holds a part. Call it with an "
    "unsharded model: load a full state dict into a plain copy."
)
_NONE_TRAINABLE = (
    "curvature was given a model without floating parameters that require a gradient, so there is "
    "nothing to differentiate by. Write parameter.requires_grad_(True) for those that count."
)


class HessianOfModel(NamedTuple):
    """What the products of a Hessian come from.

    Attributes:
        product: Maps a vector ``[n]`` to its product; holds the graph of the loss.
        loss: The loss.
        names: The parameters, in the order of their rows.
    """

    product: HessianProduct
    loss: float
    names: list[str]


@contextmanager
def hessian_of(
    model: nn.Module | Mapping[str, Tensor], loss: Loss, seed: int
) -> Iterator[HessianOfModel]:
    """Computes a loss, and puts back what that changes when the block ends, errors included.

    That is ``.grad`` fields, buffers, the states of random numbers and whether gradients are
    communicated; hooks that would see the gradients hang on no parameter in the block.

    Args:
        model: The module, or a mapping from names to leaf tensors.
        loss: The loss, or how to compute it.
        seed: Where the random numbers of the loss start.

    Raises:
        TypeError: If parameters are in half precision or sharded, or the loss is none.
        ValueError: If nothing is trainable, or the loss is not one finite number.
        RuntimeError: If the loss cannot be differentiated.
    """
    names, tensors = trainable(model)
    with ExitStack() as stack:
        stack.enter_context(without_tensor_hooks(tensors))
        stack.enter_context(undisturbed_gradients(tensors))
        if isinstance(model, nn.Module):
            stack.enter_context(undisturbed_buffers(model))
        stack.enter_context(undisturbed_communication())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        with undisturbed_random(seed, tensors):
            value = evaluate_loss(model, loss)
        yield HessianOfModel(HessianProduct(value, tensors), float(value.detach()), names)


def trainable(model: nn.Module | Mapping[str, Tensor]) -> tuple[list[str], list[Tensor]]:
    """Lists what a Hessian has rows for.

    Args:
        model: The module, or a mapping from names to leaf tensors.

    Returns:
        Names and tensors of the parameters that require a gradient.

    Raises:
        TypeError: If one is in half precision, or sharded.
        ValueError: If there is none.
    """
    table = ParameterTable.of(model)
    pairs = [(n, t) for n, t in zip(table.names, table.tensors, strict=True) if t.requires_grad]
    for name, tensor in pairs:
        if hasattr(tensor, "to_local"):
            raise TypeError(_SHARDED.format(name=name))
        if tensor.dtype not in (torch.float32, torch.float64):
            raise TypeError(_TOO_COARSE.format(name=name, dtype=tensor.dtype))
    if not pairs:
        raise ValueError(_NONE_TRAINABLE)
    return [name for name, _ in pairs], [tensor for _, tensor in pairs]
