"""Hooks on an optimizer: notices each step, and can change it or make the optimizer skip it."""

from __future__ import annotations

import inspect
import math
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from gradwatch.errors import warn_safely
from gradwatch.hooks.checkpoint import OptimizerCheckpoint
from gradwatch.hooks.snapshot import WeightSnapshot
from gradwatch.measure.deferred import (
    Deferred,
    FloatOrDeferred,
    Transfer,
    defer_copy,
    is_at_hand,
    number_or_nan,
)
from gradwatch.measure.devices import sent
from gradwatch.measure.parameters import is_sharded, optimizer_parameters

if TYPE_CHECKING:
    from gradwatch.hooks.closures import KeptClosures


class StepListener(Protocol):
    """Receives the events of each step of one optimizer."""

    stepping: weakref.ref[Optimizer] | None
    """The optimizer whose step is running: this one, or a wrapper around it; None between steps."""

    passed_over: bool
    """Whether the step is refused, but its optimizer goes on evaluating the closure: it is undone
    at its end, and these backwards belong to no window."""

    closures: KeptClosures | None
    """Where closures are kept, to be run again; None if nobody asks."""

    beyond_undo: bool
    """Whether the step has moved the weights, and nothing was kept to put them back."""

    def stands_aside(self) -> bool:
        """Returns whether the step that begins is none of the training's own: nobody is told."""

    def begin(self, optimizer: Optimizer, has_closure: bool) -> None:
        """Called when a step begins; a closure, if there is one, has not run yet."""

    def gradients_ready(self, optimizer: Optimizer, loss: object) -> bool:
        """Called when the gradients that the step will use are final; may change them in place.

        Args:
            optimizer: The optimizer that steps.
            loss: What the closure returned; None without a closure.

        Returns:
            Whether the optimizer may use the gradients; if not, the step is skipped.
        """

    def finish(self, optimizer: Optimizer) -> None:
        """Called when the step is over."""


Closure = Callable[..., Any]


