"""The function that is checked: named tensors, and exactly repeatable evaluations."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import sys
import types
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gradwatch.hooks.generators import RandomState
from gradwatch.measure.parameters import ParameterTable, wraps

_EQUAL = 1e-12  # relative; a GPU may sum in another order each time, and differ by that much

_NO_COPY = (
    "check_gradients works on a copy of the module, and {kind} cannot be copied: "
    "{reason}. Write a __deepcopy__ for the part that refuses, or check a function of tensors."
)
_COMPILED_IN_PLACE = (
    "check_gradients works on a copy of the module, and copies of {name}, which was compiled by "
    "its own compile(), run no compiled code. Write torch.compile(module) there instead of "
    "module.compile()."
)
_SHARDED = (
    "check_gradients was given a DTensor, of which this rank holds only a part. Call it with an "
    "unsharded copy of the model."
)
_NO_OUTPUT = (
    "check_gradients was given a function that returns no floating or complex tensor, so there is "
    "nothing to differentiate. Return the loss or the outputs, alone or in a tuple, list, dict or "
    "dataclass."
)
_NO_INPUT = (
    "check_gradients was given no tensor to vary: no floating input, and no parameter that "
    "requires a gradient. Pass floating inputs, or the module itself instead of a lambda around it."
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


def evaluate_first(function: Callable[..., Any], inputs: Any) -> tuple[Repeatable, torch.dtype]:
    """Copies a function and its inputs to the highest precision that it computes in.

    That is float64; float32 if a kernel, a constant or a weight that the function holds cannot do
    that; or else its own.

    Returns:
        The function, and the coarsest dtype on the way from a varied tensor to the outputs.

    Raises:
        TypeError: If it has no input or output to differentiate, or cannot be copied.
        ValueError: If it is not deterministic, or has no finite output.
    """
    if not callable(function):
        raise TypeError(_NOT_CALLABLE.format(kind=type(function).__name__))
    failed: Exception | None = None
    for wide in (torch.float64, torch.float32, None):
        try:
            subject = _repeatable_copy(function, inputs, wide)
            precision = _coarsest(subject) if subject.leaves else torch.float64
        except Exception as error:  # whatever a user's function raises
            failed = failed or error
            continue
        try:
            if not subject.leaves:
                raise TypeError(_NO_INPUT)
            # Evaluate before comparing anything, so that a failure can be explained to the user.
            _check_outputs(subject, subject.outputs())
        finally:
            subject.close()
        return subject, precision
    raise failed or AssertionError("no precision was tried")


def _repeatable_copy(
    function: Callable[..., Any], inputs: Any, wide: torch.dtype | None
) -> Repeatable:
    """Makes a function repeatable, copying the module if it is one or a method of one."""
    module: nn.Module | None = None
    if isinstance(function, nn.Module):
        function = module = wide_copy(function, wide)
    elif inspect.ismethod(function) and isinstance(function.__self__, nn.Module):
        module = wide_copy(function.__self__, wide)
        function = types.MethodType(function.__func__, module)
    return repeatable(function, module, inputs, only_marked=False, wide=wide)


def _coarsest(subject: Repeatable) -> torch.dtype:
    """Evaluates a function once, without compiled code; returns the coarsest dtype on the way."""
    dtypes = [_real_dtype(leaf.tensor) for leaf in subject.leaves]
    watched = Narrowing()
    try:
        # Under a dispatch mode torch runs no compiled code, and might never do so again.
        with _uncompiled(), watched:
            outputs = subject.outputs()
    finally:
        subject.close()
    dtypes += [_real_dtype(tensor) for _, tensor in outputs if tensor.requires_grad]
    return max([*dtypes, *watched.found], key=lambda dtype: torch.finfo(dtype).eps)


def _uncompiled() -> AbstractContextManager[Any]:
    set_stance = getattr(torch.compiler, "set_stance", None)  # torch 2.6
    if set_stance is None or "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[Any] = set_stance("force_eager")
    return stance


def _real_dtype(tensor: Tensor) -> torch.dtype:
    return tensor.dtype.to_real() if tensor.dtype.is_complex else tensor.dtype


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
    """Returns the largest difference; 0 if the order of summation on a device can explain it."""
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
    wide: torch.dtype | None = None,
) -> Repeatable:
    """Makes a function repeatable, with copies of its inputs.

    Args:
        function: Called with the copied inputs.
        module: Its parameters that require a gradient are varied too; None for no module.
        inputs: A tensor, a tuple of arguments or a mapping of keyword arguments.
        only_marked: Whether only inputs that require a gradient are varied. If False, all floating
            inputs are varied when none of them requires a gradient.
        wide: float64 or float32, for inputs of that precision; None to keep theirs.

    Returns:
        The function; its leaves are the inputs, and then the parameters.
    """
    given = [tensor for _, tensor in tensors_in(inputs, "") if is_continuous(tensor)]
    chosen = only_marked or any(tensor.requires_grad for tensor in given)
    leaves: list[Leaf] = []

    def prepare(path: str, tensor: Tensor) -> Tensor:
        fresh = widened(tensor, wide)
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
        name: The parameter's name, or the path of the input, such as ``inputs[0]``.
        tensor: The leaf, floating or complex, contiguous.
        flat: A view of its memory as real numbers ``[n]``, two per complex element; no graph.
    """

    name: str
    tensor: Tensor
    flat: Tensor

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Leaf:
        """Wraps a leaf tensor; ``flat`` shares its memory."""
        # Autograd refuses in-place writes to a leaf, but not through detach(), which shares memory.
        values = tensor.detach()
        real = torch.view_as_real(values) if values.is_complex() else values
        return cls(name, tensor, real.view(-1))

    def index(self, position: int) -> tuple[int, ...]:
        """Converts a position in ``flat`` to an index; for complex tensors it ends in 0 or 1."""
        shape = (*self.tensor.shape, 2) if self.tensor.is_complex() else tuple(self.tensor.shape)
        return tuple(int(i) for i in np.unravel_index(position, shape)) if shape else ()


