"""Exact counts of bad elements."""

import pytest
import torch

from gradwatch.measure.norms import count_nonfinite

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (torch.tensor([1.0, NAN, INF, -INF, NAN]), (2, 2)),
        (torch.tensor([1.0, 2.0]), (0, 0)),
        (torch.zeros(0), (0, 0)),
        (torch.tensor([complex(NAN, INF), complex(1, -INF)]), (1, 1)),
        (torch.tensor([NAN, INF], dtype=torch.bfloat16), (1, 1)),
        (torch.sparse_coo_tensor([[1, 1]], [NAN, INF], (4,), check_invariants=True), (1, 0)),
    ],
    ids=["both", "none", "empty", "complex", "bfloat16", "sparse"],
)
def test_counts(values, expected):
    """NaN and Inf are counted apart; a sum of both is a NaN."""
    counts = count_nonfinite(values)
    assert counts == expected
    assert bool(counts) is any(expected)