class StepBoundary:
    """Tells a listener about every step of one optimizer, by means of torch's step hooks.

    It does not keep the optimizer alive.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        listener: StepListener,
        shield: AbstractContextManager[None],
        may_refuse: bool,
        wrappers: Sequence[Optimizer] = (),
    ) -> None:
        """Registers the hooks.

        Args:
            optimizer: The optimizer whose steps are reported.
            listener: Receives the events.
            shield: Context in which the listener is called; it may suppress the listener's errors.
            may_refuse: Whether the listener may refuse a step or raise. Only then is an optimizer
                that moves the weights between two evaluations of a closure copied before its steps.
            wrappers: Optimizers around this one, which have the same listener.
        """
        self._wrappers = [weakref.ref(one) for one in wrappers]
        self._optimizer = weakref.ref(optimizer)
        self._listener = listener
        self._shield = shield
        self._may_refuse = may_refuse
        self._nested = False
        self._calls_parent = False
        self._hidden: list[tuple[Tensor, Tensor]] = []
        self._checkpoint: OptimizerCheckpoint | None = None
        self._refused = False
        self._evaluations = 0
        self._moved_first = False
        self._weights: WeightSnapshot | None = None
        # None while it is not known: until the first step with a closure has shown it.
        self._evaluates_once = _evaluates_once(optimizer)
        self._handles: tuple[RemovableHandle, ...] = (
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        )

    def remove(self) -> None:
        """Removes the hooks; safe to call again."""
        for handle in self._handles:
            handle.remove()

    @property
    def is_vacant(self) -> bool:
        """Whether the optimizer is gone."""
        return self._optimizer() is None

    def let_go(self) -> None:
        """Drops what a step that has raised may have left."""
        self._hidden, self._checkpoint, self._weights = [], None, None
        self._refused = False

    def _before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # Of a wrapper and the optimizer in it, the outer step is the one that counts.
        outer = self._listener.stepping
        self._nested = outer is not None and any(outer() is one() for one in self._wrappers)
        if self._nested or self._listener.stands_aside():
            self._nested = True
            return None
        self._calls_parent = outer is not None and outer() is optimizer and _is_parents(optimizer)
        if self._calls_parent:
            return None
        # Clean up after a step that raised: torch runs no post-hook then.
        if self._refused:
            restore_gradients(self._hidden)
        self._refused = False
        self._checkpoint = None
        closure = _closure_of(args, kwargs) if kwargs or len(args) > 1 else None
        with self._shield:
            self._listener.begin(optimizer, closure is not None)
            if closure is None:
                self._gradients_ready(optimizer, None)
        if closure is None:
            return None
        self._evaluations, self._moved_first = 0, False
        if self._may_refuse and not self._evaluates_once:
            # By the time an evaluation is refused, the optimizer may have moved the parameters.
            self._checkpoint = OptimizerCheckpoint(_members(optimizer))
            self._weights = WeightSnapshot(parameters_held(optimizer))
        return _with_closure(args, kwargs, self._wrap(closure))

    def _wrap(self, closure: Closure) -> Closure:
        # With a closure the backward runs inside step(), after the pre-hook: the gradients are
        # ready only when the closure returns.
        last: Any = None

        # Optimizers that evaluate it several times may say which time it is: closure(sync=False).
        def evaluate(*args: Any, **kwargs: Any) -> Any:
            nonlocal last
            self._evaluations += 1
            if self._weights is not None and self._evaluations == 1:
                self._moved_first = self._weights.moved()
            if self._listener.passed_over:
                # The step goes on as it would have, and is undone at its end.
                return closure(*args, **kwargs)
            # Refused gradients are hidden; calling the closure again would produce new ones.
            if not self._refused:
                kept = self._listener.closures
                noted = None if kept is None else kept.begin(closure, *args, kwargs=kwargs)
                try:
                    last = closure(*args, **kwargs)
                    if kept is not None:
                        kept.end()
                    optimizer = self._optimizer()  # not kept here, as optimizers may keep a closure
                    with self._shield:
                        if optimizer is not None:
                            self._gradients_ready(optimizer, last)
                finally:
                    # Not at the end of the step, which may raise: the closure leads to the model.
                    if kept is not None:
                        kept.forget(noted)
            return last

        return evaluate

    def _gradients_ready(self, optimizer: Optimizer, loss: object) -> None:
        listener = self._listener
        if self._evaluations > 1 and self._checkpoint is None:
            listener.beyond_undo = True
        try:
            self._refused = not listener.gradients_ready(optimizer, loss)
        except BaseException:
            self._restore_checkpoint()
            raise
        if not self._refused:
            return
        if self._checkpoint is not None and not self._stops_without_gradients(optimizer):
            listener.passed_over = True
            return
        if self._checkpoint is None and not is_of_torch(optimizer):
            # It may do something even so: count, or move its weights to a mean of earlier ones.
            members = _members(optimizer)
            self._checkpoint = OptimizerCheckpoint(members, len(members) > 1)
            self._weights = WeightSnapshot(parameters_held(optimizer))
        # Appended, as a closure may be evaluated several times in one step.
        self._hidden += hide_gradients(optimizer_parameters(optimizer))

    def _stops_without_gradients(self, optimizer: Optimizer) -> bool:
        # Without a gradient at its first evaluation, LBFGS ends. In a line search it would go on
        # with the zeros that it takes for them, which some of its branches are not made for.
        return self._evaluations == 1 and type(optimizer) is torch.optim.LBFGS

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._nested:
            self._nested = False
            return
        if self._calls_parent and _is_parents(optimizer):
            return
        if self._evaluations:
            self._learn()
        if self._refused:
            whole = self._checkpoint is not None and self._checkpoint.whole
            if not whole and self._weights is not None and self._weights.moved():
                self._listener.beyond_undo = True
            self._restore_checkpoint()
            restore_gradients(self._hidden)
        self._checkpoint = self._weights = None
        with self._shield:
            self._listener.finish(optimizer)

    def _learn(self) -> None:
        """Learns from a step with a closure whether the next one must be copied."""
        if self._evaluations > 1 or self._moved_first:
            self._evaluates_once = False
        elif self._evaluates_once is None and not self._refused:
            self._evaluates_once = True
        self._evaluations = 0

    def _restore_checkpoint(self) -> None:
        if self._checkpoint is not None:
            self._checkpoint.restore()
            self._checkpoint = None


def _members(optimizer: Optimizer) -> list[Optimizer]:
    return [optimizer, *wrapped_in(optimizer)]


def _evaluates_once(optimizer: Optimizer) -> bool | None:
    """Returns whether a step evaluates its closure once, and first; None if it is not known."""
    if isinstance(optimizer, torch.optim.LBFGS):
        return False
    return True if is_of_torch(optimizer) and not wrapped_in(optimizer) else None


def is_of_torch(optimizer: Optimizer) -> bool:
    """Returns whether an optimizer is of a class of ``torch.optim`` itself, not derived from it."""
    return type(optimizer).__module__.startswith("torch.optim.")


def _is_parents(optimizer: Optimizer) -> bool:
    """Returns whether a step runs inside of the same optimizer's step; to be called by a hook.

    A class may call ``super().step()``. If its parent is an optimizer that was built somewhere in
    the process, torch has wrapped both methods, and calls the hooks in either.
    """
    here = sys._getframe(2)  # torch's wrapper, which calls the hook that calls this
    around = here.f_back
    while around is not None:
        if around.f_code is here.f_code and around.f_locals.get("self") is optimizer:
            return True
        around = around.f_back
    return False


def _closure_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Closure | None:
    # args[0] is the optimizer: torch passes the arguments of the unbound step function.
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    return closure if callable(closure) else None


def _with_closure(
    args: tuple[Any, ...], kwargs: dict[str, Any], closure: Closure
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if "closure" in kwargs:
        return args, {**kwargs, "closure": closure}
    return (args[0], closure, *args[2:]), kwargs


class OptimizerDiscovery:
    """Looks at the steps of all optimizers of the process, except those that are followed.

    Nothing of the process keeps this object alive, and it keeps no optimizer alive.
    """

    def __init__(self, on_step: Callable[[Optimizer], None]) -> None:
        """Begins to look.

        ``on_step`` is called before each step of an optimizer that is not followed. A step hook
        that it registers on the optimizer already runs for this step. It may begin and end other
        discoveries, and this one.
        """
        self.followed: dict[int, weakref.ref[Optimizer]] = {}
        self.on_step = on_step
        self._reference = weakref.ref(self)
        _ALL_STEPS.add(self._reference)

    def leave_out(self, optimizer: Optimizer) -> None:
        """Stops reporting an optimizer."""
        self.followed[id(optimizer)] = weakref.ref(optimizer)

    def end(self) -> None:
        """Ends looking, at any moment; torch's hook may stay, and does nothing."""
        _ALL_STEPS.forget(self._reference)

    def remove(self) -> None:
        """Ends looking; safe to call again."""
        _ALL_STEPS.remove(self._reference)


