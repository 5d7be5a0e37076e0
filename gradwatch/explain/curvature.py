"""curvature: how sharply a loss bends, from products of its Hessian with vectors."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from gradwatch.control.checks import check_between, check_count
from gradwatch.explain.hessian.hessian_product import HessianProduct
from gradwatch.explain.hessian.hutchinson import estimate_trace
from gradwatch.explain.hessian.lanczos import extreme_eigenvalues
from gradwatch.explain.hessian.loss_of import Loss, check_loss, evaluate_loss
from gradwatch.explain.hessian.result import Curvature
from gradwatch.explain.hessian.undisturbed import (
    undisturbed_buffers,
    undisturbed_random,
    without_tensor_hooks,
)
from gradwatch.observe.parameters import ParameterTable

__all__ = ["Curvature", "curvature"]

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


def curvature(
    model: nn.Module | Mapping[str, Tensor],
    loss: Loss,
    *,
    iterations: int = 100,
    tolerance: float = 1e-3,
    probes: int = 32,
    seed: int = 0,
) -> Curvature:
    """Computes both ends of the spectrum of the Hessian of a loss, and its trace.

    The Hessian is that of all parameters that require a gradient, together. It is never formed:
    each product with a vector costs about two backwards, and memory for a few vectors of the size
    of the model and for the graph of one backward. Nothing changes: neither ``.grad`` fields nor
    buffers, hooks, training flags or the state of random numbers. In training mode dropout and
    batch statistics belong to the loss; write ``model.eval()`` for the loss without them.

    Args:
        model: The module, or a mapping from names to leaf tensors. Tied weights count once.
        loss: A function without arguments or of the model, which returns the loss; or the loss, a
            tensor with one element whose graph is still there. A function is called once, under
            the kernels of attention and RNNs that can be differentiated twice, with random
            numbers from ``seed``. With DDP it is given the module inside, which it must call.
        iterations: The most products to spend on the eigenvalues, at least 1; 10 to 50 are usual.
        tolerance: The error of the eigenvalues at which to stop, as a share of the larger
            magnitude, between 0 and 1. Float32 can do 1e-5.
        probes: Products to spend on the trace; 0 leaves it out. A model with no more parameters
            than that gets an exact trace.
        seed: Where the random vectors start; the same seed gives the same numbers.

    Returns:
        The numbers.

    Raises:
        TypeError: If parameters are in half precision or sharded, or the loss is none of these.
        ValueError: If an argument is out of bounds, nothing is trainable, or the loss or its
            Hessian is not finite.
        RuntimeError: If the loss cannot be differentiated, or not twice.

    References:
        Pearlmutter 1994 for the products, Lanczos 1950 for the eigenvalues, Hutchinson 1990 for
        the trace; see the functions used.
        Yao, Gholami, Keutzer, Mahoney: PyHessian: Neural Networks Through the Lens of the Hessian.
        IEEE Big Data 2020, arXiv 1912.07145: the same numbers, the eigenvalue by power iteration.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> found = curvature({"x": x}, lambda: x[0] ** 2 + x[1] ** 2 + x[0] * x[1])
        >>> round(found.smallest_eigenvalue, 4), round(found.largest_eigenvalue, 4), found.trace
        (1.0, 3.0, 4.0)
    """
    check_count("curvature(iterations=)", iterations, 1)
    check_between("curvature(tolerance=)", tolerance, 0.0, 1.0, "Write 1e-3.")
    check_count("curvature(probes=)", probes, 0)
    check_loss(loss)
    names, tensors = _trainable(model)
    with ExitStack() as stack:
        stack.enter_context(without_tensor_hooks(tensors))
        if isinstance(model, nn.Module):
            stack.enter_context(undisturbed_buffers(model))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        with undisturbed_random(seed, tensors):
            value = evaluate_loss(model, loss)
        product = HessianProduct(value, tensors)
        return _measure(
            product, float(value.detach()), names, (iterations, tolerance, probes, seed)
        )


def _measure(
    product: HessianProduct,
    loss: float,
    names: list[str],
    options: tuple[int, float, int, int],
) -> Curvature:
    iterations, tolerance, probes, seed = options
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(product.like.shape, generator=generator).to(product.like)
    ends = extreme_eigenvalues(product, start, iterations, tolerance)
    trace = estimate_trace(product, product.like, probes, generator)
    return Curvature(
        loss=loss,
        largest_eigenvalue=ends.largest,
        smallest_eigenvalue=ends.smallest,
        trace=trace.value,
        trace_stderr=trace.stderr,
        iterations=ends.iterations,
        probes=trace.probes,
        converged=ends.converged,
        parameters=product.like.numel(),
        unused=tuple(name for name, used in zip(names, product.used, strict=True) if not used),
    )


def _trainable(model: nn.Module | Mapping[str, Tensor]) -> tuple[list[str], list[Tensor]]:
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
