"""curvature(): how sharply a loss curves, from products of its Hessian with vectors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradwatch.checks import check_between, check_count
from gradwatch.hessian.of_model import Loss, check_loss, hessian_of
from gradwatch.hessian.spectrum import estimate_trace, extreme_eigenvalues, random_like
from gradwatch.pickles import stable_name

__all__ = ["Curvature", "curvature"]


@stable_name
@dataclass(frozen=True, slots=True)
class Curvature:
    """The curvature of a loss at the current weights of a model.

    Attributes:
        loss: Value of the loss.
        largest_eigenvalue: Largest eigenvalue of the Hessian, in units of the loss per squared unit
            of a weight: the curvature in the direction that curves upward most.
        smallest_eigenvalue: Smallest eigenvalue; clearly negative at a saddle or a ridge.
        trace: Sum of all eigenvalues; NaN if ``probes=0``.
        trace_stderr: Standard error of the trace; 0 if it is exact.
        iterations: Hessian-vector products computed for the eigenvalues.
        probes: Hessian-vector products computed for the trace.
        converged: Whether both eigenvalues are within the tolerance.
        parameters: Number of parameter elements, which is the number of rows of the Hessian.
        unused: Names of parameters that the loss does not depend on; their rows are zero.
    """

    loss: float
    largest_eigenvalue: float
    smallest_eigenvalue: float
    trace: float
    trace_stderr: float
    iterations: int
    probes: int
    converged: bool
    parameters: int
    unused: tuple[str, ...] = ()

    @property
    def dominant_eigenvalue(self) -> float:
        """The eigenvalue of largest magnitude, with its sign."""
        return max(self.largest_eigenvalue, self.smallest_eigenvalue, key=abs)

    @property
    def learning_rate_limit(self) -> float:
        """Learning rate above which plain gradient descent oscillates: 2 / largest eigenvalue.

        Inf if no direction curves upward. Momentum β raises it to (2 + 2β) / largest eigenvalue;
        adaptive optimizers have another limit. Cohen et al., ICLR 2021, arXiv 2103.00065.
        """
        top = self.largest_eigenvalue
        return 2 / top if top > 0 else math.inf

    def __str__(self) -> str:
        """Formats the result in two or three lines."""
        eigenvalues = f"{self.smallest_eigenvalue:.4g} to {self.largest_eigenvalue:.4g}"
        effort = f"{self.iterations} products" + ("" if self.converged else ", not converged")
        head = f"Curvature over {self.parameters:,} parameters at loss {self.loss:.4g}: "
        limit = f"{self.learning_rate_limit:.3g} (2 / largest eigenvalue)"
        lines = [
            f"{head}eigenvalues from {eigenvalues} ({effort}){self._trace_text()}.",
            f"Plain gradient descent oscillates above a learning rate of {limit}.",
        ]
        if self.unused:
            lines.append(f"The loss does not depend on {', '.join(self.unused)}.")
        return "\n".join(lines)

    def _trace_text(self) -> str:
        if not self.probes:
            return ""
        if not self.trace_stderr:
            return f", trace {self.trace:.4g} (exact, {self.probes} products)"
        return f", trace {self.trace:.4g} ± {self.trace_stderr:.2g} ({self.probes} products)"


@stable_name
def curvature(
    model: nn.Module | Mapping[str, Tensor],
    loss: Loss,
    *,
    iterations: int = 100,
    tolerance: float = 1e-3,
    probes: int = 32,
    seed: int = 0,
) -> Curvature:
    """Computes the largest and the smallest eigenvalue of the Hessian of a loss, and its trace.

    The Hessian is taken with respect to all parameters that require a gradient, together. It is
    never formed: each Hessian-vector product costs about two backward passes, and memory for a few
    vectors of the size of the model and for the graph of one backward pass. Nothing is changed:
    ``.grad`` fields, buffers, hooks, training flags and random states stay as they are. In training
    mode, dropout and batch statistics are part of the loss; call ``model.eval()`` before to leave
    them out.

    Args:
        model: The module, or a mapping from names to leaf tensors. Tied weights count once.
        loss: A function that returns the loss, without arguments or of the model; or the loss
            itself, a tensor with one element whose graph has not been freed. A function is called
            once, with attention and RNN kernels that can be differentiated twice and with random
            numbers from ``seed``. With DDP it receives the inner module, and must call that.
        iterations: Maximum number of products for the eigenvalues, at least 1; 10 to 50 are usual.
        tolerance: Stop when the error of the eigenvalues is below this share of the larger
            magnitude, between 0 and 1. Float32 can reach 1e-5.
        probes: Number of products for the trace; 0 for no trace. If the parameters have no more
            elements than that, the trace is exact.
        seed: Seed of the random vectors; the same seed gives the same numbers.

    Returns:
        Eigenvalues and trace, and how well they are known.

    Raises:
        TypeError: If parameters are in half precision or sharded, or the loss is none of these.
        ValueError: If an argument is out of bounds, nothing is trainable, or the loss or its
            Hessian is not finite.
        RuntimeError: If the loss cannot be differentiated, or not twice.

    References:
        Pearlmutter 1994 for the products, Lanczos 1950 for the eigenvalues, Hutchinson 1990 for
        the trace; see the functions used.
        Yao, Gholami, Keutzer, Mahoney: PyHessian: Neural Networks Through the Lens of the Hessian.
        IEEE Big Data 2020, arXiv 1912.07145: the same numbers, with power iteration.

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
    with hessian_of(model, loss, seed) as (product, value, names):
        generator = torch.Generator().manual_seed(seed)
        start = random_like(product.like, generator)
        ends = extreme_eigenvalues(product, start, iterations, tolerance)
        trace = estimate_trace(product, product.like, probes, generator)
    return Curvature(
        loss=value,
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