class _AllSteps:
    """torch's hook on the steps of all optimizers, one for everybody who looks at them.

    torch goes through the dict of these hooks while they run, and fails if it changes. So one that
    makes or ends others must not be in it by itself.
    """

    def __init__(self) -> None:
        self._lookers: list[weakref.ref[OptimizerDiscovery]] = []
        self._handle: RemovableHandle | None = None
        self._running = 0

    def add(self, looker: weakref.ref[OptimizerDiscovery]) -> None:
        self._lookers = [*(one for one in self._lookers if one() is not None), looker]
        if self._handle is None:
            self._handle = register_optimizer_step_pre_hook(self._look)

    def forget(self, looker: weakref.ref[OptimizerDiscovery]) -> bool:
        """Takes one out; returns whether it was there."""
        before = self._lookers
        self._lookers = [one for one in before if one is not looker and one() is not None]
        return any(one is looker for one in before)

    def remove(self, looker: weakref.ref[OptimizerDiscovery]) -> None:
        known = self.forget(looker)
        if known and not self._lookers and self._handle is not None and not self._running:
            self._handle.remove()
            self._handle = None

    def _look(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for one in tuple(self._lookers):
            looker = one()
            known = None if looker is None else looker.followed.get(id(optimizer))
            # Another optimizer, which is gone, may have had its id before.
            if looker is not None and (known is None or known() is not optimizer):
                self._running += 1
                try:
                    looker.on_step(optimizer)
                finally:
                    self._running -= 1


_ALL_STEPS = _AllSteps()


UNHOOKED = (
    "watch(optimizer=) got a {optimizer}, on which torch runs no step hooks, as its class does not "
    "call super().__init__(), and in which no optimizer was found that it steps. Pass the "
    "optimizer that changes the weights, or leave the argument out to have it found."
)


def wrapped_in(optimizer: Any) -> list[Optimizer]:
    """Lists the optimizers that an object has as attributes, directly or one in the other.

    Wrappers such as SAM, Lookahead, Accelerate's ``AcceleratedOptimizer`` and Opacus'
    ``DPOptimizer`` hold the optimizer that they step.
    """
    found: list[Optimizer] = []
    waiting = [optimizer]
    while waiting:
        for value in list(getattr(waiting.pop(), "__dict__", {}).values()):
            if isinstance(value, Optimizer) and not any(
                value is one for one in (optimizer, *found)
            ):
                found.append(value)
                waiting.append(value)
    return found


def is_wrapper(value: Any) -> bool:
    """Returns whether an object that is no optimizer wraps one: it steps and holds one."""
    # A learning rate scheduler holds an optimizer too, but has no zero_grad().
    methods = ("step", "zero_grad")
    return bool(wrapped_in(value)) and all(callable(getattr(value, name, None)) for name in methods)


def stepped_by(optimizer: Any) -> list[Optimizer]:
    """Lists the optimizers whose steps are those of an optimizer: itself, and those that it wraps.

    Only those on which torch runs step hooks, and that hold all of its parameters; outermost first.
    """
    inside = wrapped_in(optimizer)
    own = {id(parameter) for parameter in parameters_held(optimizer)}
    whole = [one for one in inside if own.issubset(map(id, optimizer_parameters(one)))]
    return [one for one in (optimizer, *whole) if _runs_hooks(one)]


def parts_of(optimizer: Any) -> list[Optimizer]:
    """Lists the optimizers in a wrapper that hold different parameters, each with its own steps.

    Raises:
        ValueError: If no optimizer is found whose steps could be followed.
    """
    parts = [one for one in wrapped_in(optimizer) if _runs_hooks(one) and optimizer_parameters(one)]
    held = [id(parameter) for one in parts for parameter in optimizer_parameters(one)]
    if not parts or len(set(held)) < len(held):
        raise ValueError(UNHOOKED.format(optimizer=type(optimizer).__name__))
    return parts


def parameters_held(optimizer: Any) -> list[Tensor]:
    """Lists the parameters of an optimizer, or of those in a wrapper without parameter groups."""
    if getattr(optimizer, "param_groups", None):
        return optimizer_parameters(optimizer)
    return [tensor for one in wrapped_in(optimizer) for tensor in optimizer_parameters(one)]


def _runs_hooks(optimizer: Any) -> bool:
    # Optimizer.__init__() makes the dicts of hooks and wraps step(), once for each class (private,
    # torch 2.4 to 2.13). A class that does not call it may make the dicts by itself.
    hooks = getattr(optimizer, "_optimizer_step_pre_hooks", None)
    # A plain dict cannot be referred to weakly, so torch can register nothing in it.
    takes_hooks = hooks is not None and type(hooks).__weakrefoffset__ != 0
    return takes_hooks and getattr(getattr(type(optimizer), "step", None), "hooked", False)


def hide_gradients(parameters: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Sets ``.grad`` to None, so that an optimizer has nothing to update.

    Returns:
        The parameters and their gradients, for :func:`restore_gradients`.
    """
    # A pre-hook cannot cancel a step. But every optimizer leaves a parameter whose .grad is None
    # alone, with its moments and step count. Gradients of zero would still decay the moments.
    hidden = [(p, p.grad) for p in parameters if p.grad is not None]
    for parameter, _ in hidden:
        parameter.grad = None
    return hidden


def restore_gradients(hidden: list[tuple[Tensor, Tensor]]) -> None:
    """Restores hidden gradients, and empties the list."""
    for parameter, gradient in hidden:
        parameter.grad = gradient
    hidden.clear()


def learning_rate(optimizer: Optimizer) -> FloatOrDeferred:
    """Returns the learning rate of the first parameter group; NaN if it has none."""
    groups = optimizer.param_groups
    rate = groups[0].get("lr") if groups else None
    return rate if type(rate) is float else number_or_nan(rate)


def has_no_rate(optimizer: Optimizer) -> bool:
    """Returns whether the learning rate of each parameter group is known to be 0; never waits."""
    rates = [group.get("lr") for group in optimizer.param_groups]
    return bool(rates) and all(map(_is_zero, rates))


def _is_zero(rate: Any) -> bool:
    if isinstance(rate, Tensor):
        return is_at_hand(rate) and not bool(rate.any())
    return number_or_nan(rate) == 0


def group_learning_rates(optimizer: Optimizer) -> list[FloatOrDeferred]:
    """Returns the learning rate of each parameter group; NaN where a group has none."""
    return [number_or_nan(group.get("lr")) for group in optimizer.param_groups]


def group_names(optimizer: Optimizer) -> list[str | int]:
    """Names each parameter group: its key ``"name"``, or else its index; no name occurs twice."""
    names: list[str | int] = []
    for index, group in enumerate(optimizer.param_groups):
        name: Any = group.get("name")
        given = isinstance(name, str) and name.strip() and name not in names
        names.append(name if given else index)
    return names


LearningRates = list[tuple[dict[str, Any], Any]]


def scale_learning_rates(optimizer: Optimizer, factor: float) -> LearningRates:
    """Multiplies the learning rates of an optimizer, numbers or tensors, for one step.

    A rate that is neither is left as it is: the optimizer finds its rate by itself.

    Returns:
        The parameter groups and their original rates, for :func:`restore_learning_rates`.
    """
    # The rates are restored after the step. Otherwise the factors would accumulate, and a scheduler
    # that computes the next rate from the last one would go wrong.
    saved = [(g, g["lr"]) for g in optimizer.param_groups if _can_be_scaled(g.get("lr"))]
    for group, rate in saved:
        # Not in place: groups and schedulers may share the tensor.
        group["lr"] = rate * factor if isinstance(rate, Tensor) else float(rate) * factor
    return saved


def _can_be_scaled(rate: object) -> bool:
    if isinstance(rate, Tensor):
        return rate.is_floating_point() or rate.is_complex()
    number = number_or_nan(rate)
    return isinstance(number, float) and not math.isnan(number)


def unscalable_rates(optimizer: Optimizer) -> list[Any]:
    """Lists the learning rates of an optimizer that no factor can be applied to."""
    rates = [group.get("lr") for group in optimizer.param_groups]
    return [rate for rate in rates if not _can_be_scaled(rate)]


def restore_learning_rates(saved: LearningRates) -> None:
    """Restores the learning rates that :func:`scale_learning_rates` has changed."""
    for group, rate in saved:
        group["lr"] = rate


def carried_by(optimizer: Optimizer | None) -> tuple[FloatOrDeferred, FloatOrDeferred]:
    """Returns what a GradScaler has left to a fused optimizer, which unscales inside its step.

    Returns:
        The loss scale by which the gradients are still multiplied, 1.0 if there is none; and a
        number above 0 if the scaler has found an overflow, so that the optimizer must skip the
        step.
    """
    # For every other optimizer the scaler unscales the gradients before the step. The attributes
    # are a private protocol between GradScaler.step() and torch's optimizers (torch 2.4 to 2.13).
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
PASSED_OVER = (
    "The fused kernel of {kind} passes over grad_scale and found_inf on this device, so the steps "
    "so far were neither clipped nor skipped. From now on gradwatch does both before the step."
)


class FusedStep:
    """Makes a fused optimizer scale the gradients, or skip its step, inside its own kernel.

    It sets the attributes ``grad_scale`` and ``found_inf`` for one step, as a GradScaler does: the
    kernel divides the gradients by ``grad_scale``, and does nothing if ``found_inf`` is 1. This
    saves the pass over memory that a clip would cost, and the wait that a decision on the host
    would cost.

    Attributes:
        saved: The original values of the attributes that were set, by name.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        """Tries out whether the optimizer obeys the attributes; the trial steps a copy of it."""
        self._optimizer = weakref.ref(optimizer)
        # The class alone does not tell: a subclass of a fused optimizer may ignore the attributes,
        # and would then step with gradients that were never clipped.
        obeyed = _obeyed(optimizer) if _is_fused(optimizer) else None
        self._listens = obeyed is not None
        self._verdict = None if obeyed is None else Deferred(obeyed)
        self._transfer: Transfer | None = None
        if self._verdict is not None and not self._verdict.at_hand and _is_trusted(optimizer):
            self._transfer = Transfer([self._verdict])
        elif self._verdict is not None:
            self._listens = self._verdict.value() > 0
        self.saved: dict[str, Any] = {}

    @property
    def can_scale(self) -> bool:
        """Whether the optimizer can scale the gradients in its next step."""
        optimizer = self._optimizer()
        if self._transfer is not None and self._transfer.arrived():
            self._transfer = None
            self._listens = self._verdict is not None and self._verdict.value() > 0
            if not self._listens:
                warn_safely(PASSED_OVER.format(kind=type(optimizer).__name__))
        if not self._listens or optimizer is None:
            return False
        # Asked anew, as load_state_dict() can change it, and model.to() where the parameters are.
        return _is_fused(optimizer) and not _reaches_cpu_from_elsewhere(optimizer)

    @property
    def can_skip(self) -> bool:
        """Whether the optimizer can skip its next step without leaving a trace."""
        optimizer = self._optimizer()
        lacks = optimizer is None or _lacks_momentum_buffer(optimizer)
        return self.can_scale and not lacks

    def scale(self, factor: float | Tensor, device: torch.device) -> None:
        """Makes the next step multiply the gradients by a factor.

        Args:
            factor: Number or tensor ``[]``, above 0.
            device: The device of the gradients.
        """
        if isinstance(factor, Tensor):
            # A step on the CPU would not wait for a factor on an accelerator.
            divisor = sent(factor, device).reciprocal().float()
        else:  # full() fills it on the device; a copy would wait
            inverse = 1.0 / factor
            if inverse > torch.finfo(torch.float32).max:  # which full() refuses
                inverse = math.inf
            divisor = torch.full((), inverse, dtype=torch.float32, device=device)
        scale = getattr(self._optimizer(), "grad_scale", None)
        # If a scaler has set its own scale, the kernel must divide by both.
        self._set("grad_scale", divisor if scale is None else scale * sent(divisor, scale.device))

    def refuse(self, refusal: Tensor) -> None:
        """Makes the optimizer skip its next step if a flag on the device is set.

        Args:
            refusal: Tensor ``[]``, float32: 1 to skip the step and 0 to take it.
        """
        found = getattr(self._optimizer(), "found_inf", None)
        flag = refusal if found is None else torch.maximum(found, sent(refusal, found.device))
        # Adam subtracts this number from its step counts, so it must not exceed 1; a scaler's own
        # found_inf may, as it is a sum over devices.
        self._set("found_inf", flag.clamp(max=1.0))

    def restore(self) -> None:
        """Restores the attributes; does nothing if none was set."""
        optimizer = self._optimizer()
        for name, value in self.saved.items() if optimizer is not None else ():
            if value is _NOT_SET:
                delattr(optimizer, name)
            else:
                setattr(optimizer, name, value)
        self.saved = {}

    def _set(self, name: str, value: Tensor) -> None:
        optimizer = self._optimizer()
        self.saved.setdefault(name, getattr(optimizer, name, _NOT_SET))
        setattr(optimizer, name, value)


def _is_fused(optimizer: Optimizer) -> bool:
    # The private flag by which GradScaler.step() recognizes them (torch 2.4 to 2.13).
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False)) and all(
        group.get("fused") for group in optimizer.param_groups
    )


