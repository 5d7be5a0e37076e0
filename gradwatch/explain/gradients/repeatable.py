"""Repeatable: a function of named tensors that gives the same numbers as often as it is asked."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gradwatch.explain.gradients.structures import is_continuous, map_tensors, tensors_in


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
        values = tensor.detach()
        real = torch.view_as_real(values) if values.is_complex() else values
        return cls(name, tensor, real.view(-1))

    def index(self, position: int) -> tuple[int, ...]:
        """Turns a position in ``flat`` into an index, which ends in 1 for an imaginary part."""
        shape = (*self.tensor.shape, 2) if self.tensor.is_complex() else tuple(self.tensor.shape)
        return tuple(int(i) for i in np.unravel_index(position, shape)) if shape else ()


class RandomState:
    """The state of every source of random numbers that a function may use, to start from again."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        """Takes the state.

        Args:
            tensors: Those whose devices take part besides the CPU.
        """
        devices = sorted({t.device.index for t in tensors if t.device.type == "cuda"})
        self._cuda = [(device, torch.cuda.get_rng_state(device)) for device in devices]
        self._torch = torch.get_rng_state()
        self._python = random.getstate()
        self._numpy = np.random.get_state()

    def put_back(self) -> None:
        """Makes the next random numbers those that came after the state was taken."""
        torch.set_rng_state(self._torch)
        for device, state in self._cuda:
            torch.cuda.set_rng_state(state, device)
        random.setstate(self._python)
        np.random.set_state(self._numpy)


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
        """Takes the state of the random numbers.

        Args:
            function: What is computed.
            arguments: Its positional and keyword arguments, with leaves in them.
            leaves: Those leaves and others that the function knows, parameters say.
            module: The module whose buffers are put back.
        """
        self.leaves = leaves
        self.evaluations = 0
        self.module = module
        self._function = function
        self._arguments = arguments
        tensors = [tensor for _, tensor in tensors_in(arguments, "")]
        self.random = RandomState([*tensors, *(leaf.tensor for leaf in leaves)])
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
            The places and values of its floating and complex outputs, dense.
        """
        self.evaluations += 1
        self.random.put_back()
        for part, name, saved in self._buffers:
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
        self.random.put_back()

    def _fresh_arguments(self, values: Sequence[Tensor]) -> Any:
        """Copies the arguments, so that a function may write to them, as it may in a model."""
        given = {id(leaf.tensor): value for leaf, value in zip(self.leaves, values, strict=False)}
        return map_tensors(self._arguments, lambda _, t: given.get(id(t), t).clone(), "")
