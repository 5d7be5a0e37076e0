"""The loss of a plain loop: its statements, found in the source, as a function to run again.

Nothing tells gradwatch how a plain loop makes its loss from the outputs of the model. But when a
bad step is explained, the loop's function is most often still running. Its source says what
statements made the tensor that ``.backward()`` was called on, and its variables still hold what
they were made from. What the parameters have a part in is computed again; all else is taken as it
is.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import linecache
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass
from types import CodeType, FrameType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from gradwatch.hooks.callers import callers
from gradwatch.hooks.forwards import FOREIGN, ForwardCall, output_tensors, tensors_given
from gradwatch.hooks.variables import local_variables

MOST_TRIED = 3
"""Backwards of a frame that are tried: those right before the step."""

_ACTS = {"backward", "item", "step", "update", "zero_grad"}
"""Methods that change nothing of what a loss is computed from."""

Node = ast.AST
Block = tuple[Sequence[ast.stmt], int]
"""A list of statements, and a place in it."""


def losses_on_stack(frame: FrameType, parameters: Collection[Tensor]) -> Iterator[FunctionType]:
    """Yields functions that may compute the loss again, for the frames of the user's code.

    Args:
        frame: The innermost frame. Nothing of it is kept.
        parameters: Those of the model.

    Yields:
        Functions without arguments, each with a copy of the frame's variables; the most likely one
        first. Whether one is right must be tried (:func:`inputs_noted`).
    """
    known = set(map(id, parameters))
    for one in callers(frame):
        if not one.f_code.co_filename.startswith(FOREIGN):
            yield from _losses_of(one, known)


def _losses_of(frame: FrameType, parameters: Collection[int]) -> Iterator[FunctionType]:
    code, line = frame.f_code, frame.f_lineno
    body = _body_of(code, frame.f_globals)
    found = [] if body is None else [one for one in _backwards(body) if one[0].lineno <= line]
    variables: dict[str, Any] | None = None
    for call, path in sorted(found, key=lambda one: -one[0].lineno)[:MOST_TRIED]:
        if variables is None:
            variables = {**frame.f_globals, **local_variables(frame)}
        root = _root_of(call, variables)
        if root is not None:
            statements = _statements(root, path, _Variables(variables, parameters))
            function = _function(root, statements, code, dict(variables))
            if function is not None:
                yield function


def _body_of(code: CodeType, variables: Mapping[str, Any]) -> list[ast.stmt] | None:
    """Returns the statements of the function, or of the module, that a code object is made of."""
    lines = linecache.getlines(code.co_filename, dict(variables))
    try:
        tree = ast.parse("".join(lines))
    except (SyntaxError, ValueError):  # it has changed on the disk, or is no Python
        return None
    if code.co_name == "<module>":
        return tree.body
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == code.co_name:
            first = min([node.lineno, *(one.lineno for one in node.decorator_list)])
            if first == code.co_firstlineno:
                return node.body
    return None


def _backwards(body: Sequence[ast.stmt]) -> Iterator[tuple[ast.Call, list[Block]]]:
    """Yields the calls of a backward with the blocks that they are in, outermost first."""
    waiting: list[tuple[Sequence[ast.stmt], list[Block]]] = [(body, [])]
    while waiting:
        statements, path = waiting.pop()
        for place, statement in enumerate(statements):
            here = [*path, (statements, place)]
            inner = _blocks_of(statement)
            waiting += [(block, here) for block in inner]
            for node in [] if inner or _is_scope(statement) else ast.walk(statement):
                if isinstance(node, ast.Call) and _called(node) == "backward":
                    yield node, here


def _blocks_of(statement: ast.stmt) -> list[list[ast.stmt]]:
    if _is_scope(statement):
        return []
    blocks = [getattr(statement, name, None) for name in ("body", "orelse", "finalbody")]
    handlers = getattr(statement, "handlers", []) + getattr(statement, "cases", [])
    return [block for block in [*blocks, *(one.body for one in handlers)] if block]


def _is_scope(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)


def _called(call: ast.Call) -> str:
    function = call.func
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _root_of(call: ast.Call, variables: Mapping[str, Any]) -> ast.expr | None:
    """Returns the expression of the loss that a backward is called on, without a loss scale."""
    if not isinstance(call.func, ast.Attribute):
        return None
    root: ast.expr = call.func.value
    if call.args:  # accelerator.backward(loss), torch.autograd.backward(loss)
        receiver = variables.get(root.id) if isinstance(root, ast.Name) else None
        if len(call.args) > 1 or isinstance(receiver, Tensor):
            return None  # with a gradient to start from
        root = call.args[0]
    # A scaler multiplies the loss by its scale; what is bad only with it is no accident.
    while isinstance(root, ast.Call) and _called(root) == "scale" and len(root.args) == 1:
        root = root.args[0]
    return root


# -- which statements it takes ---------------------------------------------------------------------


def _function(
    root: ast.expr, made: Sequence[ast.stmt], code: CodeType, variables: dict[str, Any]
) -> FunctionType | None:
    """Makes a function of statements that returns an expression; None if it cannot be made."""
    nodes = [node for one in made for node in ast.walk(one) if isinstance(node, ast.Name)]
    stored = sorted({node.id for node in nodes if isinstance(node.ctx, ast.Store)})
    # As global variables of the function they may be read before they are assigned anew.
    first: list[ast.stmt] = [ast.Global(names=stored)] if stored else []
    whole = ast.FunctionDef(
        name=code.co_name.strip("<>"),
        args=ast.arguments([], [], None, [], [], None, []),
        body=[*first, *made, ast.Return(value=root)],
        decorator_list=[],
        lineno=made[0].lineno if made else root.lineno,
        col_offset=0,
        end_lineno=root.end_lineno,
        end_col_offset=root.end_col_offset,
    )
    whole.type_params = []  # type: ignore[attr-defined]
    tree = ast.fix_missing_locations(ast.Module(body=[whole], type_ignores=[]))
    scope: dict[str, Any] = {}
    try:
        exec(compile(tree, code.co_filename, "exec", dont_inherit=True), scope)
    except SyntaxError:  # a continue of a loop that is left out, or an await
        return None
    function: FunctionType = scope[whole.name]
    return FunctionType(function.__code__, variables, whole.name)


def _statements(root: ast.expr, path: Sequence[Block], variables: _Variables) -> list[ast.stmt]:
    """Lists the statements before a place that compute what an expression needs, in order."""
    wanted = set(filter(variables.are_trained, _loaded(root)))
    if name := _name(root):  # the loss itself, which may be a number by now
        wanted.add(name)
    found: list[ast.stmt] = []
    for statements, place in reversed(path):
        for statement in reversed(statements[:place]):
            if _is_scope(statement) or not _makes(statement, wanted):
                continue
            pure = _without_acts(statement, wanted)
            if pure is not None:
                found.append(pure)
                wanted.update(filter(variables.are_trained, _loaded(pure)))
    return found[::-1]


def _makes(statement: Node, wanted: Collection[str]) -> bool:
    """Returns whether a statement assigns something that is wanted, or changes it by a method."""
    for node in ast.walk(statement):
        if isinstance(node, ast.Expr):
            if _receiver(node) in wanted:
                return True
        elif isinstance(getattr(node, "ctx", None), ast.Store):
            name = _name(node)
            # What is wanted may be an attribute of what is assigned.
            if name and any(one == name or one.startswith(f"{name}.") for one in wanted):
                return True
    return False


def _name(node: Node | None) -> str:
    """Returns the name of a variable, or of an attribute or an item of one; else nothing.

    An item is called as what it is in: ``losses[0]`` is ``losses``.
    """
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Subscript):
        return _name(node.value)
    if isinstance(node, ast.Attribute):
        name = _name(node.value)
        return f"{name}.{node.attr}" if name else ""
    return ""


def _loaded(node: Node) -> set[str]:
    """Returns the names of what is read: of variables, and of attributes of variables."""
    read = (ast.Name, ast.Attribute)
    found = {_name(one) for one in ast.walk(node) if isinstance(one, read)}
    return found - {""}


class _Variables:
    """The variables of a frame, and which of them the parameters have a part in."""

    def __init__(self, values: Mapping[str, Any], parameters: Collection[int]) -> None:
        """Knows values by name, and the parameters by their ``id()``."""
        self._values = values
        self._parameters = parameters
        self._known: dict[str, bool] = {}

    def are_trained(self, name: str) -> bool:
        """Returns whether a parameter has a part in a variable, or in an attribute of one."""
        if name not in self._known:
            self._known[name] = self._is_trained(self._value(name))
        return self._known[name]

    def _value(self, name: str) -> Any:
        first, *others = name.split(".")
        value = self._values.get(first)
        for one in others:  # without running code of its class
            value = getattr(value, "__dict__", {}).get(one)
        return value

    def _is_trained(self, value: object) -> bool:
        data = isinstance(value, Tensor | tuple | list | Mapping) or is_dataclass(value)
        if not data or isinstance(value, type):
            return False
        # The graph is still there after its backward, only what it had saved is not.
        waiting = [one.grad_fn for one in output_tensors(value)]
        seen = set()
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if id(getattr(node, "variable", None)) in self._parameters:
                return True
            waiting += [one for one, _ in node.next_functions]
        return False


def _receiver(statement: ast.Expr) -> str:
    """Returns what a method is called of by a statement that is nothing but this call."""
    call = statement.value
    if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute):
        return "" if call.func.attr in _ACTS else _name(call.func.value)
    return ""


class _WithoutActs(ast.NodeTransformer):
    """Leaves out calls that only act, as they must not do so twice: print(), zero_grad()."""

    def __init__(self, wanted: Collection[str]) -> None:
        self._wanted = wanted

    def visit_Expr(self, node: ast.Expr) -> ast.Expr | None:
        """Keeps a call of a method that may change something that is wanted."""
        return node if _receiver(node) in self._wanted else None


def _without_acts(statement: ast.stmt, wanted: Collection[str]) -> ast.stmt | None:
    pure: ast.stmt | None = _WithoutActs(wanted).visit(copy.deepcopy(statement))
    for node in () if pure is None else ast.walk(pure):
        if getattr(node, "body", None) == []:
            node.body = [ast.Pass()]  # type: ignore[attr-defined]
    return pure


# -- whether it is the same micro-batch ------------------------------------------------------------


@contextmanager
def inputs_noted(calls: Sequence[ForwardCall]) -> Iterator[list[list[Tensor]]]:
    """Notes, in a block, the tensors that the modules of some forwards are given, call by call."""
    seen: list[list[Tensor]] = []
    modules = {id(call.module): call.module for call in calls}
    running: list[nn.Module] = []

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        if not running:
            seen.append(tensors_given(args, kwargs))
        running.append(module)

    def after(module: nn.Module, args: Any, output: Any) -> None:
        running.pop()

    with contextlib.ExitStack() as handles:
        for module in modules.values():
            one = module.register_forward_pre_hook(before, prepend=True, with_kwargs=True)
            handles.callback(one.remove)
            other = module.register_forward_hook(after, always_call=True)
            handles.callback(other.remove)
        yield seen


def are_of(calls: Sequence[ForwardCall], seen: Sequence[Sequence[Tensor]]) -> bool:
    """Returns whether forwards that were run again were given what those of the training were."""
    given = [tensors_given(call.args, call.kwargs) for call in calls]
    return len(seen) >= len(given) and all(
        len(one) == len(other) and all(map(_are_alike, one, other))
        for one, other in zip(given, seen, strict=False)
    )


@torch.no_grad()
def _are_alike(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    same = one == other
    if one.is_floating_point() or one.is_complex():
        same = same | (one.isnan() & other.isnan())
    return bool(same.all())