def _reaches_cpu_from_elsewhere(optimizer: Optimizer) -> bool:
    # A fused step sends both attributes to the devices of its parameters. Between accelerators that
    # is in the order of their streams. On the CPU they are read before they have arrived there, as
    # nothing waits for the copy (torch 2.4 to 2.13).
    on_cpu = set(map(attrgetter("is_cpu"), optimizer_parameters(optimizer)))
    return len(on_cpu) > 1


def _lacks_momentum_buffer(optimizer: Optimizer) -> bool:
    # Fused SGD allocates its momentum buffers in the first step, and leaves them uninitialized if
    # that step is skipped. So its first step is skipped by hiding the gradients instead. Read with
    # get(), as ``state`` is a defaultdict: indexing would put empty entries into the user's
    # checkpoints.
    return isinstance(optimizer, torch.optim.SGD) and any(
        group.get("momentum") != 0
        and optimizer.state.get(parameter, {}).get("momentum_buffer") is None
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None
    )


def _is_trusted(optimizer: Optimizer) -> bool:
    """Returns whether an optimizer is taken to obey the attributes until its trial is read.

    A ``GradScaler`` relies on it, too, for the optimizers of torch itself.
    """
    # The kernels for Apple's MPS passed over both attributes until 2026 (torch 2.4 to 2.12).
    own = type(optimizer) in _FUSED
    return own and not any(p.device.type == "mps" for p in optimizer_parameters(optimizer))


