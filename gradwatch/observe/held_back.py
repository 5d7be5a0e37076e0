"""HeldBack: backwards whose gradients FSDP2 keeps to itself until the last micro-batch.

With ``set_requires_gradient_sync(False)`` no parameter receives a gradient, so no arrival tells of
the micro-batch. The gradient of the model's output passes all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from gradwatch.observe.fsdp import fully_sharded


class HeldBack:
    """Tells of every backward that passes through a model's output."""

    def __init__(self, model: nn.Module, on_backward: Callable[[], None]) -> None:
        """Hangs a hook on the model.

        Args:
            model: The model.
            on_backward: Called inside the backward, before any parameter's gradient is there.
        """
        self._on_backward = on_backward
        self._handle: RemovableHandle | None = model.register_forward_hook(self._see)

    @classmethod
    def of(
        cls, model: nn.Module | Mapping[str, Tensor], on_backward: Callable[[], None]
    ) -> HeldBack | None:
        """Makes one for a model that FSDP2 shards; None for others, which need none."""
        if not isinstance(model, nn.Module) or next(fully_sharded(model), None) is None:
            return None
        # Inside a compiled call the hook would be traced, and break the graph.
        return cls(model, on_backward) if model._compiled_call_impl is None else None

    def remove(self) -> None:
        """Takes the hook off; safe to call again."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _see(self, module: nn.Module, args: Any, output: Any) -> None:
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                leaf.register_hook(self._tell)  # type: ignore[no-untyped-call]

    def _tell(self, gradient: Tensor) -> None:
        if self._handle is not None:
            self._on_backward()
