"""An error inside gradwatch does not reach a training that it only watches."""

import pytest
import torch

import gradwatch


class _Odd(torch.Tensor):
    """A gradient that no norm can be taken of."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if "norm" in getattr(function, "__name__", ""):
            raise NotImplementedError("no norm")
        return super().__torch_function__(function, types, args, kwargs or {})


def _train(**options):
    weight = torch.ones(3, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    with gradwatch.watch({"weight": weight}, optimizer, **options) as watcher:
        for step in range(4):
            weight.grad = torch.ones(3).as_subclass(_Odd) if step == 2 else torch.ones(3)
            optimizer.step()
    return weight.detach(), watcher


def test_watching_stops_and_the_training_goes_on():
    """One warning; the weights are those of the training alone; what was seen stays readable."""
    with pytest.warns(gradwatch.GradwatchWarning, match="stopped watching.*no norm") as caught:
        weight, watcher = _train()
    assert len(caught) == 1
    assert torch.allclose(weight, torch.full((3,), 0.6))
    assert len(watcher.history) == 2


def test_a_clip_that_cannot_be_done_stops_the_run():
    """Where gradwatch acts, going on without it would silently be another training."""
    with pytest.raises(NotImplementedError, match="no norm"):
        _train(clip=1.0)
