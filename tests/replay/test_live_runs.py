"""The largest examples of forwards that a training has run, and what that leaves of it."""

import pytest
import torch

from gradwatch.hooks.context import ForwardContext
from gradwatch.replay.largest import MOST, largest_examples, largest_of_window, largest_parameters
from gradwatch.replay.runs import live_calls, live_closure
from gradwatch.replay.stand_ins import ReplayError
from tests.replay.replayed import attributes, kept
from tests.replay.test_largest import assert_agree, cross_entropy, expected, squared_error
from tests.support import float64, zoo
from tests.support.state import differences, state_of

WAYS = ["calls", "closure", "own backward"]


def graph_of(way, model, calls, loss_of, context):
    """The graph of the last forward, run again in one of the ways."""
    if way == "calls":
        return live_calls(model, calls)
    if way == "closure":
        return live_closure(model, loss_of, context=context)

    def closure():
        model.zero_grad()
        loss = loss_of()
        loss.backward()
        return loss

    return live_closure(model, closure, context=context)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", list(zoo.MODELS))
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_examples_of_a_training(name, way):
    """Run again from what was kept, or by a closure, the examples are those of the reference."""
    case = zoo.make_case(name)
    x, target = case.batch(0)
    if name == "reentrant":
        x.requires_grad_()
    context = ForwardContext.now()
    with kept(case.model) as calls:
        case.loss(case.model, (x, target)).backward()
    with graph_of(way, case.model, calls, lambda: case.loss(case.model, (x, target)), context) as g:
        found = largest_examples(g)
    rows = cross_entropy if name in zoo.ON_TOKENS else squared_error
    plain = zoo.make_case("checkpoint").model if name == "reentrant" else case.model
    plain.load_state_dict(case.model.state_dict())
    reference = expected(plain, x.detach(), lambda output: rows(output, target))
    assert_agree(found, *reference)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["cnn", "transformer", "reentrant", "sparse"])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_a_training_is_left_as_it_was(name, way):
    """Weights, state, buffers, gradients and random numbers are those of a training without it."""
    plain, found = _train(name, None), _train(name, way)
    assert list(differences(plain, found)) == []


def _train(name, way):
    case = zoo.make_case(name, dropout=0.0 if name in ("complex", "sparse", "all_sparse") else 0.2)
    model = case.model
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9
    )
    torch.manual_seed(5)
    for step in range(3):
        x, target = case.batch(step)
        if name == "reentrant":
            x.requires_grad_()
        optimizer.zero_grad()
        context = ForwardContext.now()
        with kept(model) as calls:
            case.loss(model, (x, target)).backward()
        before = [p.grad for p in model.parameters()]
        if way is not None:
            graph = graph_of(way, model, calls, lambda b=(x, target): case.loss(model, b), context)
            with graph as live:
                found = largest_examples(live)
            assert len(found.shares) == MOST
        assert all(p.grad is one for p, one in zip(model.parameters(), before, strict=True))
        optimizer.step()
    return {**state_of(model, optimizer), "attributes": attributes(model)}


def test_micro_batches_of_a_training():
    """Of a window, the micro-batch with the outlier and its examples are named."""
    torch.manual_seed(1)
    model = zoo.small()
    windows = []
    for i in range(3):
        x, target = torch.randn(6, 4), torch.randn(6, 1)
        if i == 1:
            target[4] = 100.0
        with kept(model) as calls:
            squared_error(model(x), target).sum().backward()
        windows.append(calls)
    graphs = [lambda calls=calls: live_calls(model, calls) for calls in windows]
    gradients = float64.gradients(model)
    found = largest_of_window(graphs, gradients)
    assert found.micro_batch == 2
    assert found.shares[0].name == "4"
    assert found.shares[0].share > 0.9
    assert len(largest_parameters(gradients)) == MOST


def test_two_forwards_before_one_backward():
    """Of a siamese pair an example's share is that of both of its outputs."""
    torch.manual_seed(1)
    model, a, b = zoo.small(), torch.randn(6, 4), torch.randn(6, 4)
    with kept(model) as calls:
        (model(a) - model(b)).square().mean().backward()
    with live_calls(model, calls) as graph:
        found = largest_examples(graph)

    class Pair(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            first, second = x.chunk(2, 1)
            return self.model(first) - self.model(second)

    pair = expected(Pair(), torch.cat([a, b], 1), lambda out: out.square().mean(1) / 6)
    assert_agree(found, *pair)


def test_outputs_without_gradients():
    """Where no gradient was kept there is nothing to tell, and it says so."""
    model = zoo.small()
    with kept(model) as calls:
        model(torch.randn(2, 4))
    with pytest.raises(ReplayError), live_calls(model, calls):
        pass
    found = largest_of_window([lambda: live_calls(model, calls)], {})
    assert found.shares == ()
    assert "No gradient was kept" in found.notes[0]