class Repeatable:
    """A function whose every evaluation starts from the same random numbers and buffers.

    Attributes:
        leaves: The tensors that can be varied, by writing to their ``flat``.
        evaluations: How often the function has been evaluated.
        module: The module whose buffers are restored each time; None without one.
        compiled: Whether the function, or a part of the module, is compiled or scripted.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        arguments: tuple[tuple[Any, ...], dict[str, Any]],
        leaves: Sequence[Leaf],
        module: nn.Module | None,
    ) -> None:
        """Saves the random states and the buffers."""
        self.leaves = leaves
        self.evaluations = 0
        self.module = module
        self.compiled = _is_compiled(function) or (
            module is not None and any(map(_is_compiled, module.modules()))
        )
        self._function = function
        self._arguments = arguments
        self._random = RandomState()
        self._buffers = [
            (part, name, buffer.detach().clone())
            for part in ([] if module is None else module.modules())
            for name, buffer in part._buffers.items()
            if buffer is not None
        ]

    def outputs(self, values: Sequence[Tensor] = ()) -> list[tuple[str, Tensor]]:
        """Evaluates the function once, with a graph.

        Args:
            values: Used in place of the first leaves, one each.

        Returns:
            Paths and values of the floating and complex outputs, as dense tensors.
        """
        self.evaluations += 1
        self._random.put_back()
        for part, name, saved in self._buffers:
            # A new tensor: the graph of the call before may have saved the old one.
            part._buffers[name] = saved.clone()
        with torch.inference_mode(False), torch.enable_grad(), self._quiet():
            args, kwargs = self._fresh_arguments(values)
            result = self._function(*args, **kwargs)
        return [
            (path, tensor if tensor.layout is torch.strided else tensor.to_dense())
            for path, tensor in tensors_in(result, "output")
            if is_continuous(tensor)
        ]

    @property
    def argument_leaves(self) -> Sequence[Leaf]:
        """The leaves that come from the arguments, not from the module: the first ones."""
        given = {id(tensor) for _, tensor in tensors_in(self._arguments, "")}
        return [leaf for leaf in self.leaves if id(leaf.tensor) in given]

    def close(self) -> None:
        """Restores the user's random states."""
        self._random.put_back()

    @contextmanager
    def _quiet(self) -> Iterator[None]:
        """Ignores what Dynamo provokes when it looks at ``.grad`` of our copied arguments."""
        # It hides that warning, but fails where warnings are errors, as in many test suites.
        if not self.compiled:
            yield
            return
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor")
            yield

    def _fresh_arguments(self, values: Sequence[Tensor]) -> Any:
        """Copies the arguments, because the function may modify them in place."""
        given = {id(leaf.tensor): value for leaf, value in zip(self.leaves, values, strict=False)}
        return map_tensors(self._arguments, lambda _, t: given.get(id(t), t).clone(), "")


