"""What is checked: a function of named tensors in float64 that can be repeated exactly."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import traceback
import types
from collections import OrderedDict
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gradwatch.hessian.of_model import RandomState, unwrapped
from gradwatch.measure.parameters import ParameterTable

_WIDE = (torch.float64, torch.complex128)
_EQUAL = 1e-12  # sums on a device come in another order each time, and differ by that much
_OURS = (str(Path(torch.__file__).parent), str(Path(__file__).parent))

_NO_COPY = (
    "check_gradients works on a copy of the module in float64, and {kind} cannot be copied: "
    "{reason}. Write a __deepcopy__ for the part that refuses, or check a function of tensors."
)
_NO_DOUBLE_COPY = (
    "check_gradients compares in float64, which the device {device} does not have. Write "
    "check_gradients(model.cpu(), inputs) with the inputs on the CPU."
)
_SHARDED = (
    "check_gradients was given a DTensor, of which this rank holds a part. Call it with an "
    "unsharded copy of the model."
)
_NO_DOUBLES = (
    "check_gradients computes in float64, which this function does not: {reason}. It works in the "
    "precision of its inputs. Pass a module itself rather than a lambda around it, so that its "
    "weights are converted, and make constants with the dtype of an input (torch.ones_like(x), "
    "x.new_tensor(...))."
)
_NARROWS = (
    "check_gradients computes in float64, and this function goes on in a coarser precision: "
    "{where}. Differences of 1e-6 drown in its rounding. Leave out the cast, or write it as "
    ".to(x.dtype)."
)
_NO_OUTPUT = (
    "check_gradients was given a function that returns nothing of the kind, and no floating or "
    "complex tensor to differentiate. Return the loss or the outputs, alone or in a tuple, list, "
    "dict or dataclass."
)
_NO_INPUT = (
    "check_gradients was given no tensor to vary: no floating input, and no parameter that "
    "requires a gradient. Pass floating inputs, or a module itself rather than a lambda around it."
)
_RANDOM = (
    "check_gradients was given a function that is not deterministic: {path} differs by {most:.3g} "
    "between two calls with the same inputs, buffers and random numbers. Let it keep no state "
    "between calls (counters, running averages outside of buffers), and draw its random numbers "
    "from torch, NumPy's or Python's global generators."
)
_NOT_FINITE = (
    "check_gradients was given a function without a finite output for these inputs, so there is "
    "nothing to differentiate. Try inputs inside its domain."
)
_NOT_CALLABLE = (
    "check_gradients(function=) must be a function or a module, got an object of type {kind}. "
    "Write check_gradients(model, (x,)), or a lambda."
)


def evaluate_first(function: Callable[..., Any], inputs: Any) -> Repeatable:
    """Copies a function with its inputs to float64, and makes sure that it can be differentiated.

    Raises:
        TypeError: If it does not compute in float64, or has no input or output to differentiate.
        ValueError: If it is not deterministic, or not finite.
    """
    if not callable(function):
        raise TypeError(_NOT_CALLABLE.format(kind=type(function).__name__))
    subject = _repeatable_copy(function, inputs, widen=True)
    try:
        if not subject.leaves:
            raise TypeError(_NO_INPUT)
        # Once in float64 before anything is compared: what fails here fails for a reason to tell.
        _check_outputs(subject, _evaluate(subject, function, inputs))
    finally:
        subject.close()
    return subject


def _repeatable_copy(function: Callable[..., Any], inputs: Any, *, widen: bool) -> Repeatable:
    """Makes a function repeatable, with a copy of the module that it is, or is a method of."""
    module: nn.Module | None = None
    if isinstance(function, nn.Module):
        function = module = float64_copy(function, widen=widen)
    elif inspect.ismethod(function) and isinstance(function.__self__, nn.Module):
        module = float64_copy(function.__self__, widen=widen)
        function = types.MethodType(function.__func__, module)
    return repeatable(function, module, inputs, only_marked=False, widen=widen)


def _evaluate(
    subject: Repeatable, function: Callable[..., Any], inputs: Any
) -> list[tuple[str, Tensor]]:
    narrowing = Narrowing()
    try:
        with narrowing:
            outputs = subject.outputs()
    except Exception as error:  # whatever a user's function raises
        if _works_as_it_is(function, inputs):
            raise TypeError(_NO_DOUBLES.format(reason=str(error).rstrip("."))) from error
        raise
    if narrowing.found:
        raise TypeError(_NARROWS.format(where=narrowing.found))
    return outputs


def _works_as_it_is(function: Callable[..., Any], inputs: Any) -> bool:
    subject = _repeatable_copy(function, inputs, widen=False)
    try:
        subject.outputs()
    except Exception:  # then precision is not what is wrong
        return False
    return True


def _check_outputs(subject: Repeatable, outputs: Sequence[tuple[str, Tensor]]) -> None:
    if not outputs:
        raise TypeError(_NO_OUTPUT)
    if not any(bool(torch.isfinite(tensor).any()) for _, tensor in outputs):
        raise ValueError(_NOT_FINITE)
    again = subject.outputs()
    for (path, one), (_, other) in zip(outputs, again, strict=True):
        most = _largest_difference(one.detach(), other.detach())
        if most:
            raise ValueError(_RANDOM.format(path=path, most=most))


def _largest_difference(one: Tensor, other: Tensor) -> float:
    """Computes the largest difference; 0 where it is no more than a device's order of sums."""
    if one.shape != other.shape:
        return float("inf")
    if not one.numel():  # max() refuses an empty tensor
        return 0.0
    finite = torch.isfinite(one) & torch.isfinite(other)
    most = float(torch.where(finite, one - other, 0.0).abs().max())
    size = float(torch.where(finite, one, 0.0).abs().max())
    return most if most > _EQUAL * size else 0.0


