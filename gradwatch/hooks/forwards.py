"""The forwards of a window: what is needed to run one of its micro-batches again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from gradwatch.hooks.context import ForwardContext


@dataclass(slots=True)
class ForwardCall:
    """One call of a module, with references to what it was given; nothing is copied.

    Attributes:
        module: The outermost module that was called.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        versions: For each tensor among the arguments, in the order of
            ``torch.utils._pytree.tree_leaves((args, kwargs))``, its version counter at the start.
        context: Random generators, autocast and grad mode at the start.
        caller: File and line from which the user's code called the module; ``("", 0)`` if unknown.
        gradients: For each output that requires a gradient, in the order of ``tree_leaves``, the
            gradients that have arrived there: an empty list before its backward, one tensor after.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    versions: list[int]
    context: ForwardContext
    caller: tuple[str, int] = ("", 0)
    gradients: list[list[Tensor]] = field(default_factory=list)