def _is_compiled(function: Callable[..., Any]) -> bool:
    script = (torch.jit.ScriptModule, torch.jit.ScriptFunction)
    # torch.compile() of a function leaves the original there (private, torch 2.4 to 2.13).
    by_dynamo = hasattr(function, "_torchdynamo_orig_callable")
    return by_dynamo or wraps(function, "_orig_mod") or isinstance(function, script)


def wide_copy(module: nn.Module, wide: torch.dtype | None) -> nn.Module:
    """Copies a module with its parameters, buffers and tensor attributes in another precision.

    The copy has no ``.grad`` and no tensor hooks. Of the module hooks it keeps only those of torch
    itself that belong to the computation, such as ``weight_norm``. Tied weights stay tied. Wrappers
    of data parallelism are removed; what is compiled is compiled again, by the same backend.

    Args:
        module: Stays unchanged.
        wide: float64 or float32; None for a copy in the module's own precision.

    Raises:
        TypeError: If it cannot be copied, is sharded, or is on a device without that precision.
    """
    if wraps(module, "module"):
        return wide_copy(module.get_submodule("module"), wide)
    if wraps(module, "_orig_mod"):
        return _compiled_like(module, wide_copy(module.get_submodule("_orig_mod"), wide))
    if isinstance(module, torch.jit.ScriptModule):
        return _script_copy(module, wide)
    # deepcopy takes whatever is in its memo as already copied. Filling the memo avoids a first copy
    # in the old precision, and one entry per tensor keeps tied weights tied.
    memo: dict[int, Any] = {}
    for name, part in module.named_modules():
        if part._compiled_call_impl is not None:
            raise TypeError(_COMPILED_IN_PLACE.format(name=name or type(part).__name__))
        _replace_hooks(part, memo)
        _replace_tensors(part, memo, wide)
    try:
        for part in reversed(list(module.modules())):  # the innermost first
            if wraps(part, "_orig_mod"):
                inner = copy.deepcopy(part.get_submodule("_orig_mod"), memo)
                memo[id(part)] = _compiled_like(part, inner)
            elif isinstance(part, torch.jit.ScriptModule):
                memo[id(part)] = _script_copy(part, wide)
        return copy.deepcopy(module, memo)
    except (TypeError, RuntimeError, ValueError, AttributeError) as error:
        text = _NO_COPY.format(kind=type(module).__name__, reason=error)
        raise TypeError(text) from error


def _compiled_like(compiled: nn.Module, inner: nn.Module) -> nn.Module:
    """Compiles a module as another one was: with its backend, mode and options."""
    kind: Any = type(compiled)  # torch._dynamo.OptimizedModule (private, torch 2.4 to 2.13)
    fresh: nn.Module = kind(inner, compiled.dynamo_ctx)
    return fresh


def _script_copy(module: nn.Module, wide: torch.dtype | None) -> nn.Module:
    script = copy.deepcopy(module)  # not by a memo: its tensors are not in Python's hands
    return script if wide is None else script.to(wide)


def _replace_hooks(module: nn.Module, memo: dict[int, Any]) -> None:
    for name, hooks in vars(module).items():
        # The other dicts say which hooks take keywords or are always called: filter them as well.
        suffixes = ("_hooks", "_hooks_with_kwargs", "_hooks_always_called")
        if name.endswith(suffixes) and isinstance(hooks, dict):
            kept = OrderedDict((k, h) for k, h in hooks.items() if _is_of_torch(h))
            memo[id(hooks)] = copy.deepcopy(kept)


