"""What is watched: a model's tensors and its optimizers, checked before the first step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from gradwatch.observe.arrivals import is_watched
from gradwatch.observe.fsdp import refuse_fsdp1, reshard
from gradwatch.observe.parameters import ParameterTable, optimizer_parameters

NOT_A_MODEL = (
    "watch(model=) got {value!r} of type {kind}. It watches a torch.nn.Module, or a mapping "
    'from names to leaf tensors: watch({{"x": x}}).'
)
NOT_A_LEAF = (
    'watch(model=) got "{name}", which is the result of an operation, so that a backward '
    "leaves no .grad in it. Pass the leaf tensors that it was computed from."
)
LAZY = (
    'watch(model=) got "{name}", a lazy parameter that has no shape yet. Run one forward of the '
    "model before watching it."
)
NOTHING_TO_WATCH = (
    "watch(model=) got {what}, in which no tensor requires a gradient: there is nothing to watch. "
    "Unfreeze a parameter (requires_grad_(True)) before watching."
)
WATCHED_ALREADY = (
    'watch() was given "{name}", which another watcher is attached to. Leave the with block of '
    "that one (or call its close()) first."
)
OVERLAPPING = (
    "watch(optimizer=) got a {optimizer} with overlap_with_ddp=True, which steps inside the "
    "reduction of the gradients, where nobody can look at them. Build it without that argument."
)
FOREIGN_PARAMETERS = (
    "{optimizer} holds {foreign} of {total} parameters that are not the model's, so its gradient "
    "norm cannot be taken over the model. Pass everything that it steps, "
    "watch(nn.ModuleList([model, ...]), optimizer), or build the optimizer after the model was "
    "moved or wrapped."
)


def parameter_table(model: nn.Module | Mapping[str, Tensor]) -> ParameterTable:
    """Lists what is to be watched.

    Args:
        model: A module, or a mapping from names to leaf tensors.

    Returns:
        The table of its tensors.

    Raises:
        TypeError: If the model, a name or a tensor is of another type.
        ValueError: If a tensor is not a leaf, none requires a gradient, or FSDP1 hides them.
    """
    if not isinstance(model, (nn.Module, Mapping)):
        raise TypeError(NOT_A_MODEL.format(value=model, kind=type(model).__name__))
    if isinstance(model, Mapping):
        for name, tensor in model.items():
            _check_entry(name, tensor)
    refuse_fsdp1(model)
    reshard(model)
    table = ParameterTable.of(model)
    for name, tensor in zip(table.names, table.tensors, strict=True):
        if is_lazy(tensor):
            raise ValueError(LAZY.format(name=name))
    if not any(tensor.requires_grad for tensor in table.tensors):
        what = type(model).__name__ if isinstance(model, nn.Module) else f"{list(model)}"
        raise ValueError(NOTHING_TO_WATCH.format(what=what))
    return table


def check_unwatched(table: ParameterTable) -> None:
    """Refuses a model that has a watcher already.

    Args:
        table: Its tensors.

    Raises:
        RuntimeError: If another watcher is attached to one of them.
    """
    for name, tensor in zip(table.names, table.tensors, strict=True):
        if is_watched(tensor):
            raise RuntimeError(WATCHED_ALREADY.format(name=name))


def optimizer_list(
    optimizer: Optimizer | Sequence[Optimizer] | None, table: ParameterTable
) -> list[Optimizer]:
    """Lists the optimizers whose steps are to be watched.

    Args:
        optimizer: One, several, or None where they are to be found at their first step.
        table: The watched tensors.

    Returns:
        The optimizers; empty for None.

    Raises:
        TypeError: If something is not an optimizer.
        ValueError: If there is none, one stands there twice, or one holds foreign parameters.
    """
    if optimizer is None:
        return []
    given = [optimizer] if isinstance(optimizer, Optimizer) else optimizer
    if isinstance(given, (str, Mapping)) or not isinstance(given, Iterable):
        raise TypeError(_not_an_optimizer(given))
    optimizers = list(given)
    if not optimizers:
        raise ValueError(
            f"watch(optimizer=) is empty, got {given!r}. Leave it out to have the optimizers found "
            "at their first step."
        )
    for position, one in enumerate(optimizers):
        if not isinstance(one, Optimizer):
            raise TypeError(_not_an_optimizer(one))
        if getattr(one, "_overlap_with_ddp", False):
            raise ValueError(OVERLAPPING.format(optimizer=type(one).__name__))
        if any(one is earlier for earlier in optimizers[:position]):
            raise ValueError(f"watch(optimizer=) holds the same {type(one).__name__} twice.")
        _check_parameters(one, table)
    return optimizers


def _check_entry(name: object, tensor: object) -> None:
    if not isinstance(name, str):
        raise TypeError(f"watch(model=) takes names that are strings, got {name!r} as a key.")
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(
            f'watch(model=) got {tensor!r} of type {type(tensor).__name__} under "{name}".'
        )
    if not tensor.is_leaf:
        raise ValueError(NOT_A_LEAF.format(name=name))


def _check_parameters(optimizer: Optimizer, table: ParameterTable) -> None:
    known = table.positions()
    parameters = optimizer_parameters(optimizer)
    foreign = sum(id(parameter) not in known for parameter in parameters)
    if foreign:
        raise ValueError(
            FOREIGN_PARAMETERS.format(
                optimizer=type(optimizer).__name__, foreign=foreign, total=len(parameters)
            )
        )


def _not_an_optimizer(value: object) -> str:
    return (
        "watch(optimizer=) must be a torch.optim.Optimizer or a sequence of them, got "
        f"{value!r} of type {type(value).__name__}."
    )
