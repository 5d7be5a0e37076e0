"""Finds the modules and custom autograd Functions whose gradients are wrong."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from gradwatch.gradcheck.function import Repeatable, is_continuous, map_tensors, repeatable
from gradwatch.gradcheck.slopes import Slopes, Tolerance, compare, is_wrong, whole_lines
from gradwatch.measure.parameters import wraps


@dataclass(frozen=True, slots=True)
class Culprit:
    """A module or function whose own gradients are wrong.

    Attributes:
        module: Name of the module; empty for the whole function.
        kind: Name of its class.
        functions: The custom autograd Functions in it, on the path to the wrong gradients.
        order: Its place in the order of first calls; the whole function comes last.
    """

    module: str
    kind: str
    functions: tuple[str, ...]
    order: int

    def __str__(self) -> str:
        """Says where to look, as "name (class): the autograd Function ..."."""
        made = f"the autograd Function {' or '.join(self.functions)}" if self.functions else ""
        if not self.module:
            return f"{made} in {self.kind}" if made else f"{self.kind} itself"
        return f"{self.module} ({self.kind})" + (f": {made}" if made else "")


def find_culprits(
    function: Repeatable, wrong: list[int], tolerance: Tolerance, kind: str, seed: int
) -> tuple[list[Culprit], int]:
    """Checks each module inside by itself, children before their parents.

    Modules of torch itself are taken to be right. If no part fails, the whole function is to blame.

    Args:
        function: The function whose gradients are wrong.
        wrong: Indices of the leaves with a wrong gradient.
        tolerance: What counts as equal.
        kind: Class name of the whole function, for the message.
        seed: Seed of the random numbers.

    Returns:
        The culprits in the order of their calls, and the number of evaluations.
    """
    found: list[Culprit] = []
    evaluations = 0
    calls = first_calls(function)
    # A module is called before its children, so in reverse order the children come first. A parent
    # that holds a culprit need not be checked: it would fail because of that culprit.
    for order, call in reversed(list(enumerate(calls))):
        of_torch = type(call.module).__module__.startswith("torch.nn.")
        if of_torch or any(c.module.startswith(f"{call.name}.") for c in found):
            continue
        inputs = (call.inputs, call.keywords)
        part = repeatable(partial(_call, call.module), call.module, inputs, only_marked=True)
        functions = _fault(part, tolerance, seed)
        evaluations += part.evaluations
        if functions is not None:
            found.append(Culprit(call.name, type(call.module).__name__, functions, order))
    if not found:
        functions = functions_between(function, wrong)
        return [Culprit("", kind, functions, len(calls))], evaluations + 1
    return found[::-1], evaluations


@dataclass(frozen=True, slots=True)
class Call:
    """The first call of a module.

    Attributes:
        name: Name of the module, as in ``named_modules()``.
        module: The module that was called.
        inputs: Positional arguments; tensors are copies that keep ``requires_grad``.
        keywords: Keyword arguments, copied in the same way.
    """

    name: str
    module: nn.Module
    inputs: Any
    keywords: Any


def first_calls(function: Repeatable) -> list[Call]:
    """Evaluates the function once; returns the first call of each module inside, in order."""
    calls: dict[str, Call] = {}
    handles = []
    for name, module in _modules_in(function.module):
        record = partial(_record, calls, name)
        handles.append(module.register_forward_pre_hook(record, with_kwargs=True))
    try:
        function.outputs()
    finally:
        for handle in handles:
            handle.remove()
    return list(calls.values())


def _modules_in(root: nn.Module | None) -> Iterator[tuple[str, nn.Module]]:
    """Yields the modules inside, but none of those in compiled code: it would take the hooks in."""
    closed: list[str] = []
    for name, module in [] if root is None else root.named_modules():
        if any(name.startswith(start) for start in closed):
            continue
        if wraps(module, "_orig_mod") or isinstance(module, torch.jit.ScriptModule):
            closed.append(f"{name}." if name else "")
        if module is not root:
            yield name, module


def _record(calls: dict[str, Call], name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
    if name not in calls:
        # Copy now: a later in-place operation could overwrite the arguments.
        inputs, keywords = map_tensors((args, kwargs), _detached_copy, "")
        calls[name] = Call(name, module, inputs, keywords)


def _detached_copy(_: str, tensor: Tensor) -> Tensor:
    copy = tensor.detach().clone()
    return copy.requires_grad_(tensor.requires_grad) if is_continuous(tensor) else copy


def _call(module: nn.Module, inputs: Any, keywords: Any) -> Any:
    return module(*inputs, **keywords)


def _fault(part: Repeatable, tolerance: Tolerance, seed: int) -> tuple[str, ...] | None:
    """Returns the custom functions at fault in a part; None if its gradients are right."""
    if not part.leaves or not part.outputs():
        return None
    slopes, generator = Slopes(part, tolerance, seed), torch.Generator().manual_seed(seed)
    wrong = list(_wrong_leaves(slopes, generator))
    return functions_between(part, wrong) if wrong else None


def _wrong_leaves(slopes: Slopes, generator: torch.Generator) -> Iterator[int]:
    for number in range(len(slopes.function.leaves)):
        for line in whole_lines(slopes, number, generator):
            found = compare(slopes, line)
            if not found.agrees and is_wrong(slopes, line, found):
                yield number
                break


def functions_between(function: Repeatable, leaves: Iterable[int]) -> tuple[str, ...]:
    """Lists the user's autograd Functions on the paths from the outputs to the given leaves."""
    outputs = [tensor for _, tensor in function.outputs()]
    nodes = _breadth_first([output.grad_fn for output in outputs if output.grad_fn is not None])
    names: dict[str, None] = {}
    for number in leaves:
        on_the_way = _leading_to(function.leaves[number].tensor, nodes)
        names.update(dict.fromkeys(_custom_names(n for n in nodes if n in on_the_way)))
    return tuple(names)


def _breadth_first(starts: Sequence[Any]) -> list[Any]:
    nodes = list(dict.fromkeys(starts))
    seen = set(nodes)
    for node in nodes:  # the list grows during the loop
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)
    return nodes


def _leading_to(leaf: Tensor, nodes: Sequence[Any]) -> set[Any]:
    before: dict[Any, list[Any]] = {}
    for node in nodes:
        for following, _ in node.next_functions:
            before.setdefault(following, []).append(node)
    # Only AccumulateGrad, the node at which the graph ends in a leaf, has a variable.
    waiting = [node for node in nodes if getattr(node, "variable", None) is leaf]
    leading = set(waiting)
    while waiting:
        fresh = [node for node in before.get(waiting.pop(), ()) if node not in leading]
        leading.update(fresh)
        waiting.extend(fresh)
    return leading


def _custom_names(nodes: Iterable[Any]) -> Iterator[str]:
    for node in nodes:
        # torch makes a node class for each Function, and keeps the Function in _forward_cls.
        cls: Any = getattr(type(node), "_forward_cls", None)
        if isinstance(node, BackwardCFunction) and cls.__module__.split(".")[0] != "torch":
            yield cls.__name__