def _is_of_torch(hook: Any) -> bool:
    home = getattr(hook, "__module__", None) or type(hook).__module__
    return home.startswith("torch.nn.utils")


def _replace_tensors(module: nn.Module, memo: dict[int, Any], wide: torch.dtype | None) -> None:
    # vars() too: weight_norm and many users keep tensors as plain attributes, which .double() does
    # not convert.
    for owner in (module._parameters, module._buffers, vars(module)):
        for tensor in owner.values():
            if isinstance(tensor, Tensor) and id(tensor) not in memo:
                fresh = widened(tensor, wide)
                if isinstance(tensor, nn.Parameter):
                    fresh = nn.Parameter(fresh, requires_grad=tensor.requires_grad)
                memo[id(tensor)] = fresh


def widened(tensor: Tensor, wide: torch.dtype | None) -> Tensor:
    """Copies a tensor: floating or complex ones in a given precision, others unchanged.

    Args:
        tensor: Of any dtype and layout.
        wide: float64 or float32, for complex tensors the complex dtype of it; None to keep the
            dtype.

    Returns:
        A copy without a graph; floating and complex ones are dense and contiguous.

    Raises:
        TypeError: If it is sharded, or on a device without the precision.
    """
    if hasattr(tensor, "to_local"):
        raise TypeError(_SHARDED)
    source = tensor.detach()
    if not is_continuous(source):
        return source.clone()
    if source.layout is not torch.strided:
        source = source.to_dense()
    if wide is not None:
        source = source.to(wide.to_complex() if source.is_complex() else wide)
    # Contiguous, because Leaf needs a flat view; this also gives expanded tensors their own memory.
    return source.clone(memory_format=torch.contiguous_format).as_subclass(Tensor)


class Narrowing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Finds the dtypes in which an operation computes that a gradient flows through.

    Masks, noise and detached copies in a lower precision do no harm.

    Attributes:
        found: The real floating dtypes of their results.
    """

    def __init__(self) -> None:
        """Makes a mode that has found nothing yet."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: set[torch.dtype] = set()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Runs an operation, and notes the dtypes of its outputs."""
        result = func(*args, **(kwargs or {}))
        if any(t.requires_grad for _, t in tensors_in((args, kwargs or {}), "")):
            made = [tensor for _, tensor in tensors_in(result, "") if is_continuous(tensor)]
            self.found.update(map(_real_dtype, made))
        return result


def map_tensors(value: Any, change: Callable[[str, Tensor], Any], path: str) -> Any:
    """Rebuilds a structure with each tensor replaced; other values stay unchanged.

    Args:
        value: A tensor, or nested tuples, lists, dicts and dataclasses with tensors in them.
        change: Called with the path of a tensor and the tensor; returns the replacement.
        path: Name of the structure, the beginning of all paths.

    Returns:
        A structure of the same types.

    Example:
        >>> import torch
        >>> map_tensors({"a": [torch.ones(1), 5]}, lambda path, tensor: path, "x")
        {'a': ["x['a'][0]", 5]}
    """
    # Not torch.utils._pytree: it treats dataclasses and subclasses of dict and list as leaves
    # unless their class is registered, and would miss the tensors in a model's output.
    if isinstance(value, Tensor):
        return change(path, value)
    if isinstance(value, Mapping):
        items = {k: map_tensors(v, change, f"{path}[{k!r}]") for k, v in value.items()}
        if type(value) is dict or not isinstance(value, MutableMapping):
            return items
        # copy.copy keeps other attributes of the class, which its constructor might require.
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
            object.__setattr__(fresh, field.name, item)  # works for frozen dataclasses too
        return fresh
    return value


def tensors_in(value: Any, path: str) -> list[tuple[str, Tensor]]:
    """Lists the tensors of a structure in order, each with its path."""
    found: list[tuple[str, Tensor]] = []
    map_tensors(value, lambda path, tensor: found.append((path, tensor)), path)
    return found


def is_continuous(tensor: Tensor) -> bool:
    """Tells whether a tensor is floating or complex: only those have derivatives."""
    return tensor.is_floating_point() or tensor.is_complex()
