"""The largest parameters and examples against backwards of one example each, in float64."""

import copy
import math
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gradwatch.replay import largest
from gradwatch.replay.largest import (
    MOST,
    SEARCH,
    largest_by_norm,
    largest_examples,
    largest_of_window,
    largest_parameters,
)
from gradwatch.replay.live import Kernels, LiveGraph
from tests.support import float64, zoo

SEED = 20_011


def squared_error(output, target):
    """What each example adds to the mean squared error."""
    return (output - target).square().flatten(1).sum(1) / output.numel()


def cross_entropy(output, targets):
    """What each example adds to the mean cross entropy over its tokens."""
    each = F.cross_entropy(output.flatten(0, 1), targets.flatten(), reduction="none")
    return each.view(targets.shape).sum(1) / targets.numel()


class SequenceFirst(nn.Module):
    """An LSTM whose inputs and outputs are [time, batch, features]."""

    def __init__(self):
        super().__init__()
        self.cell = nn.LSTM(6, 5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.cell(x)[0])


class Transposed(nn.Module):
    """A transformer that is given [batch, time], computes in [time, batch] and flattens."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)
        self.head = nn.Linear(8, 11)

    def forward(self, tokens):
        hidden = self.block(self.embedding(tokens).transpose(0, 1))
        return self.head(hidden.transpose(0, 1)).flatten(0, 1)


class WithLoss(nn.Module):
    """A model that returns its loss, with a penalty on its weights."""

    def __init__(self, model, rows, penalty=0.0):
        super().__init__()
        self.model = model
        self.rows = rows
        self.penalty = penalty

    def forward(self, x, target):
        loss = self.rows(self.model(x), target).sum()
        if self.penalty:
            loss = loss + self.penalty * sum(
                p.abs().square().sum() for p in self.model.parameters()
            )
        return loss


@contextmanager
def live(model, x, rows, *args, scale=1.0):
    """Stands in for the runner: the model's own parameters are the leaves."""
    with Kernels() as kernels:
        output = model(x, *args)
        start = torch.tensor(scale)
        if rows is not None:
            cut = output.detach().requires_grad_()
            (start,) = torch.autograd.grad(rows(cut).sum() * scale, cut)
        parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        yield LiveGraph([output], [start], parameters, tuple(x.shape), kernels.batches)


def parts(model, x, rows):
    """The gradient of what each example adds to the loss, flat, one after another: [batch, n]."""
    model = float64.widen_module(copy.deepcopy(model))
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.sparse = False
    parameters = [p for p in model.parameters() if p.requires_grad]
    x = x.double() if x.is_floating_point() else x
    each = []
    for row in rows(model(x)):
        found = torch.autograd.grad(
            row, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        each.append(torch.cat([_real(one) for one in found]))
    return torch.stack(each)


def _real(tensor):
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).flatten()


def expected(model, x, rows):
    """Norm and share of each example: [batch], [batch]."""
    each = parts(model, x, rows)
    whole = each.sum(0)
    return each.norm(dim=1), each @ whole / (whole @ whole)


def assert_agree(found, norms, shares, rel=1e-4):
    """The largest examples are those of the reference, with its norms and shares."""
    order = sorted(range(len(shares)), key=lambda i: -shares[i])[:MOST]
    assert [int(one.name) for one in found.shares] == order
    for one, i in zip(found.shares, order, strict=True):
        assert one.norm == pytest.approx(float(norms[i]), rel=rel)
        assert one.share == pytest.approx(float(shares[i]), rel=rel, abs=rel)


def zoo_case(name):
    """A model of the zoo, its input, and what each example adds to its loss."""
    case = zoo.make_case(name)
    x, target = case.batch(0)
    rows = cross_entropy if name in zoo.ON_TOKENS else squared_error
    return case.model, x, lambda output: rows(output, target.to(output.device))


def in_double(rows, target):
    """The rows of a loss for outputs of any precision."""
    return lambda output: rows(output, target.to(output.dtype))


@pytest.mark.parametrize("name", [name for name in zoo.MODELS if name != "reentrant"])
def test_examples_of_each_model(name):
    """Shares and norms are those of a backward of each example's loss, through BatchNorm too."""
    model, x, rows = zoo_case(name)
    with live(model, x, rows) as graph:
        found = largest_examples(graph)
    assert_agree(found, *expected(model, x, rows))
    assert found.notes == ()