def repeatable(
    function: Callable[..., Any],
    module: nn.Module | None,
    inputs: Any,
    *,
    only_marked: bool,
    widen: bool = True,
) -> Repeatable:
    """Makes a function repeatable, its inputs copied in float64.

    Args:
        function: What is called.
        module: The module whose parameters take part; None for none.
        inputs: A tensor, a tuple of arguments or a mapping of keyword arguments.
        only_marked: Whether inputs that do not require a gradient are constants. Otherwise they
            are only if another one requires it, and all are varied if none does.
        widen: False to keep the precision.

    Returns:
        The function with its inputs first and then the parameters that require a gradient.
    """
    given = [tensor for _, tensor in tensors_in(inputs, "") if is_continuous(tensor)]
    chosen = only_marked or any(tensor.requires_grad for tensor in given)
    leaves: list[Leaf] = []

    def prepare(path: str, tensor: Tensor) -> Tensor:
        fresh = widened(tensor, widen=widen)
        if is_continuous(tensor) and tensor.numel() and (tensor.requires_grad or not chosen):
            leaves.append(Leaf.of(path, fresh.requires_grad_()))
        return fresh

    arguments = _arguments(map_tensors(inputs, prepare, "inputs"))
    if module is not None:
        table = ParameterTable.of(module)
        for name, tensor in zip(table.names, table.tensors, strict=True):
            if tensor.requires_grad and tensor.numel():
                leaves.append(Leaf.of(name, tensor))
    return Repeatable(function, arguments, leaves, module)


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)), {}


@dataclass(frozen=True, eq=False)
class Leaf:
    """A tensor that is varied.

    Attributes:
        name: What the user knows it by.
        tensor: The leaf, float64 or complex128, contiguous.
        flat: Its memory as float64 ``[n]``, two numbers for a complex one; no graph.
    """

    name: str
    tensor: Tensor
    flat: Tensor

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Leaf:
        """Makes one of a leaf tensor, which it then shares its memory with."""
        # detach() shares the memory, and autograd refuses no write through it as it does to a leaf.
        values = tensor.detach()
        real = torch.view_as_real(values) if values.is_complex() else values
        return cls(name, tensor, real.view(-1))

    def index(self, position: int) -> tuple[int, ...]:
        """Turns a position in ``flat`` into an index, which ends in 1 for an imaginary part."""
        shape = (*self.tensor.shape, 2) if self.tensor.is_complex() else tuple(self.tensor.shape)
        return tuple(int(i) for i in np.unravel_index(position, shape)) if shape else ()


