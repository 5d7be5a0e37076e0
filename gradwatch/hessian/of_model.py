"""The Hessian of a loss with respect to a model's parameters, without disturbing the training."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradwatch.checks import described
from gradwatch.hessian.spectrum import NotFiniteError
from gradwatch.hooks.context import backwards_permitted
from gradwatch.hooks.data_parallel import undisturbed_communication
from gradwatch.hooks.generators import RandomState
from gradwatch.measure.parameters import ParameterTable, unwrapped

Loss: TypeAlias = Tensor | Callable[[], Tensor] | Callable[[Any], Tensor]

_NOT_A_MODEL = (
    "curvature(model=) got {value}. Write curvature(model, loss) with a torch.nn.Module, or a "
    'mapping from names to leaf tensors: {{"x": x}}.'
)
_NOT_A_LOSS = (
    "curvature(loss=) was given {given}, but needs the loss or a way to compute it. Write "
    "curvature(model, lambda: criterion(model(x), y)), or pass the tensor itself."
)
_NOT_SCALAR = (
    "The loss has the shape {shape}, but a Hessian is defined for a single number. Write "
    "loss.mean() or loss.sum()."
)
_NOT_FINITE = (
    "The loss is {loss}, so it has no Hessian. Find out what made it so first: gradwatch.watch "
    "names the first bad gradient."
)
_HAS_BACKWARD = (
    "The function that computes the loss ran a backward itself, or set a .grad. These gradients "
    "were discarded. Return the loss, and leave out loss.backward()."
)
_NO_GRAPH = (
    "curvature cannot differentiate this loss: {reason} Most likely its graph was freed by a "
    "backward(). Write curvature(model, lambda: ...) so that the loss is computed again, call it "
    "before loss.backward(), or write loss.backward(retain_graph=True)."
)
_ONCE_ONLY = (
    "curvature cannot differentiate this loss a second time: {reason} A fused kernel, a compiled "
    "model or a custom autograd.Function in it has no second derivative. For a compiled model call "
    "the original, as in curvature(model, lambda model: ...). For attention compute the loss under "
    "torch.nn.attention.sdpa_kernel(SDPBackend.MATH), for an RNN on a GPU under "
    "torch.backends.cudnn.flags(enabled=False) (curvature does both by itself if the loss is "
    "given as a function that it calls); write a Function's backward in differentiable operations."
)
_TOO_COARSE = (
    "curvature was given {name} in {dtype}, whose rounding is larger than the differences that "
    "curvature measures. Write copy.deepcopy(model).float() and a loss of that model."
)
_SHARDED = (
    "curvature was given {name} as a DTensor, of which this rank holds only a part. Call it with "
    "an unsharded model: load a full state dict into a plain copy."
)
_NONE_TRAINABLE = (
    "curvature was given a model without floating parameters that require a gradient, so there is "
    "nothing to differentiate by. Write parameter.requires_grad_(True) for those to include."
)


class HessianOfModel(NamedTuple):
    """The Hessian of a loss, as a map from vectors to products.

    Attributes:
        product: Maps a vector ``[n]`` to Hessian times vector; holds the graph of the loss.
        loss: Value of the loss.
        names: Names of the parameters, in the order of their rows.
    """

    product: HessianProduct
    loss: float
    names: list[str]


@contextmanager
def hessian_of(
    model: nn.Module | Mapping[str, Tensor], loss: Loss, seed: int
) -> Iterator[HessianOfModel]:
    """Computes a loss, and restores what that changes when the block ends, also after an error.

    Restored are ``.grad`` fields, buffers, random states and the flags for gradient communication.
    Tensor hooks of the parameters are removed for the duration of the block.

    Args:
        model: The module, or a mapping from names to leaf tensors.
        loss: The loss, or a function that returns it.
        seed: Seed of the random numbers that the loss draws.

    Raises:
        TypeError: If parameters are in half precision or sharded, or ``loss`` is not a loss.
        ValueError: If nothing is trainable, or the loss is not one finite number.
        RuntimeError: If the loss cannot be differentiated.
    """
    names, tensors = trainable(model)
    # Keep all of it up for the whole block: each product is a backward and would call hooks again.
    with ExitStack() as stack:
        stack.enter_context(without_tensor_hooks(tensors))
        stack.enter_context(undisturbed_gradients(tensors))
        if isinstance(model, nn.Module):
            stack.enter_context(undisturbed_buffers(model))
        stack.enter_context(undisturbed_communication())
        stack.enter_context(backwards_permitted())
        # Both are needed: inference_mode(False) alone does not undo a caller's no_grad.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        with undisturbed_random(seed, tensors):
            value = evaluate_loss(model, loss)
        yield HessianOfModel(HessianProduct(value, tensors), float(value.detach()), names)


def trainable(model: nn.Module | Mapping[str, Tensor]) -> tuple[list[str], list[Tensor]]:
    """Returns the names and tensors of the parameters that require a gradient.

    Raises:
        TypeError: If a parameter is in half precision, or sharded, or this is no model.
        ValueError: If no parameter requires a gradient.
    """
    if not isinstance(model, (nn.Module, Mapping)):
        raise TypeError(_NOT_A_MODEL.format(value=described(model)))
    table = ParameterTable.of(model)
    pairs = [(n, t) for n, t in zip(table.names, table.tensors, strict=True) if t.requires_grad]
    for name, tensor in pairs:
        if hasattr(tensor, "to_local"):  # a DTensor; not every build of torch can import the class
            raise TypeError(_SHARDED.format(name=name))
        if tensor.dtype not in (torch.float32, torch.float64):
            raise TypeError(_TOO_COARSE.format(name=name, dtype=tensor.dtype))
    if not pairs:
        raise ValueError(_NONE_TRAINABLE)
    return [name for name, _ in pairs], [tensor for _, tensor in pairs]


def check_loss(loss: object) -> None:
    """Raises a TypeError unless ``loss`` is a tensor or a function of at most one argument."""
    if not isinstance(loss, Tensor) and not (callable(loss) and arguments(loss) in (0, 1)):
        raise TypeError(_NOT_A_LOSS.format(given=f"an object of type {type(loss).__name__}"))


def evaluate_loss(model: nn.Module | Mapping[str, Tensor], loss: Loss) -> Tensor:
    """Computes the loss, if possible with kernels that can be differentiated twice.

    Raises:
        TypeError: If the function does not return a tensor.
        ValueError: If the loss is not a single number.
        NotFiniteError: If the loss is not finite.
    """
    value = loss if isinstance(loss, Tensor) else _call(model, loss)
    if not isinstance(value, Tensor):
        given = f"a function that returns an object of type {type(value).__name__}"
        raise TypeError(_NOT_A_LOSS.format(given=given))
    if value.numel() != 1:
        raise ValueError(_NOT_SCALAR.format(shape=list(value.shape)))
    if not bool(torch.isfinite(value.detach())):
        raise NotFiniteError(_NOT_FINITE.format(loss=float(value.detach())))
    return value


def _call(model: nn.Module | Mapping[str, Tensor], loss: Callable[..., Any]) -> Any:
    model = unwrapped(model)
    with ExitStack() as stack:
        # The fused kernels of attention and of cuDNN's RNNs have only a first derivative.
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if isinstance(model, nn.Module) and any(isinstance(m, nn.RNNBase) for m in model.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        return loss(model) if arguments(loss) else loss()


def arguments(function: Callable[..., Any]) -> int:
    """Counts the required arguments of a function, or of ``forward`` if it is a module."""
    # The signature of a module itself is (*args, **kwargs), which says nothing.
    call = function.forward if isinstance(function, nn.Module) else function
    try:
        parameters = inspect.signature(call).parameters.values()
    except ValueError:  # written in C, without a signature
        return 0
    return sum(
        p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        for p in parameters
    )


class HessianProduct:
    r"""The map :math:`v \mapsto Hv` for the Hessian :math:`H` of a loss.

    :math:`Hv` is the gradient of :math:`g^\top v` for the gradient :math:`g`. It is exact, costs
    about two backward passes, and needs no entry of :math:`H`. ``torch.autograd.grad`` writes to no
    ``.grad``, so hooks that run after the accumulation of a gradient are not called.

    Attributes:
        like: Vector ``[n]`` of zeros with the length, dtype and device of all vectors and products.
            If the parameters have several dtypes, it has the widest.
        used: For each parameter, whether the loss depends on it.

    References:
        Pearlmutter: Fast Exact Multiplication by the Hessian. Neural Computation 6(1), 1994.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> HessianProduct(x[0] ** 2 * x[1], [x])(torch.tensor([1.0, 0.0]))
        tensor([4., 2.])
    """

    def __init__(self, loss: Tensor, parameters: Sequence[Tensor]) -> None:
        """Computes the gradient of a loss with one element, with a graph to differentiate again.

        Raises:
            RuntimeError: If the graph of the loss has been freed, or an operation in it has no
                second derivative.
        """
        self._parameters = parameters
        gradients = self._differentiate(loss)
        self.used = tuple(gradient is not None for gradient in gradients)
        # If the loss is linear in a parameter, the gradient is constant and has no graph.
        kept = [(i, g) for i, g in enumerate(gradients) if g is not None and g.requires_grad]
        _refuse_once_differentiable([gradient for _, gradient in kept])
        self._gradients = kept
        # A model may be spread over several devices: use one. cat() promotes to the widest dtype.
        device = parameters[0].device
        zeros = [torch.zeros_like(p.detach()).reshape(-1).to(device) for p in parameters]
        self.like = torch.cat(zeros)

    def __call__(self, vector: Tensor) -> Tensor:
        """Computes the product with a vector ``[n]``; rows of unused parameters are zero.

        Raises:
            RuntimeError: If an operation of the loss cannot be differentiated twice.
        """
        if not self._gradients:
            return torch.zeros_like(vector)
        parts = torch.split(vector, [parameter.numel() for parameter in self._parameters])
        seeds = [parts[i].reshape(g.shape).to(g) for i, g in self._gradients]
        try:
            rows = torch.autograd.grad(
                [gradient for _, gradient in self._gradients],
                list(self._parameters),
                seeds,
                retain_graph=True,  # for the next product
                allow_unused=True,
                materialize_grads=True,
            )
        except RuntimeError as error:
            raise RuntimeError(_ONCE_ONLY.format(reason=_sentence(error))) from error
        return torch.cat([row.reshape(-1).to(vector) for row in rows])

    def _differentiate(self, loss: Tensor) -> Sequence[Tensor | None]:
        if not loss.requires_grad:
            return [None] * len(self._parameters)
        try:
            return torch.autograd.grad(
                loss.sum(), list(self._parameters), create_graph=True, allow_unused=True
            )
        except RuntimeError as error:
            raise RuntimeError(_NO_GRAPH.format(reason=_sentence(error))) from error


def _refuse_once_differentiable(gradients: Sequence[Tensor]) -> None:
    """Raises a RuntimeError if a backward in the graph is marked ``@once_differentiable``."""
    # It would not fail by itself: its node leads to no leaf, so autograd never runs it, and the
    # part of the Hessian that depends on it would silently be zero.
    seen: set[Any] = {None}
    waiting: list[Any] = [gradient.grad_fn for gradient in gradients]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::Error":
            reason = "a backward in its graph is marked @once_differentiable."
            raise RuntimeError(_ONCE_ONLY.format(reason=reason))
        waiting.extend(following for following, _ in node.next_functions)


def _sentence(error: Exception) -> str:
    first = str(error).strip().split("\n")[0].rstrip(". ")
    return f"{first}."


@contextmanager
def undisturbed_random(seed: int, tensors: Iterable[Tensor]) -> Iterator[None]:
    """Seeds torch's generators for the block, and restores all random states afterwards."""
    state = RandomState()
    try:
        # Not torch.manual_seed: it seeds every device, and would initialize CUDA needlessly.
        torch.default_generator.manual_seed(seed)
        for device in {t.device.index for t in tensors if t.device.type == "cuda"}:
            torch.cuda.default_generators[device].manual_seed(seed)
        yield
    finally:
        state.put_back()


