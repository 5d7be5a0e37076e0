"""Optimizers that step inside the backward, as soon as a parameter has its gradient."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor

REFUSED = (
    "{asked} cannot be had with an optimizer that steps inside the backward{where}: the norm of "
    "all gradients is known when the backward has ended, and by then the step has been taken and "
    "the gradients are gone. Step the optimizer after the backward, or leave {argument} out; "
    "clip=ClipByValue(...) works inside a backward, and watching does."
)


def refuse_what_needs_all_gradients(asked: Mapping[str, str], where: str = "") -> None:
    """Refuses what can only be decided when every gradient is there.

    Args:
        asked: Such things that the user asked for: the argument, and how it was written.
        where: How it is known that the optimizer steps inside the backward.

    Raises:
        ValueError: If there is any.
    """
    for argument, written in asked.items():
        raise ValueError(REFUSED.format(argument=argument, asked=written, where=where))


def first_stepped_in_backward(names: Iterable[str], tensors: Iterable[Tensor]) -> str | None:
    """Finds a parameter that ``torch.distributed.optim`` has given an optimizer of its own.

    Args:
        names: Names of the parameters.
        tensors: The parameters.

    Returns:
        Its name; None where ``_apply_optimizer_in_backward`` was applied to none of them.
    """
    pairs = zip(names, tensors, strict=True)
    return next((n for n, tensor in pairs if hasattr(tensor, "_in_backward_optimizers")), None)