def test_reentrant_checkpoint():
    """A reentrant checkpoint, which refuses autograd.grad, gets backwards."""
    model, x, rows = zoo_case("reentrant")
    with live(model, x.requires_grad_(), rows) as graph:
        found = largest_examples(graph)
    assert all(parameter.grad is None for parameter in model.parameters())
    plain, x, rows = zoo_case("checkpoint")
    assert_agree(found, *expected(plain, x, rows))


def test_sequence_first():
    """An LSTM tells that the second dimension is the batch."""
    torch.manual_seed(SEED)
    model, x, target = SequenceFirst(), torch.randn(5, 8, 6), torch.randn(5, 8, 3)
    with live(model, x, lambda out: (out - target).square().mean()) as graph:
        found = largest_examples(graph)

    def rows(output):
        return squared_error(output.transpose(0, 1), target.transpose(0, 1))

    assert_agree(found, *expected(model, x, rows))
    assert found.notes == (largest.OTHER_DIMENSION.format(dim=1),)


@pytest.mark.parametrize("shape", [(5, 8), (6, 6)])
def test_transposed_inside(shape):
    """A batch that the model turns to sequence-first stays the first dimension of its input."""
    torch.manual_seed(SEED)
    model = Transposed()
    tokens, targets = torch.randint(0, 11, shape), torch.randint(0, 11, shape)

    def rows(output):
        return cross_entropy(output.view(*shape, 11), targets)

    with live(model, tokens, rows) as graph:
        found = largest_examples(graph)
    assert_agree(found, *expected(model, tokens, rows))
    assert found.notes == ()


def test_as_many_examples_as_time_steps():
    """Where both are as many, the order in memory says which dimension is the batch."""
    torch.manual_seed(SEED)
    model, x, target = SequenceFirst(), torch.randn(6, 6, 6), torch.randn(6, 6, 3)

    def rows(output):
        return squared_error(output.transpose(0, 1), target.transpose(0, 1))

    with live(model, x, rows) as graph:
        found = largest_examples(graph)
    assert_agree(found, *expected(model, x, rows))


@pytest.mark.parametrize("name", ["mlp", "cnn", "transformer", "lstm", "complex"])
@pytest.mark.parametrize("penalty", [0.0, 0.3])
def test_loss_inside_of_the_module(name, penalty):
    """From a scalar the rows of what it was reduced from are told apart; a penalty is no example."""
    case = zoo.make_case(name)
    x, target = case.batch(0)
    rows = cross_entropy if name in zoo.ON_TOKENS else squared_error
    model = WithLoss(case.model, rows, penalty)
    with live(model, x, None, target) as graph:
        found = largest_examples(graph)
    each = parts(case.model, x, lambda output: rows(output, target))
    weights = torch.cat([_real(float64.widen(p)) for p in case.model.parameters()])
    whole = each.sum(0) + 2 * penalty * weights
    assert_agree(found, each.norm(dim=1), each @ whole / (whole @ whole))
    assert bool(found.notes) == bool(penalty)
    if penalty:
        share = float(2 * penalty * weights @ whole / (whole @ whole))
        assert found.notes == (largest.SHARED_PART.format(share=share),)


@pytest.mark.parametrize("loss", ["mse", "nll", "twice"])
def test_losses_of_torch_inside_of_the_module(loss):
    """Also a loss of torch that is one node, and one whose rows are used twice."""
    torch.manual_seed(SEED)
    model, x = nn.Linear(6, 4), torch.randn(8, 6)
    x[5] *= 9
    numbers, classes = torch.randn(8, 4), torch.randint(0, 4, (8,))

    def rows(output):
        mse = F.mse_loss(output, numbers.to(output.dtype), reduction="none").mean(1) / 8
        nll = F.cross_entropy(output, classes, reduction="none") / 8
        return {"mse": mse, "nll": nll, "twice": nll + output.mean(1) / 8}[loss]

    def whole(output, _):
        if loss == "mse":
            return F.mse_loss(output, numbers)
        nll = F.cross_entropy(output, classes)
        return nll if loss == "nll" else nll + output.mean()

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return whole(self.model(x), None)

    with live(Whole(), x, None) as graph:
        found = largest_examples(graph)
    assert_agree(found, *expected(model, x, rows))


