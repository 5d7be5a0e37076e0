"""What hangs on an optimizer: the moments around a step, and ways to change or leave out a step."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from gradwatch.measure.deferred import FloatOrDeferred, defer_copy
from gradwatch.measure.parameters import is_sharded, optimizer_parameters


class StepListener(Protocol):
    """Who is told about the steps of one optimizer."""

    def begin(self, optimizer: Optimizer, has_closure: bool) -> None:
        """A step begins; a closure, if there is one, has not run yet."""

    def gradients_ready(self, optimizer: Optimizer, loss: object) -> bool:
        """The gradients that the step will use stand: look at them, change them, and decide.

        Returns:
            Whether the optimizer may use them.
        """

    def finish(self, optimizer: Optimizer) -> None:
        """The step is over."""


Closure = Callable[[], Any]


class StepBoundary:
    """Stands around every step of one optimizer, through its own step hooks."""

    def __init__(
        self,
        optimizer: Optimizer,
        listener: StepListener,
        shield: AbstractContextManager[None],
        may_refuse: bool,
    ) -> None:
        """Registers the hooks.

        Args:
            optimizer: The optimizer.
            listener: Who is told.
            shield: What to stand inside of while it is told, and may hold its errors back.
            may_refuse: Whether the listener may refuse a step or raise; only then an optimizer
                that evaluates its closure several times is copied before the step.
        """
        self._optimizer = optimizer
        self._listener = listener
        self._shield = shield
        self._may_refuse = may_refuse
        self._hidden: list[tuple[Tensor, Tensor]] = []
        self._checkpoint: OptimizerCheckpoint | None = None
        self._refused = False
        self._handles: tuple[RemovableHandle, ...] = (
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        )

    def remove(self) -> None:
        """Removes the hooks; safe to call again."""
        for handle in self._handles:
            handle.remove()

    def _before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # Left over where the step before raised: torch runs no post-hook then.
        if self._refused:
            restore_gradients(self._hidden)
        self._refused = False
        self._checkpoint = None
        closure = _closure_of(args, kwargs) if kwargs or len(args) > 1 else None
        with self._shield:
            self._listener.begin(optimizer, closure is not None)
            if closure is None:
                self._gradients_ready(None)
        if closure is None:
            return None
        # LBFGS has moved the parameters by the time that a later evaluation turns out bad.
        if self._may_refuse and isinstance(optimizer, torch.optim.LBFGS):
            self._checkpoint = OptimizerCheckpoint(optimizer, optimizer_parameters(optimizer))
        return _with_closure(args, kwargs, self._wrap(closure))

    def _wrap(self, closure: Closure) -> Closure:
        # With a closure the backward runs inside step(), after this hook: the gradients are ready
        # only when it returns.
        last: Any = None

        def evaluate() -> Any:
            nonlocal last
            # Refused gradients are hidden. To run the user's code again would bring new ones.
            if not self._refused:
                last = closure()
                with self._shield:
                    self._gradients_ready(last)
            return last

        return evaluate

    def _gradients_ready(self, loss: object) -> None:
        try:
            self._refused = not self._listener.gradients_ready(self._optimizer, loss)
        except BaseException:
            self._restore_checkpoint()
            raise
        if self._refused:
            # Added to those hidden already: a closure may be evaluated several times in a step.
            self._hidden += hide_gradients(optimizer_parameters(self._optimizer))

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._refused:
            self._restore_checkpoint()
            restore_gradients(self._hidden)
        self._checkpoint = None
        with self._shield:
            self._listener.finish(optimizer)

    def _restore_checkpoint(self) -> None:
        if self._checkpoint is not None:
            self._checkpoint.restore()
            self._checkpoint = None


def _closure_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Closure | None:
    # args[0] is the optimizer itself: torch calls the hook with the arguments of the function.
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    return closure if callable(closure) else None


def _with_closure(
    args: tuple[Any, ...], kwargs: dict[str, Any], closure: Closure
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if "closure" in kwargs:
        return args, {**kwargs, "closure": closure}
    return (args[0], closure, *args[2:]), kwargs


class OptimizerDiscovery:
    """Looks at every optimizer of the process when it steps, once each."""

    def __init__(self, owned: set[int], on_found: Callable[[Optimizer], None]) -> None:
        """Registers torch's global optimizer-step hook.

        Args:
            owned: ``id`` of every watched parameter.
            on_found: Called before the first step of an optimizer that holds one of them; a step
                hook that it registers on the optimizer still runs for this very step.
        """
        self._owned = owned
        self._on_found = on_found
        self._seen: WeakSet[Optimizer] = WeakSet()  # no ids: a later optimizer may get the same
        self._handle: RemovableHandle = register_optimizer_step_pre_hook(self._look)

    def remove(self) -> None:
        """Removes the hook; safe to call again."""
        self._handle.remove()

    def _look(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if optimizer in self._seen:
            return
        self._seen.add(optimizer)
        if any(id(parameter) in self._owned for parameter in optimizer_parameters(optimizer)):
            self._on_found(optimizer)


def hide_gradients(parameters: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Hides the gradients from an optimizer, which then has nothing to do.

    Returns:
        What :func:`restore_gradients` takes.
    """
    # A pre-hook cannot cancel a step. Every optimizer passes over a parameter whose .grad is None,
    # moments and step count included; gradients of zero would decay the moments.
    hidden = [(p, p.grad) for p in parameters if p.grad is not None]
    for parameter, _ in hidden:
        parameter.grad = None
    return hidden


