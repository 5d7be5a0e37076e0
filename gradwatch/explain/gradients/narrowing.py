"""Where a function falls back from float64 to a coarser precision."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gradwatch.explain.gradients.structures import tensors_in

_OURS = (str(Path(torch.__file__).parent), str(Path(__file__).parent))


class Narrowing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the first operation that makes coarser numbers of a float64 tensor with a gradient.

    What comes of it has steps of 1e-7 of its size, and no difference over 1e-6 means anything.
    Masks, noise and detached copies in float32 do no harm.

    Attributes:
        found: Where, in words; empty if nowhere.
    """

    def __init__(self) -> None:
        """Has found nothing."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = ""

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Runs an operation and looks at what came out."""
        result = func(*args, **(kwargs or {}))
        if not self.found and _any(args, _is_fine) and _any(result, _is_coarse):
            self.found = f"{func} {_place()}"
        return result


def _any(value: Any, is_so: Callable[[Tensor], bool]) -> bool:
    return any(is_so(tensor) for _, tensor in tensors_in(value, ""))


def _is_fine(tensor: Tensor) -> bool:
    return tensor.requires_grad and tensor.dtype in (torch.float64, torch.complex128)


def _is_coarse(tensor: Tensor) -> bool:
    wide = (torch.float64, torch.complex128)
    return (tensor.is_floating_point() or tensor.is_complex()) and tensor.dtype not in wide


def _place() -> str:
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith(_OURS):
            return f"at {Path(frame.filename).name}:{frame.lineno}: {(frame.line or '')[:80]}"
    return "inside torch"
