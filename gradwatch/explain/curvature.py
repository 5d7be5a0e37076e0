"""curvature: how sharply a loss bends, from products of its Hessian with vectors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from gradwatch.control.checks import check_between, check_count
from gradwatch.explain.hessian.hutchinson import estimate_trace
from gradwatch.explain.hessian.lanczos import extreme_eigenvalues
from gradwatch.explain.hessian.loss_of import Loss, check_loss
from gradwatch.explain.hessian.of_model import HessianOfModel, hessian_of
from gradwatch.explain.hessian.result import Curvature

__all__ = ["Curvature", "curvature"]


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
    with hessian_of(model, loss, seed) as found:
        return _measure(found, (iterations, tolerance, probes, seed))


def _measure(found: HessianOfModel, options: tuple[int, float, int, int]) -> Curvature:
    product, loss, names = found
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
