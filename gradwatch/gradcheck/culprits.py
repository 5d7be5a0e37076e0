"""The modules and custom Functions whose gradients are wrong."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from gradwatch.gradcheck.function import Repeatable, is_continuous, map_tensors, repeatable
from gradwatch.gradcheck.slopes import Line, Slopes, Tolerance, compare, is_wrong


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
    names = [cls.__name__ for cls in classes if cls is not None and not _is_torch_function(cls)]
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


def _is_torch_function(cls: Any) -> bool:
    return bool(cls.__module__.split(".")[0] == "torch")


@dataclass(frozen=True, slots=True)
class Culprit:
    """A module, or a function, whose own gradients are wrong.

    Attributes:
        module: Its name; empty for the whole.
        kind: Its class.
        functions: The custom autograd Functions in it, on the way to what is wrong.
        place: When it was first called, in order; the whole is called last.
    """

    module: str
    kind: str
    functions: tuple[str, ...]
    place: int

    def __str__(self) -> str:
        """Says where to look."""
        made = f"the autograd Function {' or '.join(self.functions)}" if self.functions else ""
        if not self.module:
            return f"{made} in {self.kind}" if made else f"{self.kind} itself"
        return f"{self.module} ({self.kind})" + (f": {made}" if made else "")


@dataclass(frozen=True, slots=True)
class Call:
    """What a module was first called with.

    Attributes:
        name: Its name.
        module: The module.
        inputs: Its positional arguments; tensors are copies that know if they had a graph.
        keywords: Its keyword arguments.
    """

    name: str
    module: nn.Module
    inputs: Any
    keywords: Any


def first_calls(function: Repeatable) -> list[Call]:
    """Computes a function once and notes what its modules were called with.

    Args:
        function: The function of a module.

    Returns:
        The first call of each module inside, in order.
    """
    calls: dict[str, Call] = {}
    handles = []
    root = function.module
    for name, module in [] if root is None else root.named_modules():
        if module is not root:
            handles.append(module.register_forward_pre_hook(_note(calls, name), with_kwargs=True))
    try:
        function.outputs()
    finally:
        for handle in handles:
            handle.remove()
    return list(calls.values())


def find_culprits(
    function: Repeatable, wrong: list[int], tolerance: Tolerance, kind: str, seed: int
) -> tuple[list[Culprit], int]:
    """Checks the modules inside by themselves, those before others that they are made of.

    Modules of torch itself are taken to be right. Where no part fails, the whole is to blame.

    Args:
        function: The function whose gradients are wrong.
        wrong: Which of its leaves.
        tolerance: What counts as equal.
        kind: The class of the whole.
        seed: Where the random numbers start.

    Returns:
        The culprits in the order of their calls, and how many evaluations it took.
    """
    found: list[Culprit] = []
    evaluations = 0
    calls = first_calls(function)
    for place, call in reversed(list(enumerate(calls))):
        if _is_of_torch(call.module) or any(_is_inside(c.module, call.name) for c in found):
            continue
        part = repeatable(
            partial(_call, call.module), call.module, (call.inputs, call.keywords), only_marked=True
        )
        functions = _fault(part, tolerance, seed)
        evaluations += part.evaluations
        if functions is not None:
            found.append(Culprit(call.name, type(call.module).__name__, functions, place))
    if not found:
        functions = functions_between(function, wrong)
        return [Culprit("", kind, functions, len(calls))], evaluations + 1
    return found[::-1], evaluations


def _call(module: nn.Module, inputs: Any, keywords: Any) -> Any:
    return module(*inputs, **keywords)


def _fault(part: Repeatable, tolerance: Tolerance, seed: int) -> tuple[str, ...] | None:
    """Finds the custom functions at fault in a part; None if the part is right."""
    if not part.leaves or not part.outputs():
        return None
    slopes, generator = Slopes(part, tolerance, seed), torch.Generator().manual_seed(seed)
    wrong = list(_wrong_leaves(slopes, generator))
    return functions_between(part, wrong) if wrong else None


def _wrong_leaves(slopes: Slopes, generator: torch.Generator) -> Iterator[int]:
    for number, leaf in enumerate(slopes.function.leaves):
        line = Line.random(number, leaf.flat, generator)
        found = compare(slopes, line)
        if not found.agrees and is_wrong(slopes, line, found):
            yield number


def functions_between(function: Repeatable, wrong: Iterable[int]) -> tuple[str, ...]:
    """Lists the custom autograd Functions on the way from the outputs to some leaves."""
    outputs = [tensor for _, tensor in function.outputs()]
    leaves = [function.leaves[number].tensor for number in wrong]
    names = [name for leaf in leaves for name in custom_functions(outputs, leaf)]
    return tuple(dict.fromkeys(names))


def _note(calls: dict[str, Call], name: str) -> Any:
    def note(module: nn.Module, args: Any, kwargs: Any) -> None:
        if name not in calls:
            inputs, keywords = map_tensors((args, kwargs), _kept, "")
            calls[name] = Call(name, module, inputs, keywords)

    return note


def _kept(_: str, tensor: Tensor) -> Tensor:
    copy = tensor.detach().clone()
    return copy.requires_grad_(tensor.requires_grad) if is_continuous(tensor) else copy


def _is_inside(name: str, outer: str) -> bool:
    return name.startswith(f"{outer}.")


def _is_of_torch(module: nn.Module) -> bool:
    return type(module).__module__.startswith("torch.nn.")
