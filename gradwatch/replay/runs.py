"""Runs: a micro-batch or a closure run again under an observer, forward and backward."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._pytree import tree_leaves

from gradwatch.errors import described_error
from gradwatch.hooks.context import ForwardContext, is_replaying
from gradwatch.hooks.forwards import ForwardCall, output_tensors
from gradwatch.hooks.generators import torch_generators
from gradwatch.measure.parameters import forward_of, unwrapped
from gradwatch.out_of_memory import forget, is_out_of_memory, release_memory
from gradwatch.replay.arguments import Arguments
from gradwatch.replay.changes import CHANGES, Objects
from gradwatch.replay.live import Kernels, LiveGraph
from gradwatch.replay.observer import Observer
from gradwatch.replay.reach import uncompiled
from gradwatch.replay.search import Run
from gradwatch.replay.stand_ins import NoLossError, ReplayError, StandIns
from gradwatch.replay.state import Model, Undisturbed, undisturbed, without_gradients

WRITTEN_TO = (
    "{name} was changed in place after the forward had begun, by the loop or by the model itself, "
    "so the replay was given other values than the training."
)
NO_GRADIENTS = (
    "No gradient was kept at the outputs of the model, so only its forward was run again."
)
OTHER_OUTPUTS = (
    "Run again, the model returned outputs of other shapes than in the training, so its backward "
    "was left out."
)
NO_MEMORY = "Memory ran out while the micro-batch was run again."
NO_LOSS_OF_OUTPUT = (
    "The loss of the output requires no gradient, so there is no backward to look at. Return a "
    "tensor that was computed from the parameters, and call explain() on a model whose parameters "
    "require gradients."
)
RAISED = "Run again, the micro-batch raised an error: {error}"
NO_LOSS = (
    "The closure returned {value} and ran no backward, but must return the loss: a tensor that "
    "requires a gradient."
)


def run_calls(
    model: Model, calls: Sequence[ForwardCall], buffers: Mapping[int, Tensor] | None = None
) -> Run:
    """Makes a run of one micro-batch: its forwards, and one backward from the kept gradients.

    Args:
        model: What is watched; its names are used.
        calls: The forwards of the micro-batch, in their order.
        buffers: What the buffers held before, by the ``id()`` of each as it is now, as
            :meth:`gradwatch.hooks.buffers.ModelBuffers.before_window` returns it.

    Returns:
        A function that runs it, each time exactly alike. It raises a :class:`ReplayError` that says
        why if that cannot be done; the training is left as it was also then.
    """
    return partial(_run_calls, model, calls, buffers or {})


def run_function(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    loss: Callable[[Any], Any] | None = None,
    caller: tuple[str, int] = ("", 0),
) -> Run:
    """Makes a run of a forward with these arguments, and of the backward of a loss of its output.

    Args:
        model: The module that is called.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        loss: Returns the loss of the output; None if the output holds it: if it is one number, or
            has an attribute or an item ``loss``. Else the backward starts from ones at each output.
        caller: File and line that the forward of the outermost module is said to come from.

    Returns:
        A function as of :func:`run_calls`.
    """
    return partial(_run_function, model, args, kwargs, loss, caller)


def run_closure(
    model: Model,
    closure: Callable[[], Any],
    scale: float = 1.0,
    context: ForwardContext | None = None,
    buffers: Mapping[int, Tensor] | None = None,
) -> Run:
    """Makes a run of a closure that returns the loss, and of the backward of that loss.

    The closure may run the backward itself, and may reset gradients: those of the training stay.

    Args:
        model: What is watched; its names are used.
        closure: The closure; it calls the model, or a wrapper of it.
        scale: The gradient of the loss from which its backward starts.
        context: What to run it in; None for how things are then.
        buffers: As of :func:`run_calls`, if the training has run the closure; None if not: then
            buffers are taken as they are.

    Returns:
        A function as of :func:`run_calls`.
    """
    return partial(_run_closure, model, closure, scale, context, buffers)


@contextmanager
def live_calls(model: Model, calls: Sequence[ForwardCall]) -> Iterator[LiveGraph]:
    """Runs the forwards of one micro-batch again, and keeps their graph alive for a block.

    Args:
        model: What is watched; its names are used.
        calls: The forwards of the micro-batch, in their order.

    Raises:
        ReplayError: As the run of :func:`run_calls`.
    """
    modules = [call.module for call in calls]
    with (
        _errors_told(),
        undisturbed(model, *modules, given=_passed_on(calls)) as block,
        Kernels() as kernels,
    ):
        given = [_arguments(call, block.stand_ins) for call in calls]
        inputs = [block.stand_ins.by_id[i] for one in given for i in one.names]
        outputs = [_forward(call, one) for call, one in zip(calls, given, strict=True)]
        kept = [gradient for call in calls for gradient in call.gradients]
        leaves = [leaf for output in outputs for leaf in _with_gradient(output)]
        ends, problem = _ends(leaves, kept)
        if problem:
            raise ReplayError(problem[0])
        starts = _starts(ends)
        begin = [leaf for leaf in _once(leaves) if id(leaf) in starts]
        gradients = [starts[id(leaf)] for leaf in begin]
        with _without_strangers(begin, block.stand_ins):
            yield LiveGraph(
                begin, gradients, _trained(block), _first_shape(inputs), kernels.batches
            )


@contextmanager
def live_closure(
    model: Model,
    closure: Callable[[], Any],
    scale: float = 1.0,
    context: ForwardContext | None = None,
) -> Iterator[LiveGraph]:
    """Runs a closure again and keeps the graph of its loss alive for a block.

    If the closure runs the backward itself, that is left for the block.

    Args:
        model: As for :func:`run_closure`.
        closure: As for :func:`run_closure`.
        scale: As for :func:`run_closure`.
        context: As for :func:`run_closure`.

    Raises:
        ReplayError: As the run of :func:`run_closure`.
    """
    with _errors_told(), undisturbed(model, closure) as block, Kernels() as kernels:
        begin: list[tuple[Tensor, Tensor | None]] = []
        inputs: list[Tensor] = []
        with (
            _instead_of_backward(lambda *roots: begin.extend(_pairs(*roots))),
            _inputs_seen(inputs),
            nullcontext() if context is None else context.entered(),
        ):
            loss = closure()
        if not begin:
            if not (isinstance(loss, Tensor) and loss.requires_grad):
                raise ReplayError(NO_LOSS.format(value=_described(loss)))
            begin = [(loss, torch.full_like(loss, scale))]
        roots = [root for root, _ in begin]
        gradients = [torch.ones_like(root) if start is None else start for root, start in begin]
        with _without_strangers(roots, block.stand_ins):
            yield LiveGraph(
                roots, gradients, _trained(block), _first_shape(inputs), kernels.batches
            )


def _trained(block: Undisturbed) -> dict[str, Tensor]:
    return {name: one for name, one in block.parameters.items() if one.requires_grad}


def _first_shape(inputs: Iterable[Tensor]) -> tuple[int, ...]:
    return next((tuple(one.shape) for one in inputs if one.dim()), ())


@contextmanager
def _inputs_seen(inputs: list[Tensor]) -> Iterator[None]:
    """Notes the tensors that modules are given in a block, those of the outermost first."""
    handle = register_module_forward_pre_hook(
        lambda _, args: (
            inputs.extend(one.detach() for one in tree_leaves(args) if isinstance(one, Tensor))
            if not inputs and is_replaying()
            else None
        )
    )
    try:
        yield
    finally:
        handle.remove()


def _pairs(tensors: Any, gradients: Any = None) -> list[tuple[Tensor, Tensor | None]]:
    roots = _listed(tensors)
    return list(zip(roots, _listed(gradients) or [None] * len(roots), strict=True))


@contextmanager
def _instead_of_backward(called: Callable[[Any, Any], None]) -> Iterator[None]:
    """Calls a function instead of ``torch.autograd.backward``, which then does nothing."""
    with _backward_replaced(
        lambda tensors, grad_tensors=None, *_, **__: called(tensors, grad_tensors)
    ):
        yield


@contextmanager
def _backward_replaced(called: Callable[..., None]) -> Iterator[None]:
    """Calls a function instead of ``torch.autograd.backward``, but in no other thread."""
    backward = torch.autograd.backward
    waits = True

    def instead(*args: Any, **kwargs: Any) -> None:
        (called if waits and is_replaying() else backward)(*args, **kwargs)

    torch.autograd.backward = instead
    try:
        yield
    finally:
        waits = False
        if torch.autograd.backward is instead:  # else another thread has put something around it
            torch.autograd.backward = backward


def _run_calls(
    model: Model,
    calls: Sequence[ForwardCall],
    buffers: Mapping[int, Tensor],
    observer: Observer,
) -> list[str]:
    modules = [call.module for call in calls]
    with _errors_told(), undisturbed(model, *modules, given=_passed_on(calls)) as block:
        given = [_arguments(call, block.stand_ins) for call in calls]
        block.go_back(buffers, {i for one in given for i in one.names})
        notes = [*block.notes]
        names = [(block.stand_ins.by_id[i], n) for one in given for i, n in one.names.items()]
        _tell(observer, block, names)
        written = [name for pair in zip(calls, given, strict=True) for name in _written_to(*pair)]
        notes.extend(WRITTEN_TO.format(name=name) for name in written)
        observer.changed_inputs = written
        objects = Objects(
            [pair for one in given for pair in one.named],
            block.modules,
            _seen_tensors(calls, block),
            observer.earlier,
        )
        observer.note_reads(objects.tensors)
        with observer:
            outputs = []
            for call, one in zip(calls, given, strict=True):
                observer.caller = call.caller
                outputs.append(_forward(call, one))
        kept = [gradient for call in calls for gradient in call.gradients]
        found = [(leaf, i) for i, one in enumerate(outputs) for leaf in _with_gradient(one)]
        leaves = [leaf for leaf, _ in found]
        made_by = [(unwrapped(calls[i].module), calls[i].caller) for _, i in found]
        ends, problem = _ends(leaves, kept)
        notes.extend(problem)
        # Not inside of the observer: what is done in there is not part of the training.
        starts = _starts(ends)
        with observer:
            observer.begin_backward(leaves, [starts.get(id(leaf)) for leaf in leaves], made_by)
            begin = [leaf for leaf in _once(leaves) if id(leaf) in starts]
            if begin:
                with _without_strangers(begin, block.stand_ins):
                    torch.autograd.backward(begin, [starts[id(leaf)] for leaf in begin])
        notes += _end(observer, block, objects)
    return notes


def _seen_tensors(calls: Sequence[ForwardCall], block: Undisturbed) -> set[int]:
    """Returns the ids of the copies of tensors whose version counters were noted."""
    leaves = tree_leaves([(call.args, dict(call.kwargs)) for call in calls])
    copies = (block.stand_ins.by_id.get(id(one)) for one in leaves)
    return {id(one) for one in copies if one is not None}


def _passed_on(calls: Sequence[ForwardCall]) -> list[object]:
    return [one for call in calls for one in _arguments(call, None).passed_on]


def _arguments(call: ForwardCall, stand_ins: StandIns | None) -> Arguments:
    return Arguments(forward_of(call.module), call.args, call.kwargs, stand_ins)


def _forward(call: ForwardCall, given: Arguments) -> Any:
    with call.context.entered():
        # A wrapper only calls what it wraps by now, but it may have hooks of the user's.
        return call.module(*given.args, **given.kwargs)


def _tell(observer: Observer, block: Undisturbed, inputs: Iterable[tuple[Tensor, str]]) -> None:
    for name, module in block.modules:
        observer.name_module(module, name)
    for name, tensor in block.parameters.items():
        observer.name_parameter(tensor, name)
    for name, tensor in block.buffers.items():
        observer.name_buffer(tensor, name)
    told = set(map(id, (*block.parameters.values(), *block.buffers.values())))
    for tensor, name in inputs:
        if id(tensor) not in told:
            told.add(id(tensor))
            observer.name_input(tensor, name)
    observer.attributes = set(block.attributes)
    for name, tensor in block.attributes.items():
        if id(tensor) not in told:  # an input may be kept in one
            observer.name_buffer(tensor, name)


def _end(observer: Observer, block: Undisturbed, objects: Objects | None = None) -> list[str]:
    """Ends the observation; returns sentences of what the forward has changed in objects."""
    observer.doubtful = block.doubtful()
    notes = []
    if objects is not None:
        changed = objects.changed()
        observer.doubtful_from = 0 if changed.spoiled else observer.first_read(changed.tensors)
        observer.may_be_earlier = changed.earlier
        notes = [CHANGES.format(name=name) for name in changed.names] + changed.taken_back
    observer.end({name: tensor.grad for name, tensor in block.parameters.items()})
    return notes


def _written_to(call: ForwardCall, given: Arguments) -> list[str]:
    """Names the arguments whose version counters have moved since the forward began."""
    leaves = tree_leaves((call.args, dict(call.kwargs)))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    moved = [
        given.names.get(id(tensor), "An argument")
        for tensor, version in zip(tensors, call.versions, strict=False)
        if not tensor.is_inference() and tensor._version != version
    ]
    return list(dict.fromkeys(moved))


# -- the gradients that a backward starts from -----------------------------------------------------


def _with_gradient(output: Any) -> list[Tensor]:
    return [one for one in output_tensors(output) if one.requires_grad]


def _once(tensors: Iterable[Tensor]) -> list[Tensor]:
    return list({id(one): one for one in tensors}.values())


def _ends(
    leaves: Sequence[Tensor], kept: Sequence[Sequence[Tensor]]
) -> tuple[list[tuple[Tensor, Tensor]], list[str]]:
    """Pairs outputs with the gradients that were kept of them; and a sentence if that fails."""
    if not any(kept):
        return [], [NO_GRADIENTS]
    pairs = [(leaf, some) for leaf, some in zip(leaves, kept, strict=False) if some]
    if len(leaves) != len(kept) or any(
        gradient.shape != leaf.shape for leaf, some in pairs for gradient in some
    ):
        return [], [OTHER_OUTPUTS]
    with torch.no_grad():
        # Of an output that is there twice, each place was told the whole gradient.
        found = {id(leaf): (leaf, _sum(some).to(leaf)) for leaf, some in pairs}
    return list(found.values()), []


def _sum(gradients: Sequence[Tensor]) -> Tensor:
    total = gradients[0].detach().clone()
    for gradient in gradients[1:]:
        total += gradient
    return total


def _starts(ends: Sequence[tuple[Tensor, Tensor]]) -> dict[int, Tensor]:
    """Returns, by the ``id()`` of an output, the gradient that came to it from outside.

    The gradient that was kept of an output also holds what came from other outputs that were
    computed from it, as a model returns that has logits and loss. That comes by itself.
    """
    inner = _computed_from(ends)
    starts = {id(leaf): gradient for leaf, gradient in ends if id(leaf) not in inner}
    if not inner:
        return starts
    outer = [(leaf, gradient) for leaf, gradient in ends if id(leaf) in starts]
    rest = [(leaf, gradient) for leaf, gradient in ends if id(leaf) in inner]
    try:
        own = torch.autograd.grad(
            [leaf for leaf, _ in outer],
            [leaf for leaf, _ in rest],
            [gradient for _, gradient in outer],
            retain_graph=True,
            allow_unused=True,
        )
    except RuntimeError:  # a reentrant checkpoint lies between
        return starts
    for (leaf, gradient), part in zip(rest, own, strict=True):
        outside = _difference(gradient, part)
        if outside is not None:
            starts[id(leaf)] = outside
    return starts


def _computed_from(ends: Sequence[tuple[Tensor, Tensor]]) -> set[int]:
    """Returns the ids of outputs that others of them were computed from."""
    edges = {(leaf.grad_fn, leaf.output_nr): id(leaf) for leaf, _ in ends if leaf.grad_fn}
    found: set[int] = set()
    if len(edges) > 1:
        for leaf, _ in ends:
            found.update(edges[edge] for edge in _edges([leaf]) if edge in edges)
    return found


def _edges(roots: Iterable[Tensor]) -> Iterator[tuple[Any, int]]:
    """Yields the edges of the graph that tensors were computed in, without those to themselves."""
    seen: set[Any] = set()
    waiting = [root.grad_fn for root in roots]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield from node.next_functions
        waiting.extend(following for following, _ in node.next_functions)


@torch.no_grad()
def _difference(whole: Tensor, part: Tensor | None) -> Tensor | None:
    if part is None:
        return whole
    known = torch.isfinite(part)
    rounding = 16 * torch.finfo(part.dtype).eps
    least = rounding * float(part[known].abs().amax()) if bool(known.any()) else 0.0
    if torch.allclose(whole[known], part[known], rounding, least, equal_nan=True):
        return None
    return torch.where(known, whole - part, 0)


# -- a forward by hand -----------------------------------------------------------------------------


def _run_function(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    loss: Callable[[Any], Any] | None,
    caller: tuple[str, int],
    observer: Observer,
) -> list[str]:
    module, functions = unwrapped(model), [] if loss is None else [loss]
    passed_on = Arguments(forward_of(module), args, kwargs, None).passed_on
    with _errors_told(), undisturbed(model, *functions, given=passed_on) as block:
        given = Arguments(forward_of(module), args, kwargs, block.stand_ins)
        inputs = [(block.stand_ins.by_id[i], name) for i, name in given.names.items()]
        _tell(observer, block, [*inputs, *block.data])
        observer.variables = {name for _, name in block.data} - set(given.names.values())
        observer.caller = caller
        with observer:
            output = module(*given.args, **given.kwargs)
            ends = _losses(output) if loss is None else _with_gradient(loss(output))
            if not ends:
                raise ReplayError(NO_LOSS_OF_OUTPUT)
            observer.begin_backward(ends, [None] * len(ends))
            torch.autograd.backward(ends, [torch.ones_like(one) for one in ends])
        _end(observer, block)
    return [*block.notes]


def _losses(output: Any) -> list[Tensor]:
    named = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return _with_gradient(named if isinstance(named, Tensor) else output)


# -- the backward of a closure ---------------------------------------------------------------------


def _run_closure(
    model: Model,
    closure: Callable[[], Any],
    scale: float,
    context: ForwardContext | None,
    buffers: Mapping[int, Tensor] | None,
    observer: Observer,
) -> list[str]:
    with _errors_told(), undisturbed(model, closure) as block:
        objects = None
        if buffers is not None:
            block.go_back(buffers, ())
            objects = Objects((), block.modules, earlier=observer.earlier)
            observer.note_reads(objects.tensors)
        _tell(observer, block, _batch_first(block.data, block.functions[0]))
        backwards = _Backwards(observer, block.stand_ins)
        with backwards.in_place(), observer:
            with nullcontext() if context is None else context.entered():
                loss = uncompiled(block.functions[0])()
            if isinstance(loss, tuple) and len(loss) == 2:  # with its weight, as for run_batch()
                loss = loss[0]
            if not backwards.had(loss, block.parameters.values()):
                if not (isinstance(loss, Tensor) and loss.requires_grad):
                    raise NoLossError(NO_LOSS.format(value=_described(loss)))
                torch.autograd.backward(loss, torch.full_like(loss, scale))
        notes = _end(observer, block, objects)
    return [*block.notes, *notes]


def _batch_first(data: list[tuple[Tensor, str]], function: Any) -> list[tuple[Tensor, str]]:
    """Puts a tensor first that has the batch in its first dimension.

    What the function is given comes before what its variables lead to: that may be a whole data
    set, where an adapter's function has the trainer.
    """
    arguments = _argument_names(function)
    given = [pair for pair in data if re.split(r"[^\w]", pair[1], maxsplit=1)[0] in arguments]
    ids = {id(tensor) for tensor, _ in given}
    return _longest_first(given) + _longest_first([pair for pair in data if id(pair[0]) not in ids])


def _argument_names(function: Any) -> set[str]:
    """Returns the names of the arguments that a ``functools.partial`` has; else none."""
    if not isinstance(function, partial):
        return set()
    try:
        bound = inspect.signature(function.func).bind_partial(*function.args, **function.keywords)
    except (TypeError, ValueError):  # a function in C need not have a signature
        return set()
    return set(bound.arguments)


def _longest_first(data: list[tuple[Tensor, str]]) -> list[tuple[Tensor, str]]:
    """Orders tensors by how many have the length of their first dimension.

    In the variables of a closure there may be others, such as the weights of classes. Most often
    inputs and targets are there, of the same length; and inputs have more dimensions.
    """
    lengths = Counter(tensor.shape[0] for tensor, _ in data if tensor.dim())

    def order(pair: tuple[Tensor, str]) -> tuple[int, int]:
        tensor = pair[0]
        return (-lengths[tensor.shape[0]], -tensor.dim()) if tensor.dim() else (0, 0)

    return sorted(data, key=order)


class _Backwards:
    """Stands for ``torch.autograd.backward`` while a closure runs, which may call it itself."""

    def __init__(self, observer: Observer, stand_ins: StandIns) -> None:
        self._observer = observer
        self._stand_ins = stand_ins
        self._backward = torch.autograd.backward
        self._roots: list[Tensor] = []

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Puts it in the place of torch's function for a block."""
        with _backward_replaced(self):
            yield

    def __call__(self, tensors: Any, grad_tensors: Any = None, *args: Any, **kwargs: Any) -> None:
        # A checkpoint calls it as well, inside of a backward.
        if torch._C._current_graph_task_id() != -1:
            self._backward(tensors, grad_tensors, *args, **kwargs)
            return
        roots = _listed(tensors)
        if not self._roots:
            self._observer.begin_backward(roots, _listed(grad_tensors) or [None] * len(roots))
        self._roots += roots
        with _without_strangers(roots, self._stand_ins):
            self._backward(tensors, grad_tensors, *args, **kwargs)

    def had(self, loss: Any, parameters: Iterable[Tensor]) -> bool:
        """Returns whether the backward of a loss has run, be it as a part of another one."""
        if not self._roots and any(one.grad is not None for one in parameters):
            # Somebody had the function under a name of his own.
            roots = [loss] if isinstance(loss, Tensor) else []
            self._observer.begin_backward(roots, [None for _ in roots])
            return True
        if not self._roots or not isinstance(loss, Tensor) or not loss.requires_grad:
            return bool(self._roots)
        if any(loss is root for root in self._roots):
            return True
        return (loss.grad_fn, loss.output_nr) in set(_edges(self._roots))


def _listed(tensors: Any) -> list[Any]:
    if tensors is None:
        return []
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return "a tensor that requires no gradient"
    return f"an object of type {type(value).__name__}"


@contextmanager
def _without_strangers(roots: Sequence[Tensor], stand_ins: StandIns) -> Iterator[None]:
    """Protects leaf tensors of the graph that were not replaced, as nothing led to them."""
    ours = set(map(id, stand_ins.by_id.values()))
    nodes = {node for node, _ in _edges(roots) if hasattr(node, "variable")}
    leaves = [node.variable for node in nodes if id(node.variable) not in ours]
    with without_gradients(leaves, hooks=True):
        yield


@contextmanager
def _errors_told() -> Iterator[None]:
    try:
        yield
    except ReplayError:
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            raise ReplayError(RAISED.format(error=described_error(error))) from error
        forget(error)
        failed = True
    else:
        failed = False
    if failed:
        # Here the error is no longer held, nor are the activations.
        release_memory([generator.device for generator in torch_generators()])
        raise ReplayError(NO_MEMORY)