class Mean(nn.Module):
    """A loss of the mean over the batch, which has as many features as there are examples."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 8)

    def forward(self, x):
        return (self.layer(x).mean(0) - 1).square().sum()


def test_a_mean_over_the_batch_is_no_batch():
    """Features of a mean over the batch are not taken for examples, however many there are."""
    torch.manual_seed(SEED)
    model, x = Mean(), torch.randn(8, 6)
    with live(model, x, None) as graph:
        found = largest_examples(graph)
    with torch.no_grad():
        start = 2 * (model.layer(x).mean(0) - 1).double() / 8
    assert_agree(found, *expected(model.layer, x, lambda output: output @ start))


def test_what_cannot_be_told_is_not():
    """Without a batch dimension, and with gradients of zero, no example is named."""
    torch.manual_seed(SEED)
    model, x, rows = zoo_case("mlp")
    with live(model, x, rows) as graph:
        unknown = LiveGraph(graph.outputs, graph.gradients, graph.parameters, ())
        other = LiveGraph(graph.outputs, graph.gradients, graph.parameters, (5, 7))
        zero = LiveGraph(
            graph.outputs, [torch.zeros_like(graph.gradients[0])], graph.parameters, (8, 6)
        )
        bad = LiveGraph(graph.outputs, [graph.gradients[0] * math.nan], graph.parameters, (8, 6))
        assert largest_examples(unknown) == ((), (largest.NO_BATCH,))
        assert largest_examples(other) == ((), (largest.NO_BATCH,))
        assert largest_examples(zero) == ((), (largest.NO_GRADIENT,))
        assert largest_examples(bad) == ((), (largest.NOT_FINITE,))


class Clip(torch.autograd.Function):
    """Changes no value, and normalizes the gradient of the batch: not linear."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient / gradient.norm() ** 0.5


class Numpy(torch.autograd.Function):
    """Multiplies by 3 in a backward that cannot be differentiated."""

    @staticmethod
    def forward(ctx, x):
        return x * 3

    @staticmethod
    def backward(ctx, gradient):
        return torch.from_numpy(gradient.detach().numpy() * 3)


class Using(nn.Module):
    """Two layers with a custom Function between them."""

    def __init__(self, function):
        super().__init__()
        self.enter = nn.Linear(6, 4)
        self.function = function
        self.leave = nn.Linear(4, 3)

    def forward(self, x):
        return self.leave(self.function(torch.tanh(self.enter(x))))


@pytest.mark.parametrize("batch", [8, 64])
def test_a_backward_that_is_not_linear(batch):
    """A Function that clips gradients leaves no parts, and it says so."""
    torch.manual_seed(SEED)
    model, x, target = Using(Clip.apply), torch.randn(batch, 6), torch.randn(batch, 3)
    with live(model, x, in_double(squared_error, target)) as graph:
        found = largest_examples(graph)
    assert found == ((), (largest.NOT_LINEAR,))


@pytest.mark.parametrize("batch", [8, 64])
def test_a_backward_that_has_no_derivative(batch):
    """Through a Function in NumPy the examples are searched for, and those found are right."""
    torch.manual_seed(SEED)
    model, x, target = Using(Numpy.apply), torch.randn(batch, 6), torch.randn(batch, 3)
    target[[1, 5, 6]] += torch.tensor([[90.0], [-70.0], [50.0]])
    with live(model, x, in_double(squared_error, target)) as graph:
        found = largest_examples(graph)
    plain = Using(lambda x: x * 3)
    plain.load_state_dict(model.state_dict())
    assert_agree(found, *expected(plain, x, in_double(squared_error, target)))


@pytest.mark.parametrize("batch", [4, 64, 512])
@pytest.mark.parametrize("function", [Numpy.apply, torch.nn.functional.relu], ids=["numpy", "relu"])
@pytest.mark.parametrize("where", ["input", "target"])
def test_a_planted_outlier_is_named_first(batch, function, where):
    """One example, too large in the input or in the target, is found in few backwards."""
    torch.manual_seed(SEED)
    model, x, target = Using(function), torch.randn(batch, 6), torch.randn(batch, 3)
    culprit = batch * 2 // 3
    (target if where == "target" else x)[culprit] *= 1e4
    if where == "input":
        model.forward = lambda x: model.leave(function(model.enter(x)))
    backwards = []
    with live(model, x, in_double(squared_error, target)) as graph:
        model.leave.bias.register_hook(backwards.append)
        found = largest_examples(graph)
    assert found.shares[0].name == str(culprit)
    assert 0.9 < found.shares[0].share < 1.1
    assert len(backwards) <= SEARCH + MOST + 1
    if function != Numpy.apply:
        assert len(backwards) <= MOST + 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("function", [Numpy.apply, torch.tanh], ids=["numpy", "tanh"])