@contextmanager
def undisturbed_buffers(model: nn.Module) -> Iterator[None]:
    """Restores buffers that changed in the block, such as running statistics."""
    saved = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for module, name, buffer, values in saved:
            # Write through .data, which leaves the version counter alone: a graph that saved the
            # buffer gets its values back, but would refuse to run if the counter had changed.
            if not torch.equal(buffer, values):
                buffer.data.copy_(values)
            if module._buffers.get(name) is not buffer:  # replaced, as by x = x + 1
                module._buffers[name] = buffer


@contextmanager
def without_tensor_hooks(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Removes the tensor hooks of the parameters for the block, and restores them afterwards.

    ``torch.autograd.grad`` calls tensor hooks (unlike hooks that run after accumulation into
    ``.grad``). A hook that scales a gradient would scale the Hessian, and one that records a norm
    would record it for a backward that is not the training's.
    """
    hooked: list[tuple[Any, Any]] = [(t, t._backward_hooks) for t in tensors if t._backward_hooks]
    try:
        # Not handle.remove(): the handles belong to the user, and the order of hooks matters.
        for tensor, _ in hooked:
            tensor._backward_hooks = None
        yield
    finally:
        for tensor, hooks in hooked:
            tensor._backward_hooks = hooks


@contextmanager
def undisturbed_gradients(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Sets each ``.grad`` to None for the block, and restores the same tensors afterwards.

    Raises:
        RuntimeError: If a ``.grad`` was set in the block.
    """
    # Restore the same tensor objects: DDP holds them as views into its buckets.
    saved = [tensor.grad for tensor in tensors]
    for tensor in tensors:
        tensor.grad = None
    try:
        yield
        if any(tensor.grad is not None for tensor in tensors):
            raise RuntimeError(_HAS_BACKWARD)
    finally:
        for tensor, gradient in zip(tensors, saved, strict=True):
            tensor.grad = gradient