_FUSED = {torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad}


@torch.no_grad()
def _obeyed(optimizer: Optimizer) -> Tensor | None:
    """Tries out whether an optimizer of the same class obeys the attributes; waits for nothing.

    One trial steps with gradients of 4 and a ``grad_scale`` of 4, the other with gradients of 1:
    both must arrive at the same parameters. Then the second must not move with ``found_inf`` 1.

    Returns:
        Tensor ``[]``, float32, on the device of the parameters: 1 if it does; None if it cannot be
        tried out.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if not parameters or any(map(is_sharded, parameters)):
        return None
    device = parameters[0].device
    _trial.under_way = True
    try:
        like = {"dtype": torch.float32, "device": device}
        scaled, plain = (torch.ones(2, requires_grad=True, **like) for _ in range(2))
        accepted = inspect.signature(type(optimizer)).parameters
        options = {name: value for name, value in optimizer.defaults.items() if name in accepted}
        options |= {"lr": 0.1, "fused": True}
        trials: list[Any] = [type(optimizer)([p], **options) for p in (scaled, plain)]
        scaled.grad, plain.grad = torch.full_like(scaled, 4.0), torch.ones_like(plain)
        trials[0].grad_scale = torch.full((), 4.0, **like)
        for trial in trials:
            trial.step()
        before = plain.clone()
        trials[1].found_inf = torch.ones((), **like)
        trials[1].step()
        obeyed = (scaled == before).all() & (before != 1).any() & (plain == before).all()
        return obeyed.float()
    except Exception:  # an optimizer not from torch may take other arguments, or refuse these
        return None
    finally:
        _trial.under_way = False


_trial = threading.local()


def is_trial() -> bool:
    """Returns whether the optimizer that this thread is building is one of gradwatch's trials."""
    return getattr(_trial, "under_way", False)


