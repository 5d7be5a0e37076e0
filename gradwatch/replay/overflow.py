"""Where gradients became too large: finite, but of a norm beyond float32."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from gradwatch.hooks.forwards import ForwardCall
from gradwatch.record.explanation import Explanation
from gradwatch.replay.observer import Observer
from gradwatch.replay.runs import run_calls
from gradwatch.replay.search import explain_run
from gradwatch.replay.state import Model

NOT_FOUND = Explanation(origin="not_found", kind="overflow")
FIRST_SEEN = (
    "Elements above {limit:.1e} make the norm of {count:,} gradient elements infinite in float32; "
    "this is where they first appear."
)


def explain_overflow(model: Model, calls: Sequence[ForwardCall], elements: int) -> Explanation:
    """Says where elements first became so large that the norm of the gradients is infinite.

    If the sum of the squares of ``elements`` numbers is beyond float32, at least one of them is
    above a limit. The micro-batch is run again with every element above it made infinite, and the
    first operation that gives such an element is searched for, as for an Inf.

    Args:
        model: What is watched.
        calls: The forwards of a micro-batch.
        elements: Number of elements of all gradients.

    Returns:
        An explanation of kind ``"overflow"``: of an operation, an input or the output gradient;
        ``"not_found"`` if there is none.

    Raises:
        ReplayError: If the micro-batch cannot be run again.
    """
    limit = math.sqrt(torch.finfo(torch.float32).max / max(elements, 1))
    run = run_calls(model, [_saturated_call(call, limit) for call in calls])

    def saturated(observer: Observer) -> list[str]:
        # Entered before the observer, so that the observer sees what this makes of a result.
        with _Saturating(limit):
            return run(observer)

    found = explain_run(saturated)
    # A NaN is none that the training had: it was made of the infinities that are put here.
    if found.origin in ("not_found", "weights") or found.count == 0 or found.nan_count:
        return NOT_FOUND
    note = FIRST_SEEN.format(limit=limit, count=elements)
    # What is to be done about an Inf and what made it possible is not what is asked here.
    return replace(
        found, kind="overflow", made_possible_by=None, advice="", notes=(note, *found.notes)
    )


class _Saturating(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Makes each element above a limit infinite, as if the range of the dtype ended there."""

    def __init__(self, limit: float) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._limit = limit

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        with torch.no_grad():
            for one in tree_leaves(result):
                if isinstance(one, Tensor):
                    _saturate_(one, self._limit)
        return result


def _saturate_(tensor: Tensor, limit: float) -> None:
    values = tensor.detach()
    if values.layout is not torch.strided:
        values = values._values()
    if not values.is_floating_point() or values.numel() == 0:
        return
    above = values.abs() > limit
    # Views are left alone where nothing is to be done: a tensor may be expanded.
    if bool(above.any()):
        values.copy_(
            torch.where(above, torch.copysign(torch.full_like(values, math.inf), values), values)
        )


def _saturated_call(call: ForwardCall, limit: float) -> ForwardCall:
    """Returns a call whose inputs and output gradients are made infinite above the limit."""
    gradients = [[_saturated(one, limit) for one in some] for some in call.gradients]
    args, kwargs = tree_map(
        lambda one: _saturated(one, limit) if isinstance(one, Tensor) else one,
        (call.args, dict(call.kwargs)),
    )
    before, after = tree_leaves((call.args, dict(call.kwargs))), tree_leaves((args, kwargs))
    tensors = [(a, b) for a, b in zip(before, after, strict=True) if isinstance(a, Tensor)]
    versions = [
        version if old is new else new._version + version - old._version
        for (old, new), version in zip(tensors, call.versions, strict=True)
    ]
    return replace(call, args=args, kwargs=kwargs, versions=versions, gradients=gradients)


@torch.no_grad()
def _saturated(tensor: Tensor, limit: float) -> Tensor:
    if not tensor.is_floating_point() or tensor.layout is not torch.strided:
        return tensor
    if not bool((tensor.detach().abs() > limit).any()):
        return tensor
    changed = tensor.detach().clone()
    _saturate_(changed, limit)
    return changed.requires_grad_(tensor.requires_grad)
