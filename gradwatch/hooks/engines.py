"""Engines that train a model over ranks in ways that the gradients of one rank do not show."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor

PIPELINE = (
    "The model is a stage of a pipeline (torch.distributed.pipelining): norms and events are those "
    "of this rank's stage alone, and so is the factor of clip=, which differs between the ranks. "
    "Add up the squared norms over the pipeline's ranks for the norm of the whole model."
)
DEEPSPEED = (
    "DeepSpeed averages, unscales and clips gradients where .grad does not show it: the norms are "
    "those of this rank's own gradients before that, and clip= and on_nonfinite= change nothing. "
    "Set gradient_clipping in DeepSpeed's configuration; engine.get_global_grad_norm() is the norm "
    "of the whole model."
)

# For each engine the module that defines it, the name of its class there, how to get at the part
# of the model that it trains, and what is to be said. Seen on torch 2.13 and DeepSpeed 0.19.
_ENGINES: tuple[tuple[str, str, Callable[[Any], Any], str], ...] = (
    (
        "torch.distributed.pipelining.stage",
        "_PipelineStageBase",
        lambda stage: stage.submod,
        PIPELINE,
    ),
    ("deepspeed.runtime.engine", "DeepSpeedEngine", lambda engine: engine.module, DEEPSPEED),
)


def engines_of(tensors: Iterable[Tensor]) -> list[str]:
    """Returns what is to be said about the engines that train any of some parameters."""
    # If nobody has imported an engine, none exists, and no object need be looked at.
    kinds = [
        (kind, part_of, text)
        for home, name, part_of, text in _ENGINES
        if (kind := getattr(sys.modules.get(home), name, None)) is not None
    ]
    if not kinds:
        return []
    wanted, objects = set(map(id, tensors)), gc.get_objects()
    return [
        text
        for kind, part_of, text in kinds
        if any(not wanted.isdisjoint(map(id, one)) for one in _held_by(objects, kind, part_of))
    ]


def _held_by(
    objects: Iterable[object], kind: type, part_of: Callable[[Any], Any]
) -> Iterator[Iterable[Tensor]]:
    for one in objects:
        # Not isinstance(), which reads __class__: on a proxy object this may raise an error.
        if issubclass(type(one), kind):
            part = getattr(part_of(one), "parameters", None)
            if part is not None:
                yield part()
