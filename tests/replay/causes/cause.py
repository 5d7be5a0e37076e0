"""What a cause of a NaN or Inf is: a training that has it, and what must be said of it."""

import inspect
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

CAUSES: list["Cause"] = []
"""All of them, in the order of their files."""


class Training:
    """A model, one micro-batch for it, and the loss as a function of its output."""

    def __init__(self, model: nn.Module, *args: Any, loss: Any = None, **kwargs: Any) -> None:
        self.model, self.args, self.loss, self.kwargs = model, args, loss, kwargs

    def value(self) -> Tensor:
        """Run the forward, and return the loss."""
        output = self.model(*self.args, **self.kwargs)
        return output if self.loss is None else self.loss(output)


@dataclass
class Cause:
    """What must be said; attributes that are None are not looked at."""

    make: Callable[[], Training]
    operation: str = ""
    origin: str = "operation"
    phase: str | None = None
    module: str | None = None
    examples: tuple[int, ...] | None = None
    argument: str = ""
    parameter: str = ""
    file: str = ""
    lines: dict[str, int] = field(default_factory=dict)
    loop: str | None = None

    @property
    def name(self) -> str:
        """Name of the function that makes the training."""
        return self.make.__name__

    def begin(self) -> Training:
        """Return the training, the same at every call, with the same random states."""
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        return self.make()


def cause(operation: str = "", *, at: Any = None, **expected: Any) -> Callable[..., Any]:
    """Add the training that a function makes to `CAUSES`.

    The lines are those of the function, or of `at`, that end in `# <- born` and `# <- possible`:
    that of the operation, and that of what made it possible. `loop` is the origin that a plain loop
    must find; those without are not tried there.
    """

    def add(make: Callable[[], Training]) -> Callable[[], Training]:
        lines = dict(_marked(at or make))
        CAUSES.append(
            Cause(make, operation, file=inspect.getfile(at or make), lines=lines, **expected)
        )
        return make

    return add


def _marked(code: Any) -> Iterator[tuple[str, int]]:
    source, first = inspect.getsourcelines(code)
    for number, text in enumerate(source, first):
        _, mark, word = text.rstrip().rpartition("# <- ")
        if mark:
            yield word, number


class Net(nn.Module):
    """A linear layer `fc` beside the given modules, and a forward that is given as a function."""

    def __init__(self, forward: Callable[..., Any], **modules: nn.Module) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4, bias=False)
        self.function = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function with this module."""
        return self.function(self, *args, **kwargs)


class Lambda(nn.Module):
    """A module without parameters."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Any) -> Any:
        """Call the function."""
        return self.function(*args)


def batch(row: Any, value: Any, *shape: int, draw: Callable[..., Tensor] = torch.randn) -> Tensor:
    """Return random numbers, `[4, 4]` where no shape is given, with a value in some rows."""
    x = draw(shape or (4, 4))
    x[row] = value
    return x


def square(output: Tensor) -> Tensor:
    """Return a loss that is never at fault."""
    return output.float().square().mean()
