"""The trainings that the checks watch: a small network, and a model of many small parameters."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import gradwatch
from tests.gpu.place import Count, Place, adamw

ALL = ("max", "mean", "std", "zeros", "weight_norm", "update_ratio")
"""All statistics besides the norm."""

Options = Mapping[str, Any]


def net(device: torch.device | str, dtype: torch.dtype = torch.float32, width: int = 64) -> Any:
    """Returns a network of four blocks and a head; the same one whenever asked for."""
    torch.manual_seed(0)
    parts: list[nn.Module] = []
    for _ in range(4):
        parts += [nn.Linear(width, width), nn.LayerNorm(width), nn.Tanh()]
    return nn.Sequential(*parts, nn.Linear(width, 1)).to(dtype).to(device)


def batch(
    step: int, device: torch.device | str, dtype: torch.dtype = torch.float32, width: int = 64
) -> Tensor:
    """Returns the batch of a step: the same one whenever asked for."""
    generator = torch.Generator(device="cpu").manual_seed(step)
    x = torch.randn(32, width, generator=generator, device="cpu")
    return x.to(dtype).to(device)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    """Returns the loss ``[]`` of a batch."""
    target = x.float().sum(1, keepdim=True) / 8
    return (model(x).float() - target).square().mean()


@dataclass
class Training:
    """A training of :func:`net`.

    Attributes:
        options: Those of ``gradwatch.watch``; None trains unwatched.
        make: Makes the optimizer.
        steps: How many steps.
        micro: Micro-batches of a step.
        managed: Whether ``watcher.backward()`` and ``watcher.step()`` are used.
        clip: The limit of a clip of the loop's own; None for none.
        poisoned: Steps whose loss is NaN.
        left_out: Steps that are not taken.
        before_step: Called with the number of a step before the optimizer steps.
        after: Called with the watcher and the number of a step after it.
    """

    options: Options | None
    make: Callable[[Any], Optimizer] = adamw
    steps: int = 8
    micro: int = 1
    managed: bool = False
    clip: float | None = None
    poisoned: Collection[int] = ()
    left_out: Collection[int] = ()
    before_step: Callable[[int], None] | None = None
    after: Callable[[Any, int], None] | None = None
    watcher: Any = field(init=False, default=None)
    optimizer: Any = field(init=False, default=None)

    def run(self, device: torch.device | str) -> Training:
        """Trains on a device from the same start, and returns itself."""
        model = net(device)
        parameters = list(model.parameters())
        self.optimizer = self.make(parameters)
        if self.options is not None:
            options = copy.deepcopy(dict(self.options))
            self.watcher = gradwatch.watch(model, self.optimizer, **options).attach()
        try:
            for step in range(self.steps):
                if step not in self.left_out:
                    self._step(model, step, device)
        finally:
            if self.watcher is not None:
                self.watcher.close()
        self.weights = [p.detach().cpu() for p in parameters]
        return self

    def _step(self, model: nn.Module, step: int, device: torch.device | str) -> None:
        for part in range(self.micro):
            factor = math.nan if step in self.poisoned else 1.0
            loss = loss_of(model, batch(1000 * part + step, device)) * factor
            if self.managed:
                self.watcher.backward(loss)
                self.watcher.step()
            else:
                loss.backward()
        if self.managed:
            return
        if self.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), self.clip)
        if self.before_step is not None:
            self.before_step(step)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.after is not None:
            self.after(self.watcher, step)

    @property
    def norms(self) -> list[float]:
        """The total norm of every step."""
        return self.watcher.history.steps()["grad_norm"].tolist()

    @property
    def outcomes(self) -> list[str]:
        """What became of every step."""
        return list(self.watcher.history.steps()["outcome"])

    @property
    def state(self) -> list[Tensor]:
        """The tensors of the optimizer's state, on the host."""
        states = self.optimizer.state.values()
        return [t.cpu() for one in states for t in one.values() if isinstance(t, Tensor)]


