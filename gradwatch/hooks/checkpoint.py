"""OptimizerCheckpoint: what a step may change, to undo one that was refused midway."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

_PLAIN = (bool, int, float, str, type(None))


class OptimizerCheckpoint:
    """A copy of the parameters, the state, the groups and the counters of optimizers.

    It costs the memory of weights and state, so it is made only for steps that may be refused after
    they have moved the weights: those of optimizers that evaluate a closure several times.

    Attributes:
        whole: Whether it holds weights and state, and not only counters.
    """

    def __init__(self, optimizers: Sequence[Optimizer], tensors: bool = True) -> None:
        """Makes the copy, before a step.

        Args:
            optimizers: The optimizer that is about to step, and those that it wraps.
            tensors: Whether to copy the tensors too. If not, only numbers and words: for an
                optimizer that has nothing to step with, but may count.
        """
        self.whole = tensors
        parameters = {
            id(parameter): parameter
            for one in optimizers
            for group in one.param_groups
            for parameter in group["params"]
        }
        self._values = [(p, p.detach().clone()) for p in parameters.values() if tensors]
        self._kept = [_Kept(one, tensors) for one in optimizers]

    def restore(self) -> None:
        """Restores everything: parameters and tensors of groups in place."""
        with torch.no_grad():
            for parameter, value in self._values:
                parameter.copy_(value)
            for one in self._kept:
                one.restore()


class _Kept:
    """State, groups and counters of one optimizer."""

    def __init__(self, optimizer: Optimizer, tensors: bool) -> None:
        self._optimizer = weakref.ref(optimizer)  # a step that raises leaves this object behind
        self._tensors = tensors
        self._state = {key: _copied(value, tensors) for key, value in optimizer.state.items()}
        self._names = {k: set(v) for k, v in optimizer.state.items() if isinstance(v, dict)}
        # A counter, or a rate that is found on the way, is kept in a group by some optimizers, and
        # as an attribute by others.
        self._groups = [
            (group, {name: _both(value) for name, value in group.items() if name != "params"})
            for group in optimizer.param_groups
        ]
        self._counters = {n: v for n, v in vars(optimizer).items() if isinstance(v, _PLAIN)}

    def restore(self) -> None:
        optimizer = self._optimizer()
        if optimizer is None:
            return
        # Not with load_state_dict(), which casts the state to the dtype of the parameters.
        state: dict[Any, Any] = optimizer.state
        for key in [key for key in state if key not in self._state]:
            del state[key]
        for key, saved in self._state.items():
            if not isinstance(saved, dict):
                state[key] = saved
                continue
            for name in [name for name in state[key] if name not in self._names[key]]:
                del state[key][name]
            state[key].update(saved)
        for group, values in self._groups:
            for name in [name for name in group if name != "params" and name not in values]:
                del group[name]
            for name, (value, copied) in values.items():
                group[name] = value
                if isinstance(value, Tensor):  # which a scheduler may share
                    value.copy_(copied)
        vars(optimizer).update(self._counters)


def _copied(value: Any, tensors: bool) -> Any:
    if not tensors and isinstance(value, dict):
        return {name: one for name, one in value.items() if isinstance(one, _PLAIN)}
    return copy.deepcopy(dict(value) if isinstance(value, dict) else value)


def _both(value: Any) -> tuple[Any, Any]:
    return value, value.detach().clone() if isinstance(value, Tensor) else None
