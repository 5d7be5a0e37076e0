"""The marks on parameters: order, end of a backward, nesting, failure."""

import gc

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from gradwatch.hooks.backward import Arrivals, Backward, is_watched


@pytest.fixture
def watched():
    """Four linear layers with marks, and the list of backwards that were reported."""
    seen: list[Backward] = []
    arrivals = Arrivals(seen.append)
    layers = [nn.Linear(4, 4, bias=False) for _ in range(4)]
    for index, layer in enumerate(layers):
        arrivals.hook(index, layer.weight)
    yield layers, seen, arrivals
    arrivals.unhook()


def test_reports_once_per_backward_in_backward_order(watched):
    """A backward is reported once, its parameters from the loss to the input."""
    layers, seen, _ = watched
    nn.Sequential(*layers)(torch.randn(2, 4)).sum().backward()
    assert [list(b.arrived) for b in seen] == [[3, 2, 1, 0]]
    assert not seen[0].continues
    assert not seen[0].create_graph


def test_gradients_are_final_when_reported():
    """At the report every gradient holds the whole backward's sum."""
    weight = nn.Parameter(torch.ones(2))
    seen = []
    arrivals = Arrivals(lambda backward: seen.append(weight.grad.clone()))
    arrivals.hook(0, weight)
    (weight * 2 + weight * 3).sum().backward()
    assert torch.equal(seen[0], torch.full((2,), 5.0))
    arrivals.unhook()


def test_autograd_grad_is_no_backward(watched):
    """torch.autograd.grad leaves no gradient, so it leaves no mark."""
    layers, seen, _ = watched
    torch.autograd.grad(layers[0](torch.randn(2, 4)).sum(), layers[0].weight)
    assert seen == []


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph:UserWarning")
def test_create_graph_is_told(watched):
    """A backward that records its own graph says so."""
    layers, seen, _ = watched
    gradient = torch.ones((), requires_grad=True)
    (layers[0](torch.randn(2, 4)).sum() * gradient).backward(
        create_graph=True, inputs=[layers[0].weight]
    )
    layers[0].weight.grad = None
    assert [b.create_graph for b in seen] == [True]


@pytest.mark.parametrize("first", [0, 1, 2, 3])
def test_reentrant_checkpoint_after_an_outer_parameter_is_one_backward(watched, first):
    """Nested backwards that begin after a parameter of the outer one are part of it."""
    layers, seen, _ = watched
    x = torch.randn(2, 4, requires_grad=True)
    for index, layer in enumerate(layers):
        x = checkpoint(layer, x, use_reentrant=True) if index == first and first < 3 else layer(x)
    x.sum().backward()
    assert [list(b.arrived) for b in seen] == [[3, 2, 1, 0]]


def test_reentrant_checkpoint_before_any_outer_parameter_continues(watched):
    """A nested backward that ends first and the outer one are one micro-batch."""
    layers, seen, _ = watched
    for _ in range(2):
        x = layers[0](torch.randn(2, 4))
        checkpoint(layers[1], x, use_reentrant=True).sum().backward()
    assert [list(b.arrived) for b in seen] == [[1], [0], [1], [0]]
    assert [b.continues for b in seen] == [False, True, False, True]


def test_all_parameters_in_reentrant_checkpoints(watched):
    """Nested backwards of one outer backward belong together, the next outer one is new."""
    layers, seen, _ = watched
    for _ in range(2):
        x = torch.randn(2, 4, requires_grad=True)
        for layer in layers[:3]:
            x = checkpoint(layer, x, use_reentrant=True)
        x.sum().backward()
    assert [b.continues for b in seen] == [False, True, True, False, True, True]


class _Fails(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise RuntimeError("out of memory, say")


def test_a_failed_backward_leaves_no_trace(watched):
    """After a backward that raised half-way the next one is reported whole."""
    layers, seen, _ = watched
    x = _Fails.apply(layers[0](torch.randn(2, 4)))
    with pytest.raises(RuntimeError, match="out of memory"):
        layers[1](x).sum().backward()
    assert seen == []
    nn.Sequential(*layers)(torch.randn(2, 4)).sum().backward()
    assert [list(b.arrived) for b in seen] == [[3, 2, 1, 0]]


def test_unhook_also_silences_a_graph_that_is_built_already(watched):
    """Marks taken off between forward and backward do not fire."""
    layers, seen, arrivals = watched
    loss = layers[0](torch.randn(2, 4)).sum()
    arrivals.unhook()
    loss.backward()
    assert seen == []
    assert not is_watched(layers[0].weight)


def test_no_gradient_is_kept_alive(watched):
    """After the report the marks hold nothing but an empty dict."""
    layers, _, arrivals = watched
    nn.Sequential(*layers)(torch.randn(2, 4)).sum().backward()
    gc.collect()
    assert len(arrivals) == 0


def test_a_hook_of_the_user_is_no_watcher():
    """Only gradwatch's own marks count as being watched."""
    weight = nn.Parameter(torch.ones(2))
    handle = weight.register_post_accumulate_grad_hook(lambda p: None)
    assert not is_watched(weight)
    handle.remove()
