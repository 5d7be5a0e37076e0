"""Trainings with a replay in the middle, and what is looked at to see whether it disturbed them."""

from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gradwatch.hooks.context import ForwardContext
from gradwatch.hooks.forwards import ForwardCall
from gradwatch.measure.parameters import ParameterTable
from gradwatch.replay.runs import run_calls, run_closure
from tests.support.state import differences, pieces, state_of


class Seen(TorchDispatchMode):
    """Has the methods of the observer, and notes what it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.caller = ("", 0)
        self.earlier: dict[Any, Any] = {}
        self.callers: list[tuple[str, int]] = []
        self.modules: dict[str, nn.Module] = {}
        self.parameters: dict[str, Tensor] = {}
        self.buffers: dict[str, Tensor] = {}
        self.inputs: list[tuple[str, Tensor]] = []
        self.calls: Counter[str] = Counter()
        self.outputs: list[Tensor] = []
        self.starts: list[Tensor | None] = []
        self.begun = 0
        self.gradients: dict[str, Tensor | None] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.callers.append(self.caller)
        self.calls[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))

    def name_module(self, module, name):
        self.modules.setdefault(name, module)

    def name_parameter(self, tensor, name):
        self.parameters[name] = tensor

    def name_buffer(self, tensor, name):
        self.buffers[name] = tensor

    def name_input(self, tensor, argument):
        self.inputs.append((argument, tensor))

    def note_reads(self, tensors):
        pass

    def first_read(self, tensors):
        return None

    def begin_backward(self, outputs, gradients, calls=()):
        self.outputs, self.starts = list(outputs), list(gradients)
        self.begun += 1

    def end(self, gradients):
        self.gradients = {n: None if g is None else g.clone() for n, g in gradients.items()}


@contextmanager
def kept(model: nn.Module) -> Iterator[list[ForwardCall]]:
    """Keep the forwards of a block, as a watcher does."""
    calls: list[ForwardCall] = []

    def before(module, args, kwargs):
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        versions = [-1 if one.is_inference() else one._version for one in tensors]
        context = ForwardContext.now()
        calls.append(ForwardCall(module, args, kwargs, versions, context, ("loop.py", 7)))

    def after(module, args, kwargs, output):
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                arrived: list[Tensor] = []
                calls[-1].gradients.append(arrived)
                leaf.register_hook(arrived.append)

    handles = [
        model.register_forward_pre_hook(before, with_kwargs=True),
        model.register_forward_hook(after, with_kwargs=True),
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


# Tensors and modules are compared apart; the last is an address.
_NOT_PLAIN = ("_parameters", "_buffers", "_modules", "_flat_weight_refs", "_torchdynamo_wrapper_id")

Training = tuple[nn.Module, Callable[[int], Tensor]]
"""A model, and a function from the number of a step to its loss."""

WAYS = ("calls", "closure", "own_backward")


def disturbance(
    make: Callable[[], Training],
    way: str,
    extra: Callable[[], Any] = lambda: None,
    compares_gradients: bool = True,
) -> list[str]:
    """Train three steps, with and without a replay in each, and return what is different."""
    plain, _ = _train(make, "", extra)
    state, wrong = _train(make, way, extra)
    return [*differences(plain, state), *(wrong if compares_gradients else [])]


def _train(make: Callable[[], Training], way: str, extra: Callable[[], Any]) -> Any:
    torch.manual_seed(11)
    np.random.seed(12)
    model, loss_of = make()
    trained = [p for p in model.parameters() if p.requires_grad]
    sparse = any(getattr(module, "sparse", False) for module in model.modules())
    kind = partial(torch.optim.SGD, momentum=0.9) if sparse else torch.optim.Adam
    optimizer = kind(trained, lr=0.01)
    wrong: list[str] = []
    for step in range(3):
        optimizer.zero_grad()
        before = ForwardContext.now()
        with kept(model) as calls:
            loss_of(step).backward()
        identities = _identities(model)
        seen = Seen()
        if way == "calls":
            run_calls(model, calls)(seen)
        elif way == "closure":
            run_closure(model, lambda step=step: loss_of(step), context=before)(seen)
        elif way == "own_backward":
            run_closure(model, _Closure(optimizer, loss_of, step), context=before)(seen)
        if way:
            assert sum(seen.calls.values()) > 0
            assert identities == _identities(model)
            table = ParameterTable.of(model)
            real = dict(zip(table.names, (one.grad for one in table.tensors), strict=True))
            wrong += differences(pieces(real), pieces(seen.gradients), f"gradients of step {step}")
        optimizer.step()
    state = state_of(model, optimizer)
    return {**state, "attributes": attributes(model), "extra": pieces(extra())}, wrong


class _Closure:
    """A closure as LBFGS wants it."""

    def __init__(self, optimizer: Any, loss_of: Callable[[int], Tensor], step: int) -> None:
        self.optimizer, self.loss_of, self.step = optimizer, loss_of, step

    def __call__(self) -> Tensor:
        self.optimizer.zero_grad()
        loss = self.loss_of(self.step)
        loss.backward()
        return loss


def attributes(model: nn.Module) -> dict[str, Any]:
    """Return the plain attributes of all modules, in a form that can be compared."""
    return {
        name: {key: _plain(value) for key, value in vars(module).items() if key not in _NOT_PLAIN}
        for name, module in model.named_modules()
    }


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, np.random.Generator):
        return str(value.bit_generator.state)
    if isinstance(value, (list, tuple, deque)):
        return [_plain(one) for one in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, dict) and all(isinstance(key, int) for key in value):
        return [_plain(one) for one in value.values()]  # hooks, under numbers that only grow
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (Tensor, np.ndarray)):
        return pieces(value)
    if isinstance(value, (str, bool, int, float, type(None))):
        return value
    if hasattr(value, "__dict__") and not callable(value) and not isinstance(value, nn.Module):
        return {key: _plain(one) for key, one in vars(value).items()}
    return type(value).__name__


def _identities(model: nn.Module) -> list[int]:
    tensors = [id(one) for one in (*model.parameters(), *model.buffers())]
    gradients = [id(one.grad) for one in model.parameters()]
    return tensors + gradients + [id(v) for m in model.modules() for v in vars(m).values()]
