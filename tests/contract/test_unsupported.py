"""What gradwatch cannot do right it refuses or tells, rather than record a wrong number."""

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch.hooks import data_parallel


def test_a_managed_backward_that_reaches_nothing_is_an_error():
    """A loss that does not depend on the parameters would make step() wait for ever."""
    weight, other = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    watcher = gradwatch.watch({"w": weight}, optimizer, accumulate=2)
    with watcher, pytest.raises(RuntimeError, match="left no gradient in any parameter"):
        watcher.backward(other.sum())


@pytest.mark.parametrize("options", [{"clip": 1.0}, {"on_nonfinite": "skip"}])
def test_a_clip_that_nothing_steps_is_told_of(options):
    """Master weights are copies: no optimizer steps what is watched, so no clip can act."""
    weight = nn.Parameter(torch.ones(2))
    master = weight.detach().clone().requires_grad_(True)
    optimizer = torch.optim.SGD([master], lr=0.1)
    watcher = gradwatch.watch({"w": weight}, **options).attach()
    for _ in range(3):
        weight.sum().backward()
        master.grad = weight.grad.clone()
        optimizer.step()
        weight.grad = None
        with torch.no_grad():
            weight.copy_(master)
    with pytest.warns(gradwatch.GradwatchWarning, match=f"{next(iter(options))}=.*did nothing"):
        watcher.close()


def test_an_optimizer_inside_the_reduction_is_refused():
    """ZeroRedundancyOptimizer(overlap_with_ddp=True) steps where nobody can look."""
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    optimizer._overlap_with_ddp = True
    with pytest.raises(ValueError, match="overlap_with_ddp=True"):
        gradwatch.watch({"w": weight}, optimizer)


def test_a_whole_model_is_neither_refused_nor_resharded():
    """Without FSDP there is nothing to do."""
    model = nn.Linear(2, 2)
    data_parallel.refuse_fsdp1(model)
    data_parallel.reshard(model)
    assert list(data_parallel.fully_sharded(model)) == []
