"""The Hessian of a loss by the parameters of a model, while a training is left as it is."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from gradwatch.hessian.spectrum import NotFiniteError
from gradwatch.hooks.data_parallel import all_wrappers, is_distributed
from gradwatch.measure.parameters import ParameterTable

Loss: TypeAlias = Tensor | Callable[[], Tensor] | Callable[[Any], Tensor]

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)

_NOT_A_LOSS = (
    "curvature(loss=) was given {given}, and needs the loss or a way to compute it. Write "
    "curvature(model, lambda: criterion(model(x), y)), or pass the tensor itself."
)
_NOT_SCALAR = (
    "The loss has the shape {shape}, and a Hessian belongs to one number. Write loss.mean() or "
    "loss.sum()."
)
_NOT_FINITE = (
    "The loss is {loss}, so it has no Hessian. Find out what made it so first: gradwatch.watch "
    "names the first bad gradient."
)
_HAS_BACKWARD = (
    "The function that computes the loss ran a backward itself, or set a .grad. Its gradients were "
    "thrown away. Return the loss, and leave out loss.backward()."
)
_NO_GRAPH = (
    "curvature cannot differentiate this loss: {reason} Its graph was freed by a backward(), most "
    "likely. Write curvature(model, lambda: ...) so that the loss is computed afresh, call it "
    "before loss.backward(), or write loss.backward(retain_graph=True)."
)
_ONCE_ONLY = (
    "curvature cannot differentiate this loss a second time: {reason} A fused kernel, a compiled "
    "model or a custom autograd.Function on the way has no second derivative. Of a compiled model "
    "call the original, as in curvature(model, lambda model: ...). For attention compute the loss "
    "under torch.nn.attention.sdpa_kernel(SDPBackend.MATH), for an RNN on a GPU under "
    "torch.backends.cudnn.flags(enabled=False) (curvature does both by itself where the loss is "
    "given as a function that it calls); write a Function's backward in differentiable operations."
)
_TOO_COARSE = (
    "curvature was given {name} in {dtype}, whose rounding is larger than the differences that "
    "curvature is about. Write copy.deepcopy(model).float() and a loss of that model."
)
_SHARDED = (
    "curvature was given {name} as a DTensor, of which this rank holds a part. Call it with an "
    "unsharded model: load a full state dict into a plain copy."
)
_NONE_TRAINABLE = (
    "curvature was given a model without floating parameters that require a gradient, so there is "
    "nothing to differentiate by. Write parameter.requires_grad_(True) for those that count."
)


class HessianOfModel(NamedTuple):
    """What the products of a Hessian come from.

    Attributes:
        product: Maps a vector ``[n]`` to its product; holds the graph of the loss.
        loss: The loss.
        names: The parameters, in the order of their rows.
    """

    product: HessianProduct
    loss: float
    names: list[str]


@contextmanager
def hessian_of(
    model: nn.Module | Mapping[str, Tensor], loss: Loss, seed: int
) -> Iterator[HessianOfModel]:
    """Computes a loss, and puts back what that changes when the block ends, errors included.

    That is ``.grad`` fields, buffers, the states of random numbers and whether gradients are
    communicated; hooks that would see the gradients hang on no parameter in the block.

    Args:
        model: The module, or a mapping from names to leaf tensors.
        loss: The loss, or how to compute it.
        seed: Where the random numbers of the loss start.

    Raises:
        TypeError: If parameters are in half precision or sharded, or the loss is none.
        ValueError: If nothing is trainable, or the loss is not one finite number.
        RuntimeError: If the loss cannot be differentiated.
    """
    names, tensors = trainable(model)
    # All of it lasts as long as the products: each of them is a backward, and calls hooks again.
    with ExitStack() as stack:
        stack.enter_context(without_tensor_hooks(tensors))
        stack.enter_context(undisturbed_gradients(tensors))
        if isinstance(model, nn.Module):
            stack.enter_context(undisturbed_buffers(model))
        stack.enter_context(undisturbed_communication())
        # inference_mode(False) does not turn gradients on again for a caller under no_grad.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        with undisturbed_random(seed, tensors):
            value = evaluate_loss(model, loss)
        yield HessianOfModel(HessianProduct(value, tensors), float(value.detach()), names)


def trainable(model: nn.Module | Mapping[str, Tensor]) -> tuple[list[str], list[Tensor]]:
    """Returns names and tensors of the parameters that require a gradient.

    Raises:
        TypeError: If one is in half precision, or sharded.
        ValueError: If there is none.
    """
    table = ParameterTable.of(model)
    pairs = [(n, t) for n, t in zip(table.names, table.tensors, strict=True) if t.requires_grad]
    for name, tensor in pairs:
        if hasattr(tensor, "to_local"):  # a DTensor, without the import that not every build has
            raise TypeError(_SHARDED.format(name=name))
        if tensor.dtype not in (torch.float32, torch.float64):
            raise TypeError(_TOO_COARSE.format(name=name, dtype=tensor.dtype))
    if not pairs:
        raise ValueError(_NONE_TRAINABLE)
    return [name for name, _ in pairs], [tensor for _, tensor in pairs]


def check_loss(loss: object) -> None:
    """Raises a TypeError for what is neither a tensor nor a function of no argument or one."""
    if not isinstance(loss, Tensor) and not (callable(loss) and arguments(loss) in (0, 1)):
        raise TypeError(_NOT_A_LOSS.format(given=f"an object of type {type(loss).__name__}"))


def evaluate_loss(model: nn.Module | Mapping[str, Tensor], loss: Loss) -> Tensor:
    """Computes the loss, by operations that can be differentiated twice where there is a choice.

    Raises:
        TypeError: If the function returns no tensor.
        ValueError: If the loss is not one number.
        NotFiniteError: If it is not finite.
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
        # The fused kernels of attention and of cuDNN's RNNs have a first derivative only.
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if isinstance(model, nn.Module) and any(isinstance(m, nn.RNNBase) for m in model.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        return loss(model) if arguments(loss) else loss()


def unwrapped(model: Any) -> Any:
    """Returns the module inside of what reduces gradients, and of what torch.compile made of it."""
    # In any order and more than once: a compiled DDP of a compiled module is a usual thing.
    while isinstance(model, _WRAPPERS) or hasattr(model, "_orig_mod"):
        model = model.module if isinstance(model, _WRAPPERS) else model._orig_mod
    return model


def arguments(function: Callable[..., Any]) -> int:
    """Counts the arguments that must be given; modules that are losses take those of forward."""
    # A module's own signature is (*args, **kwargs), which says nothing.
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

    :math:`Hv` is the gradient of :math:`g^\top v` for the gradient :math:`g`: exact, for the price
    of about two backwards and without any entry of :math:`H`. ``torch.autograd.grad`` adds nothing
    to a ``.grad``, and no hook that waits for one is called.

    Attributes:
        like: Vector ``[n]`` of zeros: the length, dtype and device of what goes in and comes out.
            Of several dtypes it is the widest.
        used: For each parameter, whether the loss depends on it.

    References:
        Pearlmutter: Fast Exact Multiplication by the Hessian. Neural Computation 6(1), 1994.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> HessianProduct(x[0] ** 2 * x[1], [x])(torch.tensor([1.0, 0.0]))
        tensor([4., 2.])
    """

    def __init__(self, loss: Tensor, parameters: Sequence[Tensor]) -> None:
        """Computes the gradient of a loss with one element, with a graph of its own.

        Raises:
            RuntimeError: If the graph of the loss is gone, or ends where a second derivative is
                refused.
        """
        self._parameters = parameters
        gradients = self._differentiate(loss)
        self.used = tuple(gradient is not None for gradient in gradients)
        # Where the loss is linear the gradient is constant, and has no graph.
        kept = [(i, g) for i, g in enumerate(gradients) if g is not None and g.requires_grad]
        _refuse_once_differentiable([gradient for _, gradient in kept])
        self._gradients = kept
        # On one device, for a model may be spread over several; cat takes the widest dtype.
        device = parameters[0].device
        zeros = [torch.zeros_like(p.detach()).reshape(-1).to(device) for p in parameters]
        self.like = torch.cat(zeros)

    def __call__(self, vector: Tensor) -> Tensor:
        """Computes the product with a vector ``[n]``; zeros where the loss does not depend on it.

        Raises:
            RuntimeError: If an operation on the way cannot be differentiated twice.
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
    """Raises a RuntimeError for a node of ``once_differentiable``."""
    # It would not fail by itself: the node leads to no leaf, so autograd never runs it, and the
    # part of the Hessian that goes through it would be silently zero.
    seen: set[Any] = {None}
    waiting: list[Any] = [gradient.grad_fn for gradient in gradients]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::Error":
            reason = "a backward on the way is marked @once_differentiable."
            raise RuntimeError(_ONCE_ONLY.format(reason=reason))
        waiting.extend(following for following, _ in node.next_functions)


def _sentence(error: Exception) -> str:
    first = str(error).strip().split("\n")[0].rstrip(". ")
    return f"{first}."


class RandomState:
    """The state of every source of random numbers that a function may use, to start from again."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        """Saves the states of torch, Python and NumPy; of devices those that ``tensors`` are on."""
        self.devices = sorted({t.device.index for t in tensors if t.device.type == "cuda"})
        self._cuda = [(device, torch.cuda.get_rng_state(device)) for device in self.devices]
        self._torch = torch.get_rng_state()
        self._python = random.getstate()
        self._numpy = np.random.get_state()

    def put_back(self) -> None:
        """Makes the next random numbers those that came after the state was saved."""
        torch.set_rng_state(self._torch)
        for device, state in self._cuda:
            torch.cuda.set_rng_state(state, device)
        random.setstate(self._python)
        np.random.set_state(self._numpy)


@contextmanager
def undisturbed_random(seed: int, tensors: Iterable[Tensor]) -> Iterator[None]:
    """Runs with torch's random numbers started at a seed, and puts back a :class:`RandomState`."""
    state = RandomState(tensors)
    try:
        # Not torch.manual_seed, which seeds every device and begins CUDA where nobody uses it.
        torch.default_generator.manual_seed(seed)
        for device in state.devices:
            torch.cuda.default_generators[device].manual_seed(seed)
        yield
    finally:
        state.put_back()


@contextmanager
def undisturbed_buffers(model: nn.Module) -> Iterator[None]:
    """Puts the buffers back as they were, running statistics say, where they have changed."""
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
            # .data leaves the version counter as it is: a graph that saved the buffer has, once
            # more, what it saved, and would refuse to run if the counter said otherwise.
            if not torch.equal(buffer, values):
                buffer.data.copy_(values)
            if module._buffers.get(name) is not buffer:  # replaced, as x = x + 1 does
                module._buffers[name] = buffer


@contextmanager
def without_tensor_hooks(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Removes the hooks that see a gradient on its way, and hangs them back as they were.

    ``torch.autograd.grad`` calls these, unlike those that wait for ``.grad``: a hook that scales a
    gradient would scale the Hessian, one that keeps a norm would keep that of another backward.
    """
    hooked: list[tuple[Any, Any]] = [(t, t._backward_hooks) for t in tensors if t._backward_hooks]
    try:
        # Not handle.remove(): the handles are the user's, and the order of the hooks counts.
        for tensor, _ in hooked:
            tensor._backward_hooks = None
        yield
    finally:
        for tensor, hooks in hooked:
            tensor._backward_hooks = hooks


@contextmanager
def undisturbed_gradients(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Keeps the gradients out of reach, and puts the same ones back.

    Raises:
        RuntimeError: If there are others at the end.
    """
    # The same tensors, for a data-parallel wrapper holds them as views of its buckets.
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


@contextmanager
def undisturbed_communication() -> Iterator[None]:
    """Has no wrapper of the process talk to other ranks, nor expect a backward to follow.

    ``DistributedDataParallel`` waits for the backward of every forward that it means to reduce, and
    ``torch.autograd.grad`` is none that it would notice: its next forward would refuse to run. A
    loss may call others than that of the model, the critic of a generator say.
    """
    flags = ("require_backward_grad_sync", "require_forward_param_sync")
    there = all_wrappers() if is_distributed() else []
    # A wrapper whose constructor failed may be among them, without its flags.
    saved = [
        (one, flag, getattr(one, flag)) for one in there for flag in flags if hasattr(one, flag)
    ]
    try:
        for wrapper, flag, _ in saved:
            setattr(wrapper, flag, False)
        yield
    finally:
        for wrapper, flag, value in saved:
            setattr(wrapper, flag, value)