def test_half_precision_with_a_loss_scale(dtype, function):
    """In float16 and bfloat16 the shares are right to the digits they have, the norms unscaled."""
    if function == Numpy.apply and dtype is torch.bfloat16:
        pytest.skip("NumPy has no bfloat16")
    torch.manual_seed(SEED)
    model, x = Using(function).to(dtype), torch.randn(16, 6).to(dtype)
    target = torch.randn(16, 3)
    target[[3, 7, 11]] += torch.tensor([[30.0], [20.0], [12.0]])
    rows = in_double(squared_error, target)
    scale = 256.0
    with live(model, x, rows, scale=scale) as graph:
        found = largest_examples(graph, scale)
    plain = Using(torch.tanh if function is torch.tanh else lambda x: x * 3)
    plain.load_state_dict(model.state_dict())
    rel = 0.005 if dtype is torch.float16 else 0.04
    assert_agree(found, *expected(plain, x, rows), rel=rel)


class Attention(nn.Module):
    """Causal attention through scaled_dot_product_attention, checkpointed or not."""

    def __init__(self, checkpointed, dropout=0.0):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.enter = nn.Linear(8, 24)
        self.leave = nn.Linear(8, 11)
        self.checkpointed = checkpointed
        self.dropout = dropout

    def attend(self, hidden):
        heads = self.enter(hidden).unflatten(-1, (6, 4)).transpose(1, 2).chunk(3, 1)
        return F.scaled_dot_product_attention(*heads, None, self.dropout, is_causal=True)

    def forward(self, tokens):
        hidden = self.embedding(tokens)
        if self.checkpointed:
            hidden = hidden + checkpoint(self.attend, hidden, use_reentrant=False).flatten(2).view(
                hidden.shape
            )
        else:
            hidden = hidden + self.attend(hidden).flatten(2).view(hidden.shape)
        return self.leave(hidden)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_attention_is_differentiated_twice(checkpointed):
    """A fused attention, whose backward has no derivative, is replaced: few backwards are enough."""
    torch.manual_seed(SEED)
    model = Attention(checkpointed)
    tokens, targets = torch.randint(0, 11, (64, 6)), torch.randint(0, 11, (64, 6))

    def rows(output):
        return cross_entropy(output, targets)

    backwards = []
    with live(model, tokens, rows) as graph:
        model.leave.bias.register_hook(backwards.append)
        found = largest_examples(graph)
    assert_agree(found, *expected(model, tokens, rows))
    assert len(backwards) == MOST + 1


def test_autocast():
    """Under autocast the gradients of float32 weights are split like others."""
    torch.manual_seed(SEED)
    model, x, rows = zoo_case("mlp")
    x[4] *= 20
    with torch.autocast("cpu", torch.bfloat16):
        output = model(x)
    cut = output.detach().requires_grad_()
    (start,) = torch.autograd.grad(rows(cut.float()).sum(), cut)
    graph = LiveGraph([output], [start], dict(model.named_parameters()), tuple(x.shape))
    found = largest_examples(graph)
    norms, shares = expected(model, x, rows)
    assert found.shares[0].name == str(int(shares.argmax()))
    assert found.shares[0].share == pytest.approx(float(shares.max()), rel=0.05)
    assert found.shares[0].norm == pytest.approx(float(norms[shares.argmax()]), rel=0.05)


def test_gradients_whose_squares_overflow():
    """A gradient of 1e30, of norm inf in float32, has finite shares: those of the gradient itself."""
    model, x, rows = zoo_case("mlp")
    plain = expected(model, x, rows)
    with live(model, x, rows, scale=1e30) as graph:
        found = largest_examples(graph, 1e30)
        gradients = torch.autograd.grad(
            graph.outputs, list(graph.parameters.values()), graph.gradients
        )
    assert_agree(found, *plain)
    assert math.isinf(torch.cat([g.flatten() for g in gradients]).norm())
    named = largest_parameters(dict(zip(graph.parameters, gradients, strict=True)), 1e30)
    small, x, rows = zoo_case("mlp")
    rows(small(x)).sum().backward()
    norms = float64.gradient_norms(dict(small.named_parameters()))
    total = float64.total(norms)
    assert [one.name for one in named] == sorted(norms, key=norms.get, reverse=True)[:MOST]
    for one in named:
        assert one.norm == pytest.approx(norms[one.name], rel=1e-5)
        assert one.share == pytest.approx((norms[one.name] / total) ** 2, rel=1e-5)


