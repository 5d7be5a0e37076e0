"""explain(): where the gradients of one forward and backward go bad, without a watcher."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from gradwatch.checks import described
from gradwatch.pickles import stable_name
from gradwatch.record.explanation import Explanation
from gradwatch.replay.runs import run_function
from gradwatch.replay.search import explain_run
from gradwatch.replay.stand_ins import ReplayError

NOT_A_MODULE = (
    "explain(model=) must be a torch.nn.Module, got {value}. Write gradwatch.explain(model, x, "
    "loss=lambda output: criterion(output, y))."
)
NOT_A_LOSS = (
    "explain(loss=) must be a function of the model's output, got {value}. Write "
    "loss=lambda output: criterion(output, y)."
)


@stable_name
def explain(
    model: nn.Module,
    *args: Any,
    loss: Callable[[Any], Tensor] | None = None,
    **kwargs: Any,
) -> Explanation:
    """Runs a model forward and backward, and says where its gradients go bad, to the line.

    Every operation is looked at: the first one is named whose result is NaN or infinite although
    what it was given is not, in the forward or in the backward, with what made that possible. The
    model, its gradients, the arguments and all random states stay as they are.

    Args:
        model: The module to call.
        args: Its arguments.
        loss: Maps the model's output to the loss, whose backward is run. Left out, the output is
            the loss, or has it as its attribute or item ``loss``; an output without a loss is
            differentiated from a gradient of ones.
        kwargs: Its keyword arguments.

    Returns:
        The explanation. Its ``origin`` is ``"not_found"`` if everything was finite, or if the model
        cannot be run so (``notes`` says why): sharded or scripted, for example.

    Raises:
        TypeError: If the model is no module, or the loss no function.
        Exception: What the model or the loss raises.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 2)
        >>> found = explain(model, torch.zeros(3, 2), loss=lambda out: (out - out).sqrt().sum())
        >>> found.operation, found.phase, found.examples
        ('sqrt', 'backward', (0, 1, 2))
    """
    if not isinstance(model, nn.Module):
        raise TypeError(NOT_A_MODULE.format(value=described(model)))
    if loss is not None and not callable(loss):
        raise TypeError(NOT_A_LOSS.format(value=described(loss)))
    frame = sys._getframe(1)
    caller = frame.f_code.co_filename, frame.f_lineno
    try:
        return explain_run(run_function(model, args, kwargs, loss, caller), known_bad=False)
    except ReplayError as error:
        if error.__cause__ is not None:
            raise error.__cause__ from None
        return Explanation(origin="not_found", notes=(str(error),))
