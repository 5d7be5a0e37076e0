"""What the accounting suites share: a small training and its numbers."""

from typing import Any

import pytest
import torch

import gradwatch
from tests.support import zoo

to_none = pytest.mark.parametrize("set_to_none", [True, False], ids=["to_none", "to_zero"])


found_or_named = pytest.mark.parametrize("found", [False, True], ids=["named", "found"])


def new_run(found: bool = False, **options: Any) -> tuple[zoo.Case, Any, Any]:
    """Return a perceptron, its optimizer and a watcher that is not yet entered."""
    case = zoo.mlp()
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
    return case, optimizer, gradwatch.watch(case.model, None if found else optimizer, **options)


def norms_and_counts(watcher: gradwatch.Watcher) -> tuple[list[float], list[int]]:
    """Return the columns grad_norm and micro_batches."""
    steps = watcher.history.steps()
    return list(steps["grad_norm"]), list(steps["micro_batches"])
