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
    leads = _leading_to([node for node in order if getattr(node, "variable", None) is leaf], order)
    classes = [_forward_class(node) for node in order if node in leads]
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


def _leading_to(ends: list[Any], nodes: list[Any]) -> set[Any]:
    before: dict[Any, list[Any]] = {}
    for node in nodes:
        for following, _ in node.next_functions:
            before.setdefault(following, []).append(node)
    leads, waiting = set(ends), list(ends)
    while waiting:
        fresh = [node for node in before.get(waiting.pop(), ()) if node not in leads]
        leads.update(fresh)
        waiting.extend(fresh)
    return leads


def _forward_class(node: Any) -> Any:
    return (
        getattr(type(node), "_forward_cls", None) if isinstance(node, BackwardCFunction) else None
    )


def _is_of_torch(cls: Any) -> bool:
    return bool(cls.__module__.split(".")[0] == "torch")
