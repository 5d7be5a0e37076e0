"""The custom autograd Functions between an output and a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.autograd.function import BackwardCFunction


def custom_functions(outputs: Sequence[Tensor], leaf: Tensor) -> tuple[str, ...]:
    """Lists the classes of users' Functions on the way from outputs to a leaf.

    Args:
        outputs: Tensors with a graph.
        leaf: The leaf.

    Returns:
        Their names, each once, from the output on; those of torch itself are left out.
    """
    order = _breadth_first([output.grad_fn for output in outputs if output.grad_fn is not None])
    leads = {id(node) for node in order if getattr(node, "variable", None) is leaf}
    grown = True
    while grown:  # a node leads there if one that follows it does
        more = {
            id(node)
            for node in order
            if id(node) not in leads and any(id(n) in leads for n, _ in node.next_functions)
        }
        leads |= more
        grown = bool(more)
    classes = [_forward_class(node) for node in order if id(node) in leads]
    names = [cls.__name__ for cls in classes if cls is not None and not _is_of_torch(cls)]
    return tuple(dict.fromkeys(names))


def _breadth_first(starts: list[Any]) -> list[Any]:
    order = list(dict.fromkeys(starts))
    seen = set(order)
    for node in order:  # grows on the way
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                order.append(following)
    return order


def _forward_class(node: Any) -> Any:
    return (
        getattr(type(node), "_forward_cls", None) if isinstance(node, BackwardCFunction) else None
    )


def _is_of_torch(cls: Any) -> bool:
    return bool(cls.__module__.split(".")[0] == "torch")
