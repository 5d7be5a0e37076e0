"""Engines that train a model over ranks in ways that the gradients of one rank do not show."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from gradwatch.hooks.instances import instances_of
from gradwatch.hooks.optimizer import parameters_held

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

# For each engine the module that defines it, the name of its class there, how to get at what it
# trains (modules and optimizers), and what is to be said. Seen on torch 2.13 and DeepSpeed 0.19.
_ENGINES: tuple[tuple[str, str, Callable[[Any], Iterable[object]], str], ...] = (
    (
        "torch.distributed.pipelining.stage",
        "_PipelineStageBase",
        lambda stage: (stage.submod,),
        PIPELINE,
    ),
    (
        "deepspeed.runtime.engine",
        "DeepSpeedEngine",
        # Under ZeRO the optimizer in it steps flat copies of the weights.
        lambda engine: (engine.module, getattr(engine, "basic_optimizer", None)),
        DEEPSPEED,
    ),
)


def engines_of(tensors: Iterable[Tensor]) -> list[str]:
    """Returns what is to be said about the engines that train any of some parameters."""
    wanted = set(map(id, tensors))
    return [
        text
        for home, name, parts_of, text in _ENGINES
        if any(trains_any(wanted, parts_of, one) for one in instances_of_named([(home, name)]))
    ]


def instances_of_named(classes: Iterable[tuple[str, str]]) -> list[Any]:
    """Lists the objects of some classes, and of classes derived from them, in this process.

    Args:
        classes: For each the module that defines it, and its name there. One that nobody has
            imported has no objects, and is not imported.
    """
    kinds = {getattr(sys.modules.get(home), name, None) for home, name in classes} - {None}
    return instances_of(*(kind for kind in kinds if isinstance(kind, type)))


def trains_any(wanted: set[int], parts_of: Callable[[Any], Iterable[object]], one: object) -> bool:
    """Returns whether an object trains any of the parameters with these ids.

    Args:
        wanted: The ids.
        parts_of: Returns the modules and optimizers of the object; may raise.
        one: The object.
    """
    try:
        parts = list(parts_of(one))
    except Exception:  # it is half built, or of a version that has them elsewhere
        return False
    return any(not wanted.isdisjoint(map(id, _parameters_of(part))) for part in parts)


def _parameters_of(part: Any) -> Iterable[Tensor]:
    if isinstance(part, nn.Module):
        return part.parameters()
    return parameters_held(part) if part is not None else ()
