"""What else a backward has to obey, as torch.autograd.gradcheck tests it."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from gradwatch.explain.gradients.repeatable import Repeatable

_BROKEN = (RuntimeError, TypeError, AttributeError, NotImplementedError)
_ANY = 1e300  # gradients were compared already, and better: gradcheck knows no kinks


def backward_contract(function: Repeatable) -> str:
    """Tests a backward for undefined gradients, for ignoring what it is given, and for repeating.

    Args:
        function: A small function without kinks nearby, whose gradients are right.

    Returns:
        What is wrong; empty if nothing is.

    References:
        torch.autograd.gradcheck, of which these are the checks besides the numbers.
    """
    leaves = tuple(leaf.tensor for leaf in function.leaves)
    return _first_line(
        lambda: torch.autograd.gradcheck(
            _outputs_of(function),
            leaves,
            atol=_ANY,
            nondet_tol=1e-10,
            fast_mode=not _is_complex(function),
        )
    )


def forward_contract(function: Repeatable, rtol: float) -> str:
    """Compares derivatives in forward mode with numeric ones.

    Args:
        function: A function; its leaves among its arguments are looked at.
        rtol: The share of the larger number that is let pass.

    Returns:
        What is wrong; empty if nothing is.
    """
    leaves = tuple(leaf.tensor for leaf in function.argument_leaves)
    return _first_line(
        lambda: torch.autograd.gradcheck(
            _outputs_of(function),
            leaves,
            rtol=rtol,
            check_forward_ad=True,
            check_backward_ad=False,
            check_undefined_grad=False,
            fast_mode=not _is_complex(function),
        )
    )


def _outputs_of(function: Repeatable) -> Callable[..., tuple[Tensor, ...]]:
    def outputs(*values: Tensor) -> tuple[Tensor, ...]:
        # An Inf, as masks make them, has no differences.
        found = [tensor for _, tensor in function.outputs(values)]
        return tuple(torch.where(torch.isfinite(tensor.detach()), tensor, 0.0) for tensor in found)

    return outputs


def _is_complex(function: Repeatable) -> bool:
    tensors = [*(leaf.tensor for leaf in function.leaves), *(t for _, t in function.outputs())]
    return any(tensor.is_complex() for tensor in tensors)


def _first_line(check: Callable[[], bool]) -> str:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of what it then raises
            check()
    except GradcheckError as error:
        text = " ".join(str(error).split()).partition(" The above quantities")[0]
        return f"torch.autograd.gradcheck says: {text[:400]}"
    except _BROKEN as error:
        said = f"{type(error).__name__}: {error}"[:400]
        return f"fails where torch.autograd.gradcheck leaves out the gradient of an output: {said}"
    return ""