def test_several_outputs():
    """A model with two outputs, one of them a scalar, has shares of both."""
    torch.manual_seed(SEED)
    model, x = nn.Linear(6, 3), torch.randn(8, 6)
    with live(model, x, lambda out: out.square().sum(1)) as graph:
        output = graph.outputs[0]
        penalty = model.weight.square().sum()
        both = LiveGraph(
            [output, penalty], [graph.gradients[0], torch.ones(())], graph.parameters, (8, 6)
        )
        found = largest_examples(both)
    each = parts(model, x, lambda out: out.square().sum(1))
    whole = each.sum(0)
    whole[:18] += 2 * model.weight.detach().double().flatten()
    assert_agree(found, each.norm(dim=1), each @ whole / (whole @ whole))


def test_the_graph_stays_alive():
    """A backward after it gives the gradients it would have given."""
    model, x, rows = zoo_case("cnn")
    with live(model, x, rows) as graph:
        parameters = list(graph.parameters.values())
        before = torch.autograd.grad(graph.outputs, parameters, graph.gradients, retain_graph=True)
        largest_examples(graph)
        after = torch.autograd.grad(graph.outputs, parameters, graph.gradients)
    assert all(map(torch.equal, before, after))
    assert all(p.grad is None for p in parameters)


@pytest.mark.parametrize("name", ["mlp", "transformer", "sparse", "cnn"])
def test_shares_of_all_examples_add_up_to_one(name, monkeypatch):
    """Of all examples, whichever way they were found."""
    monkeypatch.setattr(largest, "MOST", 8)
    model, x, rows = zoo_case(name)
    with live(model, x, rows) as graph:
        found = largest_examples(graph)
        monkeypatch.setattr(largest._Parts, "by_derivative", lambda self: [])
        searched = largest_examples(graph)
    assert len(found.shares) == len(x)
    assert math.fsum(one.share for one in found.shares) == pytest.approx(1.0, abs=1e-5)
    assert [one.name for one in searched.shares] == [one.name for one in found.shares]
    for one, other in zip(searched.shares, found.shares, strict=True):
        assert one.share == pytest.approx(other.share, abs=1e-5)


@given(
    batch=st.integers(1, 40),
    seed=st.integers(0, 10_000),
    exponents=st.lists(st.integers(-12, 12), min_size=40, max_size=40),
)
@settings(max_examples=40)
def test_any_sizes_of_the_examples(batch, seed, exponents):
    """Whatever the sizes: shares are finite, right and in order, and no more than 1 in all for a sum."""
    torch.manual_seed(seed)
    model, x = nn.Linear(3, 2), torch.randn(batch, 3)
    factors = 10.0 ** torch.tensor(exponents[:batch], dtype=torch.float32)

    def rows(output):
        return (output * factors.to(output.dtype)[:, None]).sum(1)

    with live(model, x, rows) as graph:
        found = largest_examples(graph)
    norms, shares = expected(model, x, rows)
    assert all(math.isfinite(one.share) and math.isfinite(one.norm) for one in found.shares)
    assert len(found.shares) == min(MOST, batch)
    for one in found.shares:
        assert one.share == pytest.approx(float(shares[int(one.name)]), rel=1e-3, abs=1e-4)
        assert one.norm == pytest.approx(float(norms[int(one.name)]), rel=1e-3)
    best = shares.sort(descending=True).values[:MOST].tolist()
    assert [one.share for one in found.shares] == pytest.approx(best, rel=1e-3, abs=1e-4)


def test_window_of_micro_batches():
    """The examples are those of the micro-batch with the largest part of the window's gradient."""
    torch.manual_seed(SEED)
    model = zoo.small()
    batches = [(torch.randn(6, 4), torch.randn(6, 1)) for _ in range(4)]
    batches[2][1][5] = 50.0
    runs = [partial(live, model, x, in_double(squared_error, y)) for x, y in batches]
    for x, y in batches:
        squared_error(model(x), y).sum().backward()
    gradients = float64.gradients(model)
    found = largest_of_window(runs, gradients)
    assert found.micro_batch == 3
    x, y = batches[2]
    assert_agree(found, *expected(model, x, in_double(squared_error, y)))
    each = torch.stack([parts(model, x, in_double(squared_error, y)).sum(0) for x, y in batches])
    whole = each.sum(0)
    share = float(each[2] @ whole / (whole @ whole))
    assert found.notes == (largest.ONE_OF_MANY.format(index=3, count=4, share=share),)


