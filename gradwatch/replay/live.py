"""A micro-batch that was run again and whose graph is alive, for several backwards through it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode


class BatchSeen(NamedTuple):
    """The batch that a recurrent or an attention layer was given.

    Attributes:
        size: Number of examples.
        outermost: Whether examples lie one after another in memory, rather than time steps.
    """

    size: int
    outermost: bool


@dataclass(frozen=True, slots=True)
class LiveGraph:
    """What a forward has left, with its graph.

    Attributes:
        outputs: Its outputs that a gradient arrived at.
        gradients: The gradient that its backward starts from at each of them.
        parameters: The leaves that the forward computed with, by the name of the parameter: copies,
            whose ``.grad`` a backward may write to.
        input_shape: Shape of the first tensor that the forward was given; empty if not known.
        batches: What :class:`Kernels` has seen.
    """

    outputs: Sequence[Tensor]
    gradients: Sequence[Tensor]
    parameters: Mapping[str, Tensor]
    input_shape: tuple[int, ...] = ()
    batches: Sequence[BatchSeen] = ()


class Kernels(TorchFunctionMode):
    """Makes a forward one that can be differentiated twice, and looks where its batch is.

    It must be entered for the backwards too: a checkpoint runs its part of the forward there.

    Attributes:
        batches: What recurrent and attention layers were given as a batch, in that order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[BatchSeen] = []
        self._attention_in_parts = False

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Calls the function, some of them with another kernel."""
        kwargs = kwargs or {}
        if function in _RECURRENT:
            self._note_recurrent(args)
        elif function is F.multi_head_attention_forward:
            self._note(args[0], 1)
        with sdpa_kernel(SDPBackend.MATH) if self._in_parts(function, args, kwargs) else _AS_IS:
            return function(*args, **kwargs)

    def _in_parts(self, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether attention is to be computed by operations that can be differentiated twice."""
        if function is torch.autograd.grad:
            # torch leaves the mode for it. A checkpoint then needs the kernel of its forward.
            return self._attention_in_parts
        if function not in _ATTENTION:
            return False
        # Dropout would draw other numbers in another kernel: it would be another gradient.
        dropout = _argument(args, kwargs, _ATTENTION[function], "dropout_p")
        in_parts = dropout == 0.0 or not kwargs.get("training", True)
        self._attention_in_parts = in_parts
        return in_parts

    def _note_recurrent(self, args: tuple[Any, ...]) -> None:
        # Packed sequences have another signature, in which the second argument is a tensor of
        # lengths and there is no batch dimension to see.
        if len(args) == _RECURRENT_ARGUMENTS and isinstance(args[8], bool):
            self._note(args[0], 0 if args[8] else 1)

    def _note(self, batch: Any, dim: int) -> None:
        if isinstance(batch, Tensor) and batch.dim() == 3:
            outermost = batch.stride(dim) >= batch.stride(1 - dim)
            self.batches.append(BatchSeen(batch.shape[dim], outermost))


_AS_IS = nullcontext()
_RECURRENT = frozenset({torch._VF.lstm, torch._VF.gru, torch._VF.rnn_tanh, torch._VF.rnn_relu})
_RECURRENT_ARGUMENTS = 9
_ATTENTION = {F.scaled_dot_product_attention: 4, F.multi_head_attention_forward: 10}
"""Functions of attention, and which of their arguments is the dropout."""


def _argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], index: int, name: str) -> Any:
    return args[index] if len(args) > index else kwargs.get(name, 0.0)
