"""Checkpoints, create_graph, penalties, broken and partial backwards: what is one micro-batch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradwatch
from tests.support import float64, zoo
from tests.support.float64 import gradient_norm
from tests.support.state import identical, snapshot

from .windows import found_or_named, new_run, norms_and_counts, to_none


class _Checkpointed(nn.Module):
    def __init__(self, blocks: int, checkpointed: set[int], *, reentrant: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(blocks)
        )
        self.checkpointed, self.reentrant = checkpointed, reentrant

    def forward(self, x: Tensor) -> Tensor:
        for index, block in enumerate(self.blocks):
            if index in self.checkpointed:
                x = checkpoint(block, x, use_reentrant=self.reentrant)
            else:
                x = block(x)
        return x


@found_or_named
@to_none
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not_reentrant"])
@pytest.mark.parametrize("checkpointed", [{1}, {0, 3}, {0, 1, 2, 3}, {3}], ids=str)
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_checkpointing(
    micro_batches: int, checkpointed: set[int], reentrant: bool, set_to_none: bool, found: bool
) -> None:
    """Nested backwards of checkpointed blocks are one micro-batch, the norms those of the whole backward."""
    model = _Checkpointed(4, checkpointed, reentrant=reentrant)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = []
    with gradwatch.watch(model, None if found else optimizer) as watcher:
        for index in range(3):
            for i in range(micro_batches):
                x = zoo.mlp().batch(2 * index + i)[0].requires_grad_()
                model(x).pow(2).mean().backward()
            expected.append(float64.gradient_norms(dict(model.named_parameters())))
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
    norms, counted = norms_and_counts(watcher)
    assert counted == [micro_batches] * 3
    assert norms == pytest.approx([float64.total(norm) for norm in expected], rel=1e-5)
    table = watcher.history.parameters()
    for step, rows in table.groupby("step"):
        got = dict(zip(rows["parameter"], rows["grad_norm"], strict=True))
        assert got == pytest.approx(expected[step - 1], rel=1e-5)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not_reentrant"])
def test_checkpoint_inside_a_checkpoint(reentrant: bool) -> None:
    """Backwards nested two deep are one micro-batch."""
    torch.manual_seed(0)
    inner, outer = nn.Linear(4, 4), nn.Linear(4, 4)
    model = nn.ModuleDict({"inner": inner, "outer": outer})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def block(x: Tensor) -> Tensor:
        return outer(torch.tanh(checkpoint(inner, x, use_reentrant=reentrant)))

    with gradwatch.watch(model, optimizer) as watcher:
        for _ in range(3):
            x = torch.randn(2, 4, requires_grad=True)
            checkpoint(block, x, use_reentrant=reentrant).pow(2).sum().backward()
            expected = gradient_norm(model)
            optimizer.step()
            optimizer.zero_grad()
    norms, counted = norms_and_counts(watcher)
    assert counted == [1, 1, 1]
    assert norms[-1] == pytest.approx(expected, rel=1e-5)


def test_the_same_parameter_used_twice_is_measured_once() -> None:
    """A module that is called twice in a forward is one parameter in one micro-batch."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with gradwatch.watch(layer, optimizer) as watcher:
        layer(torch.tanh(layer(torch.randn(3, 4)))).sum().backward()
        expected = gradient_norm(layer)
        optimizer.step()
    assert norms_and_counts(watcher) == (pytest.approx([expected], rel=1e-5), [1])
    assert list(watcher.history.parameters()["parameter"]) == ["weight", "bias"]


