"""Statistics per parameter against numpy in float64."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gradwatch.measure import statistics
from gradwatch.measure.statistics import (
    STATISTICS,
    Statistic,
    StatisticsSampler,
    gradient_rows,
    register_statistic,
    statistics_of,
    update_row,
    weight_row,
)

NAMES = ("max", "mean", "std", "zeros")


def _statistics(gradients, unit=1.0):
    rows = {name: row.array() for name, row in gradient_rows(gradients, NAMES).items()}
    return statistics_of(NAMES, rows, unit)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.integers(1, 50), st.floats(0.25, 64.0))
def test_statistics_equal_numpy(seed, size, scale):
    """Largest magnitude, mean, population deviation and share of zeros, in true units."""
    values = np.random.default_rng(seed).normal(size=size).astype(np.float32)
    values[::3] = 0
    taken = _statistics([torch.from_numpy(values)], scale)
    wide = values.astype(np.float64) / scale
    expected = [np.abs(wide).max(), wide.mean(), wide.std(), np.mean(wide == 0)]
    for name, value in zip(NAMES, expected, strict=True):
        assert taken[name][0] == pytest.approx(value, rel=1e-5, abs=1e-6)


def test_half_precision_and_empty_and_complex():
    """Odd dtypes and sizes have statistics too."""
    taken = _statistics(
        [torch.ones(70_000, dtype=torch.float16), torch.zeros(0), torch.tensor([3 - 4j])]
    )
    assert taken["mean"].tolist() == [1.0, 0.0, -0.5]
    assert taken["max"].tolist() == [1.0, 0.0, 5.0]


def test_update_ratio():
    """The size of the change over the size of the weights; NaN where the weights were zero."""
    before = [torch.tensor([3.0, 4.0]), torch.zeros(2)]
    after = [torch.tensor([3.0, 4.5]), torch.ones(2)]
    rows = {
        "squared_weights": weight_row(before).array(),
        "squared_update": update_row(before, after).array(),
    }
    taken = statistics_of(("weight_norm", "update_ratio"), rows, 1.0)
    assert taken["update_ratio"][0] == pytest.approx(0.1)
    assert np.isnan(taken["update_ratio"][1])
    assert taken["weight_norm"].tolist() == [5.0, 0.0]


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.lists(st.integers(0, 9), min_size=1, max_size=4))
def test_statistics_of_parts_add_up(seed, sizes):
    """Rows of the parts of a gradient, added up, give the statistics of the whole."""
    whole = np.random.default_rng(seed).normal(loc=3.0, size=sum(sizes) + 1)
    parts = np.split(whole, np.cumsum(sizes))
    rows = [gradient_rows([torch.from_numpy(part)], NAMES) for part in parts]
    added = {name: sum(row[name].array() for row in rows) for name in rows[0]}
    added["max"] = max(row["max"].array() for row in rows)
    taken = statistics_of(NAMES, added, 1.0)
    assert taken["mean"][0] == pytest.approx(whole.mean())
    assert taken["std"][0] == pytest.approx(whole.std(), abs=1e-7)
    assert taken["max"][0] == np.abs(whole).max()


def test_sampler_takes_every_nth_step():
    """Costly statistics are due at steps 1, 1 + every, ..."""
    sampler = StatisticsSampler(("norm", "max"), every=3, columns=2)
    assert [step for step in range(1, 10) if sampler.due(step)] == [1, 4, 7]
    assert not StatisticsSampler(("norm",), every=1, columns=2).due(1)


def test_sampler_fills_rows_over_all_columns():
    """A row has NaN where the optimizer has no parameter."""
    sampler = StatisticsSampler(("max", "weight_norm"), every=1, columns=3)
    sampler.measure_gradients([1], [torch.tensor([-2.0])])
    sampler.measure_weights([1], [torch.tensor([5.0])])
    rows = sampler.after_step([1], [torch.tensor([5.0])], unit=1.0).rows()
    assert rows["max"][1] == 2.0
    assert rows["weight_norm"][1] == 5.0
    assert np.isnan(rows["max"][[0, 2]]).all()
    assert sampler.after_step([1], [], unit=1.0).rows() == {}


def _reference(gradient):
    """The statistics of a gradient that is whole, dense and in float64."""
    dense = gradient.to_dense()
    wide = dense.to(torch.complex128 if dense.is_complex() else torch.float64)
    parts = torch.view_as_real(wide) if wide.is_complex() else wide
    return [
        float(value)
        for value in (
            wide.abs().max(),
            parts.mean(),
            wide.std(correction=0),
            (wide == 0).double().mean(),
            parts.min(),
        )
    ]


def _gradients(dtype):
    torch.manual_seed(0)
    dense = torch.randn(6, 8, dtype=dtype) * (torch.rand(6, 8) > 0.5)
    indices = torch.tensor([[0, 3, 3, 9], [1, 2, 2, 0]])
    coo = torch.sparse_coo_tensor(
        indices, torch.randn(4, dtype=dtype), (10, 5), check_invariants=True
    )
    rows = torch.sparse_coo_tensor(
        torch.tensor([[1, 1, 4]]), torch.randn(3, 5, dtype=dtype), (10, 5), check_invariants=True
    )
    none = torch.zeros(10, 5, dtype=dtype).to_sparse()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls its CSR support beta
        compressed = dense.to_sparse_csr()
    return {
        "dense": dense,
        "coo": coo,
        "coalesced": coo.coalesce(),
        "rows": rows,
        "none": none,
        "csr": compressed,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["dense", "coo", "coalesced", "rows", "none", "csr"])
def test_unset_elements_and_complex_numbers(layout, dtype, monkeypatch):
    """Those of a dense float64 copy: unset elements are zeros, a complex number is one element."""
    monkeypatch.setattr(statistics, "STATISTICS", dict(STATISTICS))
    smallest = Statistic(
        meaning="smallest element",
        maxima={"negative": lambda values: (-values).max()},
        formula=lambda totals, unit: -totals["negative"] / unit,
    )
    register_statistic("smallest", smallest)
    gradient, names = _gradients(dtype)[layout], (*NAMES, "smallest")
    rows = {name: row.array() for name, row in gradient_rows([gradient], names).items()}
    taken = statistics_of(names, rows, 1.0)
    found = [float(taken[name][0]) for name in names]
    assert found == pytest.approx(_reference(gradient), rel=1e-5, abs=1e-7)


def test_complex_parts_add_up():
    """The deviation of complex numbers over several parts is that of the whole."""
    whole = torch.randn(9, dtype=torch.complex128) + (3 - 1j)
    rows = [gradient_rows([part], NAMES) for part in whole.split([2, 3, 4])]
    added = {name: sum(row[name].array() for row in rows) for name in rows[0]}
    assert statistics_of(NAMES, added, 1.0)["std"][0] == pytest.approx(
        float(whole.std(correction=0))
    )