def restore_gradients(hidden: list[tuple[Tensor, Tensor]]) -> None:
    """Gives hidden gradients back, and empties the list."""
    for parameter, gradient in hidden:
        parameter.grad = gradient
    hidden.clear()


class OptimizerCheckpoint:
    """Parameters and optimizer state before a step that evaluates its closure several times.

    It costs a copy of both, so it is made for such optimizers only.
    """

    def __init__(self, optimizer: Optimizer, parameters: Sequence[Tensor]) -> None:
        """Copies the state of an optimizer that is about to step, and its parameters."""
        self._optimizer = optimizer
        self._values = [(p, p.detach().clone()) for p in parameters]
        self._state = {p: copy.deepcopy(dict(s)) for p, s in optimizer.state.items()}

    def restore(self) -> None:
        """Puts both back, in place."""
        with torch.no_grad():
            for parameter, value in self._values:
                parameter.copy_(value)
        # Not load_state_dict(), which casts state to the dtype of the parameters.
        state: dict[Any, Any] = self._optimizer.state
        for key in [key for key in state if key not in self._state]:
            del state[key]
        for key, saved in self._state.items():
            state[key].clear()
            state[key].update(saved)


def learning_rate(optimizer: Optimizer) -> FloatOrDeferred:
    """Returns the learning rate of the first parameter group; NaN where it has none."""
    groups = optimizer.param_groups
    value = groups[0].get("lr", math.nan) if groups else math.nan
    return defer_copy(value) if isinstance(value, Tensor) else float(value)


LearningRates = list[tuple[dict[str, Any], Any]]


def scale_learning_rates(optimizer: Optimizer, factor: float) -> LearningRates:
    """Multiplies the learning rates of an optimizer for one step.

    Args:
        optimizer: Its groups may hold numbers or tensors.
        factor: Positive.

    Returns:
        Groups and rates, for :func:`restore_learning_rates`.
    """
    # Put back after the step, so that rates stay what the user, or a scheduler, has made them:
    # nothing adds up, and a schedule that works them out from the last one goes on as it would.
    saved = [(group, group["lr"]) for group in optimizer.param_groups if "lr" in group]
    for group, rate in saved:
        group["lr"] = rate * factor  # a new tensor: groups and schedulers may share the old one
    return saved


def restore_learning_rates(saved: LearningRates) -> None:
    """Puts learning rates back."""
    for group, rate in saved:
        group["lr"] = rate


def carried_by(optimizer: Optimizer) -> tuple[FloatOrDeferred, FloatOrDeferred]:
    """Returns what a scaler has left to a fused optimizer, which unscales inside its step.

    Returns:
        The loss scale that the gradients still carry, 1.0 where they are true; and a number above 0
        where the scaler has asked the optimizer not to apply this step.
    """
    # For every other optimizer the scaler has unscaled the gradients already. The attributes are
    # private between GradScaler.step() and the optimizers of torch (2.4 to 2.13).
    scale = getattr(optimizer, "grad_scale", None)
    found_inf = getattr(optimizer, "found_inf", None)
    if scale is None is found_inf:
        return 1.0, 0.0
    return _number(scale, 1.0), _number(found_inf, 0.0)


def _number(value: Tensor | float | None, otherwise: float) -> FloatOrDeferred:
    if value is None:
        return otherwise
    return defer_copy(value) if isinstance(value, Tensor) else float(value)


_NOT_SET = object()


