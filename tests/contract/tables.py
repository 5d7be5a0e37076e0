"""What the suites on norms share."""

import math

import pytest
import torch

import gradwatch
from tests.support import zoo

STEPS = 5


NORM_TYPES = (1.0, 2.0, math.inf)


all_norms = pytest.mark.parametrize("p", NORM_TYPES, ids=lambda p: f"p={p:g}")


def rows_of(watcher: gradwatch.Watcher, step: int, column: str = "grad_norm") -> dict[str, float]:
    """Return one column of parameters() at one step, by parameter name."""
    table = watcher.history.parameters()
    table = table[table["step"] == step]
    return dict(zip(table["parameter"], table[column], strict=True))


def sgd(case: zoo.Case) -> torch.optim.Optimizer:
    """Return plain SGD over the case's model."""
    return torch.optim.SGD(case.model.parameters(), lr=0.05)