class Repeatable:
    """A function of leaves, with random numbers and buffers as they were, each time.

    Attributes:
        leaves: The tensors that can be varied, by writing to their ``flat``.
        evaluations: How often the function was computed.
        module: The module whose buffers take part; None without one.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        arguments: tuple[tuple[Any, ...], dict[str, Any]],
        leaves: Sequence[Leaf],
        module: nn.Module | None,
    ) -> None:
        """Saves the state of random numbers and buffers; ``leaves`` are arguments and others."""
        self.leaves = leaves
        self.evaluations = 0
        self.module = module
        self._function = function
        self._arguments = arguments
        tensors = [tensor for _, tensor in tensors_in(arguments, "")]
        self._random = RandomState([*tensors, *(leaf.tensor for leaf in leaves)])
        self._buffers = [
            (part, name, buffer.detach().clone())
            for part in ([] if module is None else module.modules())
            for name, buffer in part._buffers.items()
            if buffer is not None
        ]

    def outputs(self, values: Sequence[Tensor] = ()) -> list[tuple[str, Tensor]]:
        """Computes the function once, with a graph.

        Args:
            values: What to take for the first leaves among the arguments, instead of themselves.

        Returns:
            The paths and values of its floating and complex outputs, dense.
        """
        self.evaluations += 1
        self._random.put_back()
        for part, name, saved in self._buffers:
            # A fresh tensor: the graph of the call before may have saved the one that it had.
            part._buffers[name] = saved.clone()
        with torch.inference_mode(False), torch.enable_grad():
            args, kwargs = self._fresh_arguments(values)
            result = self._function(*args, **kwargs)
        return [
            (path, tensor if tensor.layout is torch.strided else tensor.to_dense())
            for path, tensor in tensors_in(result, "output")
            if is_continuous(tensor)
        ]

    @property
    def argument_leaves(self) -> Sequence[Leaf]:
        """The leaves that are among the arguments: the first ones."""
        given = {id(tensor) for _, tensor in tensors_in(self._arguments, "")}
        return [leaf for leaf in self.leaves if id(leaf.tensor) in given]

    def close(self) -> None:
        """Puts the random numbers back for the user."""
        self._random.put_back()

    def _fresh_arguments(self, values: Sequence[Tensor]) -> Any:
        """Copies the arguments, so that a function may write to them, as it may in a model."""
        given = {id(leaf.tensor): value for leaf, value in zip(self.leaves, values, strict=False)}
        return map_tensors(self._arguments, lambda _, t: given.get(id(t), t).clone(), "")


def float64_copy(module: nn.Module, *, widen: bool = True) -> nn.Module:
    """Copies a module with its parameters, buffers and tensor attributes in double precision.

    The copy has no ``.grad``, no hooks of tensors, and of the modules' hooks only those that torch
    hung there itself and that belong to what the module computes: ``weight_norm``, say. Tied
    weights stay tied. Data-parallel wrappers and that of ``torch.compile`` are left off.

    Args:
        module: The module, which stays as it is.
        widen: False for a copy in the precision that it has.

    Returns:
        The copy.

    Raises:
        TypeError: If it cannot be copied, is sharded, or is on a device without float64.
    """
    module = unwrapped(module)
    # What deepcopy finds in its memo it takes for copied. So the module is never copied in its own
    # precision first, and one entry for a tensor keeps all its uses tied.
    memo: dict[int, Any] = {}
    for part in module.modules():
        _replace_hooks(part, memo)
        _replace_tensors(part, memo, widen)
    try:
        return copy.deepcopy(module, memo)
    except (TypeError, RuntimeError, ValueError, AttributeError) as error:
        text = _NO_COPY.format(kind=type(module).__name__, reason=error)
        raise TypeError(text) from error


def _replace_hooks(module: nn.Module, memo: dict[int, Any]) -> None:
    for name, hooks in vars(module).items():
        # The dicts beside the hooks say which of them take keywords, and go the same way.
        suffixes = ("_hooks", "_hooks_with_kwargs", "_hooks_always_called")
        if name.endswith(suffixes) and isinstance(hooks, dict):
            kept = OrderedDict((k, h) for k, h in hooks.items() if _is_of_torch(h))
            memo[id(hooks)] = copy.deepcopy(kept)


def _is_of_torch(hook: Any) -> bool:
    home = getattr(hook, "__module__", None) or type(hook).__module__
    return home.startswith("torch.nn.utils")


def _replace_tensors(module: nn.Module, memo: dict[int, Any], widen: bool) -> None:
    # vars() too: weight_norm and many users keep tensors as plain attributes, which .double()
    # would leave in float32.
    for owner in (module._parameters, module._buffers, vars(module)):
        for tensor in owner.values():
            if isinstance(tensor, Tensor) and id(tensor) not in memo:
                fresh = widened(tensor, widen=widen)
                if isinstance(tensor, nn.Parameter):
                    fresh = nn.Parameter(fresh, requires_grad=tensor.requires_grad)
                memo[id(tensor)] = fresh


def widened(tensor: Tensor, *, widen: bool = True) -> Tensor:
    """Copies a tensor: real numbers as float64, complex ones as complex128, others as they are.

    Args:
        tensor: Any tensor.
        widen: False to keep its dtype.

    Returns:
        A dense, contiguous copy without a graph; integers, booleans and strings of bits too.

    Raises:
        TypeError: If it is sharded, or on a device without float64.
    """
    if hasattr(tensor, "to_local"):
        raise TypeError(_SHARDED)
    source = tensor.detach()
    if not is_continuous(source):
        return source.clone()
    if source.layout is not torch.strided:
        source = source.to_dense()
    if source.device.type == "mps" and widen:
        raise TypeError(_NO_DOUBLE_COPY.format(device=source.device))
    wide = torch.complex128 if source.is_complex() else torch.float64
    kept = source.to(wide if widen else source.dtype)
    # Contiguous, or Leaf could not view it as flat. Expanded tensors get memory of their own.
    return kept.clone(memory_format=torch.contiguous_format).as_subclass(Tensor)


class Narrowing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the first operation that makes coarser numbers of a float64 tensor with a gradient.

    What comes of it has steps of 1e-7 of its size, and no difference over 1e-6 means anything.
    Masks, noise and detached copies in float32 do no harm.

    Attributes:
        found: Where, in words; empty if nowhere.
    """

    def __init__(self) -> None:
        """Has found nothing."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = ""

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Runs an operation and looks at what came out."""
        result = func(*args, **(kwargs or {}))
        if not self.found:
            fine = any(t.requires_grad and t.dtype in _WIDE for _, t in tensors_in(args, ""))
            made = [t.dtype for _, t in tensors_in(result, "") if is_continuous(t)]
            if fine and not set(made) <= set(_WIDE):
                self.found = f"{func} {_users_line()}"
        return result