@pytest.mark.filterwarnings("ignore:Using backward\\(\\) with create_graph=True")
@found_or_named
def test_create_graph(found: bool) -> None:
    """backward(create_graph=True) is one micro-batch; a second backward through it is another."""
    case, optimizer, watching = new_run(found)
    expected = []
    with watching as watcher:
        for index in range(3):
            case.loss(case.model, case.batch(index)).backward(create_graph=True)
            if index == 1:
                sum(p.grad.pow(2).sum() for p in case.model.parameters()).backward()
            expected.append(gradient_norm(case.model))
            optimizer.step()
            optimizer.zero_grad()
    norms, counted = norms_and_counts(watcher)
    assert counted == [1, 2, 1]
    assert norms == pytest.approx(expected, rel=1e-5)


@found_or_named
@pytest.mark.parametrize("of", ["inputs", "parameters"])
def test_gradient_penalties_are_no_micro_batch(of: str, found: bool) -> None:
    """torch.autograd.grad, of inputs (WGAN-GP) or of parameters, is no backward; the norm is that of the whole loss."""
    case, optimizer, watching = new_run(found)
    expected = []
    with watching as watcher:
        for index in range(4):
            x, y = case.batch(index)
            x.requires_grad_()
            loss = (case.model(x) - y).pow(2).mean()
            wanted = [x] if of == "inputs" else list(case.model.parameters())
            grads = torch.autograd.grad(loss, wanted, create_graph=True)
            (loss + sum((grad.norm() - 1).pow(2) for grad in grads)).backward()
            expected.append(gradient_norm(case.model))
            optimizer.step()
            optimizer.zero_grad()
    norms, counted = norms_and_counts(watcher)
    assert counted == [1] * 4
    assert norms == pytest.approx(expected, rel=1e-5)


def test_autograd_grad_alone_is_nothing() -> None:
    """A loop that only calls torch.autograd.grad leaves no row."""
    case = zoo.mlp()
    with gradwatch.watch(case.model) as watcher:
        loss = case.loss(case.model, case.batch(0))
        torch.autograd.grad(loss, list(case.model.parameters()))
    assert watcher.history.steps().empty
    assert watcher.last is None


def test_several_losses_in_one_backward() -> None:
    """torch.autograd.backward of two losses is one micro-batch; a retained graph run twice is two."""
    case, optimizer, watching = new_run()
    expected = []
    with watching as watcher:
        losses = [case.loss(case.model, case.batch(index)) for index in range(2)]
        torch.autograd.backward(losses)
        expected.append(gradient_norm(case.model))
        optimizer.step()
        optimizer.zero_grad()
        loss = case.loss(case.model, case.batch(2))
        loss.backward(retain_graph=True)
        loss.backward()
        expected.append(gradient_norm(case.model))
        optimizer.step()
    assert norms_and_counts(watcher) == (pytest.approx(expected, rel=1e-5), [1, 2])


@to_none
def test_a_backward_of_zeros_counts(set_to_none: bool) -> None:
    """A micro-batch whose gradients are all zero is a micro-batch, first or last, and no dropped one."""
    case, optimizer, watching = new_run()
    with watching as watcher:
        for order in ((0.0, 1.0), (1.0, 0.0), (0.0,), (0.0, 0.0)):
            for factor in order:
                (factor * case.loss(case.model, case.batch(0))).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
    norms, counted = norms_and_counts(watcher)
    assert counted == [2, 2, 1, 2]
    assert [norm > 0 for norm in norms] == [True, True, False, False]


@found_or_named
def test_optimizers_that_step_inside_the_backward(found: bool) -> None:
    """One optimizer per parameter, stepped and zeroed in its hook: the weights are untouched, the norms theirs."""
    results = []
    for watched in (False, True):
        case = zoo.mlp()
        optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in case.model.parameters()}
        norms: list[float] = []

        def step(p: Tensor, optimizers: Any = optimizers, norms: list[float] = norms) -> None:
            norms.append(float64.norm(p.grad))
            optimizers[p].step()
            optimizers[p].zero_grad()

        for parameter in case.model.parameters():
            parameter.register_post_accumulate_grad_hook(step)
        named = None if found else list(optimizers.values())
        watcher = gradwatch.watch(case.model, named) if watched else None
        with watcher or torch.enable_grad():
            for index in range(3):
                case.loss(case.model, case.batch(index)).backward()
        results.append(snapshot(case.model))
    assert identical(*results)
    steps = watcher.history.steps()
    assert list(steps["grad_norm_clipped"]) == pytest.approx(norms, rel=1e-5)
    assert list(steps["grad_norm"]) == pytest.approx(norms, rel=1e-5)