REFUSED = (
    "{asked} cannot be had with an optimizer that steps inside the backward{where}: the norm of "
    "all gradients is known when the backward has ended, and by then the step has been taken and "
    "the gradients are gone. Step the optimizer after the backward, or leave {argument} out; "
    "clip=ClipByValue(...) works inside a backward, and so does watching."
)


def refuse_what_needs_all_gradients(asked: Mapping[str, str], where: str = "") -> None:
    """Refuses options that need every gradient, for an optimizer that steps inside the backward.

    Args:
        asked: The options of this kind that the user has set: argument name, and the argument as
            the user wrote it.
        where: Words for the error on how this is known, such as ``", as SGD does"``.

    Raises:
        ValueError: If ``asked`` is not empty.
    """
    for argument, written in asked.items():
        raise ValueError(REFUSED.format(argument=argument, asked=written, where=where))


def first_stepped_in_backward(names: Iterable[str], tensors: Iterable[Tensor]) -> str | None:
    """Finds a parameter to which torch's ``_apply_optimizer_in_backward`` was applied.

    Returns:
        The name of the first such parameter; None if there is none.
    """
    # The attribute is all that this function leaves behind before the first backward (torch 2.4
    # to 2.13).
    pairs = zip(names, tensors, strict=True)
    return next((n for n, tensor in pairs if hasattr(tensor, "_in_backward_optimizers")), None)