def _users_line() -> str:
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith(_OURS):
            return f"at {Path(frame.filename).name}:{frame.lineno}: {(frame.line or '')[:80]}"
    return "inside torch"


def map_tensors(value: Any, change: Callable[[str, Tensor], Any], path: str) -> Any:
    """Rebuilds a structure with other tensors; what it does not know stays as it is.

    Args:
        value: A tensor, or tuples, lists, dicts and dataclasses with tensors in them.
        change: Given where a tensor is and the tensor, returns what comes in its place.
        path: What the structure is called.

    Returns:
        A structure of the same kind.

    Example:
        >>> import torch
        >>> map_tensors({"a": [torch.ones(1), 5]}, lambda path, tensor: path, "x")
        {'a': ["x['a'][0]", 5]}
    """
    # Not torch.utils._pytree: dataclasses, and subclasses of dict and list, are leaves there
    # unless their class was registered, so a model's output record would hold no tensor.
    if isinstance(value, Tensor):
        return change(path, value)
    if isinstance(value, Mapping):
        items = {k: map_tensors(v, change, f"{path}[{k!r}]") for k, v in value.items()}
        if type(value) is dict or not isinstance(value, MutableMapping):
            return items
        # A copy keeps what the class knows besides, which its constructor may ask for.
        fresh: Any = copy.copy(value)
        fresh.update(items)
        return fresh
    if isinstance(value, (tuple, list)):
        parts = [map_tensors(item, change, f"{path}[{i}]") for i, item in enumerate(value)]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fresh = copy.copy(value)
        for field in dataclasses.fields(value):
            item = map_tensors(getattr(value, field.name), change, f"{path}.{field.name}")
            object.__setattr__(fresh, field.name, item)  # frozen ones too
        return fresh
    return value


def tensors_in(value: Any, path: str) -> list[tuple[str, Tensor]]:
    """Lists the tensors of a structure in order, each with its path."""
    found: list[tuple[str, Tensor]] = []
    map_tensors(value, lambda path, tensor: found.append((path, tensor)), path)
    return found


def is_continuous(tensor: Tensor) -> bool:
    """Tells whether a tensor holds real or complex numbers, which alone have derivatives."""
    return tensor.is_floating_point() or tensor.is_complex()
