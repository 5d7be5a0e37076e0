"""Settings of the contract suites."""

import gc
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> Iterator[None]:
    """Tiny models on one thread each: workers beside each other do not fight for the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_scaler_left() -> None:
    """No scaler of an earlier test is left in a cycle of references."""
    # A watcher that knows of one looks for it in the frames of the loop. Up to Python 3.12 a frame
    # that was looked at keeps what its variables were.
    gc.collect()
