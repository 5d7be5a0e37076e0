"""DTensor is recognised wherever torch keeps it, and never looked for in vain."""

import pytest
import torch
import torch.distributed.tensor.parallel

from gradwatch.measure.parameters import is_sharded
from tests.support.launch import mesh_of_one


@pytest.fixture
def mesh():
    """A mesh of one process."""
    with mesh_of_one() as mesh:
        yield mesh


def test_a_package_without_the_class_is_no_error():
    """torch 2.4 has a package torch.distributed.tensor, imported here, without a DTensor in it."""
    assert not is_sharded(torch.ones(1))


def test_dtensor_is_sharded(mesh):
    """A part of a distributed tensor is told from a plain one."""
    try:
        from torch.distributed.tensor import DTensor
    except ImportError:  # torch 2.4
        from torch.distributed._tensor import DTensor
    assert is_sharded(DTensor.from_local(torch.ones(2), mesh))
    assert not is_sharded(torch.ones(2))