class FusedStep:
    """Has a fused optimizer scale the gradients, or leave out its step, within its own kernel.

    It sets ``grad_scale`` and ``found_inf``, as a GradScaler does, for one step.

    Attributes:
        saved: What is to be put back, by name.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        """Tries out whether the optimizer listens to the attributes."""
        self._optimizer = optimizer
        # Tried, not looked up: an optimizer that inherits from a fused one may ignore them, and
        # would then take the step with gradients that nobody clipped.
        self._listens = _is_fused(optimizer) and _listens(optimizer)
        self.saved: dict[str, Any] = {}

    @property
    def can_scale(self) -> bool:
        """Whether it would scale now."""
        return self._listens and _is_fused(self._optimizer)  # load_state_dict() can change it

    @property
    def can_skip(self) -> bool:
        """Whether it would leave a step out cleanly now."""
        return self.can_scale and not _lacks_momentum_buffer(self._optimizer)

    def scale(self, factor: float | Tensor, device: torch.device) -> None:
        """Has the step multiply the gradients.

        Args:
            factor: Number or tensor ``[]``, above 0.
            device: Where the gradients are.
        """
        if not isinstance(factor, Tensor):  # filled in on the device: a copy to it would wait
            factor = torch.full((), factor, dtype=torch.float64, device=device)
        divisor = factor.reciprocal().float()
        scale = getattr(self._optimizer, "grad_scale", None)
        # A scaler's own scale stays in it.
        self._set("grad_scale", divisor if scale is None else scale * divisor)

    def refuse(self, refusal: Tensor) -> None:
        """Has the step leave everything as it is where a flag says so.

        Args:
            refusal: Tensor ``[]``, float32, 1 to leave the step out and 0 to take it.
        """
        found = getattr(self._optimizer, "found_inf", None)
        flag = refusal if found is None else torch.maximum(found, refusal.to(found.device))
        # Adam takes this number off its step counts, and a scaler sums up several devices'.
        self._set("found_inf", flag.clamp(max=1.0))

    def restore(self) -> None:
        """Puts the attributes back as they were; does nothing where none was set."""
        for name, value in self.saved.items():
            if value is _NOT_SET:
                delattr(self._optimizer, name)
            else:
                setattr(self._optimizer, name, value)
        self.saved = {}

    def _set(self, name: str, value: Tensor) -> None:
        self.saved.setdefault(name, getattr(self._optimizer, name, _NOT_SET))
        setattr(self._optimizer, name, value)


def _is_fused(optimizer: Optimizer) -> bool:
    # The flag by which GradScaler.step() knows them. Private (torch 2.4 to 2.13).
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False)) and all(
        group.get("fused") for group in optimizer.param_groups
    )


def _lacks_momentum_buffer(optimizer: Optimizer) -> bool:
    # Fused SGD makes its momentum buffers in the first step and leaves them uninitialised where
    # that one is skipped, so there the gradients have to be hidden instead. Asked with get(), for
    # ``state`` is a defaultdict: an entry of nothing would go into the user's checkpoints.
    return isinstance(optimizer, torch.optim.SGD) and any(
        group["momentum"] != 0 and optimizer.state.get(parameter, {}).get("momentum_buffer") is None
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None
    )


@torch.no_grad()
def _listens(optimizer: Optimizer) -> bool:
    """Steps an optimizer of the same kind on two numbers, scaled, and then told not to step."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if not parameters or any(map(is_sharded, parameters)):
        return False
    device = parameters[0].device
    try:
        scaled, plain = (torch.ones(2, device=device, requires_grad=True) for _ in range(2))
        accepted = inspect.signature(type(optimizer)).parameters
        options = {name: value for name, value in optimizer.defaults.items() if name in accepted}
        options |= {"lr": 0.1, "fused": True}
        trials: list[Any] = [type(optimizer)([p], **options) for p in (scaled, plain)]
        scaled.grad, plain.grad = torch.full_like(scaled, 4.0), torch.ones_like(plain)
        trials[0].grad_scale = torch.full((), 4.0, device=device)
        for trial in trials:
            trial.step()
        if not torch.equal(scaled, plain) or torch.equal(plain, torch.ones_like(plain)):
            return False
        trials[1].found_inf = torch.ones((), device=device)
        before = plain.clone()
        trials[1].step()
        return torch.equal(plain, before)
    except Exception:  # an optimizer of another make may take other arguments, or refuse these
        return False


REFUSED = (
    "{asked} cannot be had with an optimizer that steps inside the backward{where}: the norm of "
    "all gradients is known when the backward has ended, and by then the step has been taken and "
    "the gradients are gone. Step the optimizer after the backward, or leave {argument} out; "
    "clip=ClipByValue(...) works inside a backward, and watching does."
)


def refuse_what_needs_all_gradients(asked: Mapping[str, str], where: str = "") -> None:
    """Refuses what can only be decided when every gradient is there.

    Args:
        asked: Such things that the user asked for: the argument, and how it was written.
        where: How it is known that the optimizer steps inside the backward.

    Raises:
        ValueError: If there is any.
    """
    for argument, written in asked.items():
        raise ValueError(REFUSED.format(argument=argument, asked=written, where=where))


def first_stepped_in_backward(names: Iterable[str], tensors: Iterable[Tensor]) -> str | None:
    """Finds a parameter that ``torch.distributed.optim`` has given an optimizer of its own.

    Returns:
        Its name; None where ``_apply_optimizer_in_backward`` was applied to none of them.
    """
    # That function leaves no other trace before the first backward (torch 2.4 to 2.13).
    pairs = zip(names, tensors, strict=True)
    return next((n for n, tensor in pairs if hasattr(tensor, "_in_backward_optimizers")), None)