def test_backward_with_inputs_measures_what_it_filled() -> None:
    """backward(inputs=[...]) fills and measures those parameters only."""
    case, optimizer, watching = new_run()
    with watching as watcher:
        case.loss(case.model, case.batch(0)).backward(inputs=list(case.model[4].parameters()))
        expected = gradient_norm(case.model)
        optimizer.step()
    assert norms_and_counts(watcher) == (pytest.approx([expected], rel=1e-5), [1])
    assert set(watcher.history.parameters()["parameter"]) == {"4.weight", "4.bias"}


def test_a_backward_of_something_else_is_no_micro_batch() -> None:
    """A backward that reaches no watched parameter counts for nothing."""
    case, optimizer, watching = new_run()
    other = nn.Linear(2, 2)
    with watching as watcher:
        for index in range(2):
            other(torch.ones(1, 2)).sum().backward()
            case.loss(case.model, case.batch(index)).backward()
            other(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert norms_and_counts(watcher)[1] == [1, 1]


class _Breaks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise ValueError("broken on purpose")


@found_or_named
@to_none
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("before", [1, 4])
def test_an_exception_in_the_middle_of_a_backward(
    before: int, times: int, set_to_none: bool, found: bool
) -> None:
    """After a backward that broke halfway, the next step has both sides of the loop's own clip right."""
    case, optimizer, watching = new_run(found)
    expected = []
    with watching as watcher:
        for index in range(3):
            if index == 1:
                for _ in range(times):
                    x = case.batch(0)[0]
                    for i, layer in enumerate(case.model):
                        x = layer(_Breaks.apply(x) if i == before else x)
                    with pytest.raises(ValueError, match="broken on purpose"):
                        x.pow(2).mean().backward()
                    optimizer.zero_grad(set_to_none=set_to_none)
            case.loss(case.model, case.batch(index)).backward()
            expected.append(gradient_norm(case.model))
            nn.utils.clip_grad_norm_(case.model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
    norms, counted = norms_and_counts(watcher)
    assert norms == pytest.approx(expected, rel=1e-5)
    assert counted == [1, 1, 1]
    assert list(watcher.history.steps()["grad_norm_clipped"]) == pytest.approx([0.1] * 3, rel=1e-3)


def test_a_broken_reentrant_checkpoint_is_survived() -> None:
    """The same where the backward broke inside a reentrant checkpoint."""
    torch.manual_seed(0)
    first, last = nn.Linear(4, 4), nn.Linear(4, 4)
    model = nn.ModuleList([first, last])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def run(broken: bool) -> Tensor:
        x = torch.randn(2, 4, requires_grad=True)
        inner: Callable[[Tensor], Tensor] = (lambda t: last(_Breaks.apply(t))) if broken else last
        return last(checkpoint(lambda t: inner(first(t)), x, use_reentrant=True)).pow(2).sum()

    with gradwatch.watch(model, optimizer) as watcher:
        with pytest.raises(ValueError, match="broken on purpose"):
            run(broken=True).backward()
        optimizer.zero_grad()
        for _ in range(2):
            run(broken=False).backward()
            expected = gradient_norm(model)
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            optimizer.step()
            optimizer.zero_grad()
    norms, counted = norms_and_counts(watcher)
    assert counted == [1, 1]
    assert norms[-1] == pytest.approx(expected, rel=1e-5)
    assert watcher.history.steps()["grad_norm_clipped"].iloc[-1] == pytest.approx(0.01, rel=1e-3)