@dataclass
class Many:
    """A training of many small parameters, to count and to time its steps.

    Attributes:
        place: Where it runs.
        number: How many parameters; of each 64 elements on a CPU, 4,096 on a GPU.
        options: Those of ``gradwatch.watch``; None trains unwatched.
        make: Makes the optimizer.
        dtypes: The dtypes of the parameters, in turns.
        micro: Micro-batches of a step.
        managed: Whether ``watcher.backward()`` and ``watcher.step()`` are used.
        clip: The limit of a clip of the loop's own; None for none.
        scaled: Whether a ``GradScaler`` is used.
    """

    place: Place
    number: int
    options: Options | None
    make: Callable[[Any], Optimizer] = adamw
    dtypes: Sequence[torch.dtype] = (torch.float32,)
    micro: int = 1
    managed: bool = False
    clip: float | None = None
    scaled: bool = False
    warm_up: int = (
        11  # gradients are looked at twice in steps 1, 2, 4, 8, and until that has arrived
    )

    def __post_init__(self) -> None:
        """Builds the training, and runs it past the steps in which gradients are looked at twice."""
        size, device = (64 if self.place.small else 4096), self.place.device
        self.tensors = {
            f"p{i}": torch.full(
                (size,), 0.1, device=device, dtype=self.dtypes[i % len(self.dtypes)]
            ).requires_grad_()
            for i in range(self.number)
        }
        self._by_dtype = [
            [t for t in self.tensors.values() if t.dtype is dtype] for dtype in self.dtypes
        ]
        self._unit = torch.ones((), device=device)
        self.optimizer = self.make(list(self.tensors.values()))
        self._scaler = torch.amp.GradScaler(device.type, init_scale=8.0) if self.scaled else None
        self.watcher: Any = None
        if self.options is not None:
            options = copy.copy(dict(self.options))  # not deep: sinks are read later
            if self._scaler is not None:
                options["scaler"] = self._scaler
            watched = gradwatch.watch(self.tensors, self.optimizer, **options)
            self.watcher = watched.attach()
        for _ in range(self.warm_up):
            self.step()
        self.place.synchronize()

    def _loss(self) -> Tensor:
        norms = [torch.stack(torch._foreach_norm(part)).float().sum() for part in self._by_dtype]
        return sum(norms[1:], norms[0]) * self._unit

    def step(self) -> None:
        """Takes one step."""
        for _ in range(self.micro):
            loss = self._loss()
            if self.managed and self.watcher is not None:
                self.watcher.backward(loss)
                self.watcher.step()
            elif self._scaler is not None:
                self._scaler.scale(loss).backward()
            else:
                loss.backward()
        if self.managed and self.watcher is not None:
            return
        if self.clip is not None:
            nn.utils.clip_grad_norm_(self.tensors.values(), self.clip)
        if self._scaler is not None:
            self._scaler.step(self.optimizer)
            self._scaler.update()
        else:
            self.optimizer.step()
        self.optimizer.zero_grad()

    def close(self) -> None:
        """Ends the watching."""
        if self.watcher is not None:
            self.watcher.close()

    def counted(self, steps: int = 4) -> Count:
        """Returns the counts of a step, as the mean over some, and ends the watching."""
        with self.place.counting() as count:
            for _ in range(steps):
                self.step()
        self.close()
        return count / steps


_plain: dict[Any, Count] = {}


def added(place: Place, number: int, options: Options, **how: Any) -> Count:
    """Returns what watching adds to the counts of a step of :class:`Many`."""
    with place.late():
        watched = Many(place, number, options, **how).counted()
    key = (number, *sorted(how.items(), key=str))
    if key not in _plain:
        _plain[key] = Many(place, number, None, **how).counted()
    return watched - _plain[key]


def equal(left: Sequence[Tensor], right: Sequence[Tensor]) -> bool:
    """Returns whether tensors are the same, bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def apart(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    """Returns the largest difference between the elements of tensors."""
    pairs = zip(left, right, strict=True)
    return max((a.double() - b.double()).abs().max().item() for a, b in pairs)


def relative(got: Sequence[float], expected: Sequence[float]) -> float:
    """Returns the largest relative difference; Inf if one is NaN alone, or the lengths differ."""
    if len(got) != len(expected):
        return math.inf
    errors = [0.0]
    for a, b in zip(got, expected, strict=True):
        if math.isnan(a) or math.isnan(b):
            errors.append(0.0 if math.isnan(a) and math.isnan(b) else math.inf)
        elif a != b:
            errors.append(abs(a - b) / max(abs(b), 1e-30))
    return max(errors)
