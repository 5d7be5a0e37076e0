"""Percentiles over the parameters of a step."""

import numpy as np
import pytest

from gradwatch_tensorboard.scalars import norm_spread


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("parameters", [1, 2, 5, 300])
def test_agrees_with_numpy(dtype, parameters):
    """Each row holds what numpy.percentile says."""
    norms = np.random.default_rng(0).lognormal(size=(7, parameters)).astype(dtype)
    expected = np.percentile(norms.astype(np.float64), [5, 50, 95, 100], axis=1).T
    np.testing.assert_allclose(norm_spread(norms), expected, rtol=1e-6)


def test_counts_finite_norms_only():
    """NaN, Inf and parameters without a gradient change no percentile, in any mixture of rows."""
    rows = [[1.0, np.nan, 2.0, np.inf, 3.0, -1.0], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]
    spread = norm_spread(np.array(rows, dtype=np.float32))
    np.testing.assert_allclose(spread[0], np.percentile([1, 2, 3], [5, 50, 95, 100]), rtol=1e-6)
    np.testing.assert_allclose(spread[1], np.percentile(rows[1], [5, 50, 95, 100]), rtol=1e-6)


def test_zero_is_a_norm():
    """A gradient of zeros counts, unlike a missing one."""
    assert norm_spread(np.array([[0.0, 0.0, -1.0]])).tolist() == [[0.0, 0.0, 0.0, 0.0]]


@pytest.mark.parametrize("row", [[np.nan, np.inf], [-1.0, -1.0], [np.nan, -1.0], []])
def test_is_nan_where_no_norm_is_finite(row):
    """A row without a finite norm gives NaN, and no warning."""
    assert np.isnan(norm_spread(np.array([row], dtype=np.float32))).all()


def test_leaves_the_batch_as_it_is():
    """The array of the batch belongs to all sinks and is not written to."""
    norms = np.array([[3.0, np.nan, 1.0, -1.0]])
    norms.flags.writeable = False
    norm_spread(norms)
    np.testing.assert_array_equal(norms, [[3.0, np.nan, 1.0, -1.0]])