def test_a_window_of_one_micro_batch_runs_once():
    """With one micro-batch there is nothing to choose."""
    model, x, rows = zoo_case("mlp")
    runs = []

    def run():
        runs.append(1)
        return live(model, x, rows)

    found = largest_of_window([run], {})
    assert (found.micro_batch, len(runs)) == (1, 1)
    assert_agree(found, *expected(model, x, rows))


def test_an_error_of_a_replay_is_a_note():
    """A replay that fails raises nothing."""

    def run():
        raise ValueError("no such file\nand more")

    assert largest_of_window([run], {}) == (0, (), (largest.NOT_RUN.format(error="no such file"),))


def test_a_window_that_gives_other_gradients():
    """Where the sum of the replays does not point along the step's gradients, nothing is named."""
    model, x, rows = zoo_case("mlp")
    runs = [partial(live, model, x, rows)] * 2
    (-rows(model(x)).sum()).backward()
    found = largest_of_window(runs, float64.gradients(model))
    assert found == (0, (), (largest.OTHER_GRADIENTS,))


@pytest.mark.parametrize("left", [0.0, math.nan])
def test_a_window_whose_gradients_are_lost(left):
    """Where a clip has left zeros or NaN, the micro-batch with the largest norm is taken."""
    model, x, rows = zoo_case("mlp")
    runs = [partial(live, model, x, rows, scale=scale) for scale in (1.0, 3.0, 2.0)]
    lost = {name: torch.full_like(one, left) for name, one in model.named_parameters()}
    found = largest_of_window(runs, lost, 3.0)
    assert_agree(found, *expected(model, x, rows))
    assert found.micro_batch == 2
    assert found.notes == (largest.LARGEST_OF_MANY.format(index=2, count=3),)


@pytest.mark.parametrize("name", list(zoo.MODELS))
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_parameters_of_each_model(name):
    """Norms and shares of parameters are those in float64; frozen and unused ones are not named."""
    case = zoo.make_case(name)
    x, target = case.batch(0)
    x = x.requires_grad_() if x.is_floating_point() else x
    case.loss(case.model, (x, target)).backward()
    gradients = float64.gradients(case.model)
    norms = float64.norms(gradients)
    total = float64.total(norms)
    found = largest_parameters(gradients)
    assert [one.name for one in found] == sorted(norms, key=norms.get, reverse=True)[:MOST]
    for one in found:
        assert one.norm == pytest.approx(norms[one.name], rel=1e-7)
        assert one.share == pytest.approx((norms[one.name] / total) ** 2, rel=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_parameters_at_the_edge_of_their_range(dtype):
    """Nothing overflows or underflows, at either end of the range of a dtype."""
    for edge in (min(torch.finfo(dtype).max, 1e300), torch.finfo(dtype).tiny):
        gradients = {
            "large": torch.full((12,), edge, dtype=dtype),
            "small": torch.full((4,), edge, dtype=dtype),
            "zero": torch.zeros(3, dtype=dtype),
        }
        first, second = largest_parameters(gradients, 4.0)
        assert (first.name, second.name) == ("large", "small")
        assert first.share == pytest.approx(0.75)
        assert second.share == pytest.approx(0.25)
        assert second.norm == pytest.approx(edge / 2)


def test_no_parameter_to_name():
    """Without a finite gradient above zero none is named."""
    assert largest_parameters({}) == ()
    assert largest_parameters({"w": torch.zeros(3), "e": torch.zeros(0)}) == ()
    assert largest_parameters({"w": torch.tensor([1.0, math.nan]), "b": torch.ones(1)}) == ()
    assert largest_parameters({"w": torch.tensor([1.0, math.inf]), "b": torch.ones(1)}) == ()
    assert largest_by_norm({"w": math.nan, "b": 1.0}) == ()


@given(st.lists(st.floats(0.0, 1e300), min_size=1, max_size=MOST))
def test_shares_of_parameters_add_up_to_one(norms):
    """Of as many parameters as are named."""
    found = largest_by_norm({str(i): norm for i, norm in enumerate(norms)})
    assert math.fsum(one.share for one in found) == pytest.approx(1.0 if any(norms) else 0.0)
