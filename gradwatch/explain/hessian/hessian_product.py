"""HessianProduct: the product of a loss's Hessian with a vector, by differentiating twice."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_NO_GRAPH = (
    "curvature cannot differentiate this loss: {reason} Its graph was freed by a backward(), most "
    "likely. Write curvature(model, lambda: ...) so that the loss is computed afresh, call it "
    "before loss.backward(), or write loss.backward(retain_graph=True)."
)
_ONCE_ONLY = (
    "curvature cannot differentiate this loss a second time: {reason} A fused kernel, a compiled "
    "model or a custom autograd.Function on the way has no second derivative. Of a compiled model "
    "call the original, as in curvature(model, lambda model: ...). For attention compute the loss "
    "under torch.nn.attention.sdpa_kernel(SDPBackend.MATH), for an RNN on a GPU under "
    "torch.backends.cudnn.flags(enabled=False) (curvature does both by itself where the loss is "
    "given as a function that it calls); write a Function's backward in differentiable operations."
)


class HessianProduct:
    r"""The map :math:`v \mapsto Hv` for the Hessian :math:`H` of a loss.

    :math:`Hv` is the gradient of :math:`g^\top v` for the gradient :math:`g`: exact, for the price
    of about two backwards and without any entry of :math:`H`. ``torch.autograd.grad`` adds nothing
    to a ``.grad``, and no hook that waits for one is called.

    Attributes:
        like: Vector ``[n]`` of zeros: the length, dtype and device of what goes in and comes out.
            Of several dtypes it is the widest.
        used: For each parameter, whether the loss depends on it.

    References:
        Pearlmutter: Fast Exact Multiplication by the Hessian. Neural Computation 6(1), 1994.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> HessianProduct(x[0] ** 2 * x[1], [x])(torch.tensor([1.0, 0.0]))
        tensor([4., 2.])
    """

    def __init__(self, loss: Tensor, parameters: Sequence[Tensor]) -> None:
        """Computes the gradient, with a graph of its own.

        Args:
            loss: Tensor with one element.
            parameters: Floating tensors that require a gradient; at least one.

        Raises:
            RuntimeError: If the graph of the loss is gone, or ends where a second derivative is
                refused.
        """
        self._parameters = parameters
        gradients = self._differentiate(loss)
        self.used = tuple(gradient is not None for gradient in gradients)
        # Where the loss is linear the gradient is constant, and has no graph.
        kept = [(i, g) for i, g in enumerate(gradients) if g is not None and g.requires_grad]
        _refuse_once_differentiable([gradient for _, gradient in kept])
        self._gradients = kept
        self.like = torch.cat([torch.zeros_like(p.detach()).reshape(-1) for p in self._local()])

    def __call__(self, vector: Tensor) -> Tensor:
        """Computes a product.

        Args:
            vector: Tensor ``[n]``.

        Returns:
            Tensor ``[n]``; zeros for parameters that the loss does not depend on.

        Raises:
            RuntimeError: If an operation on the way cannot be differentiated twice.
        """
        if not self._gradients:
            return torch.zeros_like(vector)
        parts = torch.split(vector, [parameter.numel() for parameter in self._parameters])
        seeds = [parts[i].reshape(g.shape).to(g) for i, g in self._gradients]
        try:
            rows = torch.autograd.grad(
                [gradient for _, gradient in self._gradients],
                list(self._parameters),
                seeds,
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
        except RuntimeError as error:
            raise RuntimeError(_ONCE_ONLY.format(reason=_sentence(error))) from error
        return torch.cat([row.reshape(-1).to(vector) for row in rows])

    def _differentiate(self, loss: Tensor) -> Sequence[Tensor | None]:
        if not loss.requires_grad:
            return [None] * len(self._parameters)
        try:
            return torch.autograd.grad(
                loss.sum(), list(self._parameters), create_graph=True, allow_unused=True
            )
        except RuntimeError as error:
            raise RuntimeError(_NO_GRAPH.format(reason=_sentence(error))) from error

    def _local(self) -> list[Tensor]:
        device = self._parameters[0].device
        return [parameter.to(device) for parameter in self._parameters]


def _refuse_once_differentiable(gradients: Sequence[Tensor]) -> None:
    """Looks for nodes of ``once_differentiable``: not being on the way to a leaf, none would fail.

    Raises:
        RuntimeError: If there is one.
    """
    seen: set[Any] = {None}
    waiting: list[Any] = [gradient.grad_fn for gradient in gradients]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::Error":
            reason = "a backward on the way is marked @once_differentiable."
            raise RuntimeError(_ONCE_ONLY.format(reason=reason))
        waiting.extend(following for following, _ in node.next_functions)


def _sentence(error: Exception) -> str:
    first = str(error).strip().split("\n")[0].rstrip(". ")
    return f"{first}."
