"""The launcher of ranks itself: results by rank, and failures that are told, not waited for."""

import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.support.launch import RankError, on_ranks


def _sum_of_ranks(start):
    total = torch.tensor([float(start + dist.get_rank())])
    dist.all_reduce(total)
    return dist.get_rank(), total.tolist()


def _fail_on_the_second():
    if dist.get_rank() == 1:
        raise ValueError("the second one fails")
    dist.barrier()


def _die_on_the_second():
    if dist.get_rank() == 1:
        os._exit(3)
    dist.barrier()


def _hang_on_the_second():
    if dist.get_rank() == 1:
        signal.pause()


def _warn():
    torch.nn.functional.tanh(torch.zeros(1)).requires_grad_().grad  # noqa: B018
    torch.nn.functional.softmax(torch.zeros(1))


@pytest.mark.parametrize("ranks", [2, 4])
def test_results_come_back_by_rank(ranks):
    """Every rank computes in one group, and its result is at its place in the list."""
    total = sum(range(ranks)) + 10.0 * ranks
    assert on_ranks(_sum_of_ranks, ranks, start=10) == [(rank, [total]) for rank in range(ranks)]


def test_an_exception_on_one_rank_is_raised_with_its_traceback():
    """The failing rank's own traceback is told, and not what the others suffer from it."""
    with pytest.raises(RankError, match=r"(?s)^rank 1 raised.*the second one fails\s*$") as told:
        on_ranks(_fail_on_the_second, 2)
    assert "_fail_on_the_second" in str(told.value)


def test_a_dead_rank_is_told():
    """A rank that dies without a word fails the test with its exit code."""
    with pytest.raises(RankError, match="rank 1 died with exit code 3"):
        on_ranks(_die_on_the_second, 2)


def _crash(folder, times):
    """Dies of a signal on one rank, as often as asked for."""
    crashes = len(list(Path(folder).iterdir()))
    dist.barrier()
    if dist.get_rank() == 1 and crashes < times:
        (Path(folder) / str(crashes)).touch()
        os.kill(os.getpid(), signal.SIGSEGV)
    dist.barrier()
    return crashes


def test_a_crash_has_a_second_chance(tmp_path):
    """One death of a signal may be torch's own; two in a row fail the test."""
    assert on_ranks(_crash, 2, folder=str(tmp_path), times=1) == [1, 1]
    with pytest.raises(RankError, match="rank 1 died with exit code -11"):
        on_ranks(_crash, 2, folder=str(tmp_path), times=9)


def test_a_hang_is_ended():
    """A rank that does not come to an end is stopped, and told with the line it hung in."""
    with pytest.raises(RankError, match=r"(?s)rank 1 had not ended.*_hang_on_the_second"):
        on_ranks(_hang_on_the_second, 2, timeout=5)


def test_a_warning_is_an_error():
    """A warning in a rank fails it, as it fails a test."""
    with pytest.raises(RankError, match="Implicit dimension choice"):
        on_ranks(_warn, 2)
