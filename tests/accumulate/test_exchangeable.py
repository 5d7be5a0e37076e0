"""The noise scale is estimated from micro-batches of one loss, and from nothing that looks like it."""

import contextlib
import copy
import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gradwatch
from gradwatch.accumulate.exchangeable import Exchangeability
from gradwatch.hooks import callers
from tests.support.noise import KnownCovariance, draws

WINDOWS = 80
ALIKE = 20  # windows that an estimate needs


class Batches:
    """Random inputs and targets of a regression, the same for each test."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(5)

    def __call__(self, size: int = 8) -> tuple[Tensor, Tensor]:
        x = torch.randn(size, 6, generator=self.generator)
        noise = torch.randn(size, 1, generator=self.generator)
        return x, x.sum(1, keepdim=True) + noise


def perceptron() -> nn.Sequential:
    """Return a network of three layers with two heads' worth of outputs."""
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 1))


class Loop(NamedTuple):
    """A model, and what runs all backwards of one of its steps."""

    model: nn.Module
    window: Callable[[int], None]


def _run(loop: Loop, lr: float = 1e-3, windows: int = WINDOWS, **options) -> gradwatch.Watcher:
    optimizer = torch.optim.SGD(loop.model.parameters(), lr=lr)
    with gradwatch.watch(loop.model, optimizer, **options) as watcher:
        for window in range(windows):
            loop.window(window)
            optimizer.step()
            optimizer.zero_grad()
    return watcher


def _mse(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


# -- what must not give a number ------------------------------------------------------------------


def _gan(generates: bool) -> Loop:
    data = torch.Generator().manual_seed(1)
    critic = nn.Sequential(nn.Linear(4, 16), nn.LeakyReLU(0.2), nn.Linear(16, 1))
    generator = nn.Linear(4, 4)

    def window(number: int) -> None:
        real, fake = (torch.randn(8, 4, generator=data) + sign for sign in (1, -1))
        if generates:
            fake = generator(fake).detach()
        F.binary_cross_entropy_with_logits(critic(real), torch.ones(8, 1)).backward()
        F.binary_cross_entropy_with_logits(critic(fake), torch.zeros(8, 1)).backward()

    return Loop(critic, window)


def _heads(shared: bool) -> Loop:
    batches, trunk = Batches(), nn.Linear(6, 8)
    heads = nn.ModuleList([nn.Linear(8, 1), nn.Linear(8, 1)])

    def window(number: int) -> None:
        x, y = batches()
        hidden = trunk(x)
        for head in heads:
            F.mse_loss(head(hidden if shared else trunk(x)), y).backward(retain_graph=shared)

    return Loop(nn.ModuleList([trunk, heads]), window)


def _one_forward() -> Loop:
    batches, model = Batches(), nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 1))

    def window(number: int) -> None:
        x, y = batches()
        out = model(x)
        F.mse_loss(out, y).backward(retain_graph=True)
        F.mse_loss(out, y + 0.1).backward()

    return Loop(model, window)


def _same_data() -> Loop:
    batches, model = Batches(), perceptron()

    def window(number: int) -> None:
        x, y = batches()
        _mse(model, (x, y)).backward()
        _mse(model, (x, y.roll(1, 0))).backward()

    return Loop(model, window)


def _first_and_third() -> Loop:
    batches, model = Batches(), perceptron()

    def window(number: int) -> None:
        first, second = batches(), batches()
        for batch in (first, second, first):
            (_mse(model, batch) / 3).backward()

    return Loop(model, window)


def _same_in_bfloat16() -> Loop:
    batches, model = Batches(), nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.3), nn.Linear(8, 1))

    def window(number: int) -> None:
        x, y = batches()
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                out = model(x)
            F.mse_loss(out.float(), y).backward()

    return Loop(model, window)


def _same_tokens() -> Loop:
    model = nn.Sequential(nn.Embedding(50, 8), nn.Dropout(0.3), nn.Linear(8, 1))
    draw = torch.Generator().manual_seed(3)

    def window(number: int) -> None:
        tokens = torch.randint(0, 50, (8, 6), generator=draw)[:, 1:]
        for _ in range(2):
            model(tokens).square().mean().backward()

    return Loop(model, window)


def _other_graphs() -> Loop:
    batches, model = Batches(), perceptron()

    def window(number: int) -> None:
        _mse(model, batches()).backward()
        x, y = batches()
        F.l1_loss(model(x), y).backward()

    return Loop(model, window)


def _penalty() -> Loop:
    batches, model = Batches(), perceptron()

    def window(number: int) -> None:
        _mse(model, batches()).backward()
        x = batches()[0].requires_grad_()
        (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        slope.square().sum(1).mean().backward()

    return Loop(model, window)


def _weighted() -> Loop:
    batches, model = Batches(), perceptron()

    def window(number: int) -> None:
        (0.65 * _mse(model, batches())).backward()
        (0.35 * _mse(model, batches())).backward()

    return Loop(model, window)


def _sizes() -> Loop:
    batches, model = Batches(), perceptron()

    def window(number: int) -> None:
        (_mse(model, batches(32)) / 2).backward()
        (_mse(model, batches(4)) / 2).backward()

    return Loop(model, window)


def _disjoint() -> Loop:
    batches, models = Batches(), nn.ModuleList([perceptron(), perceptron()])

    def window(number: int) -> None:
        for model in models:
            _mse(model, batches()).backward()

    return Loop(models, window)


def _tasks_in_any_order() -> Loop:
    batches, model = Batches(), perceptron()
    order = torch.Generator().manual_seed(0)

    def window(number: int) -> None:
        for task in torch.randperm(2, generator=order).tolist():
            x, y = batches()
            (F.mse_loss if task else F.l1_loss)(model(x), y).backward()

    return Loop(model, window)


def _running_mean() -> Loop:
    batches, model = Batches(), perceptron()

    def window(number: int) -> None:
        for count in range(3):
            if count:
                for parameter in model.parameters():
                    parameter.grad.mul_(count / (count + 1))
            (_mse(model, batches()) / (count + 1)).backward()

    return Loop(model, window)


def _chunks() -> Loop:
    batches, body, head = Batches(), nn.Sequential(nn.Linear(6, 8), nn.Tanh()), nn.Linear(8, 1)

    def window(number: int) -> None:
        x, y = batches()
        hidden = body(x)
        cut = hidden.detach().requires_grad_()
        for part, target in zip(cut.chunk(4), y.chunk(4), strict=True):
            (F.mse_loss(head(part), target) / 4).backward()
        hidden.backward(cut.grad)

    return Loop(nn.ModuleList([body, head]), window)


REFUSED = {
    "real and fake": (lambda: _gan(False), "in the same way in every step"),
    "real and generated": (lambda: _gan(True), "in the same way in every step"),
    "two heads": (lambda: _heads(False), "different parameters"),
    "two heads on one forward": (lambda: _heads(True), "different parameters"),
    "two losses on one forward": (_one_forward, "the same forward"),
    "two losses on the same data": (_same_data, "the same data"),
    "the same data first and third": (_first_and_third, "the same data"),
    "the same data in bfloat16": (_same_in_bfloat16, "the same data"),
    "the same tokens": (_same_tokens, "the same data"),
    "two kinds of loss": (_other_graphs, "graphs of the backwards"),
    "a penalty on the gradient": (_penalty, "different parameters"),
    "weighted losses": (_weighted, "different weight"),
    "different sizes": (_sizes, "different sizes"),
    "disjoint models": (_disjoint, "different parameters"),
    "tasks in any order": (_tasks_in_any_order, "graphs of the backwards"),
    "a running mean": (_running_mean, "changed between two backwards"),
    "chunks": (_chunks, "different parameters"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_micro_batch_gives_no_noise_scale(name):
    """Losses, parts of a loss and parts of a batch that are not exchangeable: none, and the reason."""
    torch.manual_seed(0)
    make, reason = REFUSED[name]
    watcher = _run(make())
    noise = watcher.noise_scale
    assert reason in noise.reason
    assert not noise.valid
    assert noise.suggested_micro_batches is None
    assert math.isnan(noise.b_simple)
    assert math.isnan(watcher.last.noise_scale)
    assert "batch_small" not in {finding.kind for finding in watcher.report().findings}


# -- what must give one ---------------------------------------------------------------------------


def _plain(
    model: nn.Module, count: int = 2, sizes: Callable[[int, int], int] | None = None
) -> Loop:
    batches = Batches()

    def window(number: int) -> None:
        for index in range(count):
            size = 8 if sizes is None else sizes(number, index)
            (_mse(model, batches(size)) / count).backward()

    return Loop(model, window)


def _with_dropout() -> Loop:
    return _plain(nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.3), nn.ReLU(), nn.Linear(16, 1)))


def _with_batch_norm() -> Loop:
    return _plain(nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 1)))


def _ragged() -> Loop:
    return _plain(
        perceptron(), sizes=lambda number, index: 3 if (number % 5, index) == (4, 1) else 8
    )


def _lengths() -> Loop:
    lengths = torch.Generator().manual_seed(3)
    return _plain(
        perceptron(), 3, lambda number, index: int(torch.randint(2, 12, (1,), generator=lengths))
    )


class Checkpointed(nn.Module):
    """A perceptron whose body is computed again in the backward."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.body, self.reentrant = perceptron(), reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        return checkpoint(self.body, x, use_reentrant=self.reentrant)


class Experts(nn.Module):
    """A layer of experts, each of which sees the examples that are sent to it, or none."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
        self.experts = nn.ModuleList(nn.Linear(8, 1) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.trunk(x)
        out = torch.zeros(len(x), 1)
        chosen = (x[:, 0].abs() * 100).long() % len(self.experts)
        for number, expert in enumerate(self.experts):
            mine = (chosen == number).nonzero()[:, 0]
            if len(mine):
                out = out.index_add(0, mine, expert(hidden[mine]))
        return out


class Positions(nn.Module):
    """A small language model: the positions are the same tensor in each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(7, 8), nn.Embedding(6, 8)
        self.out = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        ids = (x.abs() * 10).long() % 7
        return self.out(torch.tanh(self.tokens(ids) + self.positions(torch.arange(6)))).mean(1)


class Frozen(nn.Module):
    """A perceptron whose first layer is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.body = perceptron()
        self.body[0].requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def _autocast() -> Loop:
    model, batches = perceptron(), Batches()

    def window(number: int) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            losses = [_mse(model, batches()) / 2 for _ in range(2)]
        for loss in losses:
            loss.backward()

    return Loop(model, window)


def _no_gradient_but_noise() -> Loop:
    model, draw = KnownCovariance(64), draws(1e4, 64, seed=1)

    def window(number: int) -> None:
        for _ in range(2):
            (model(draw(8)) / 2).backward()

    return Loop(model, window)


def _buckets() -> Loop:
    """Sentences of a window have one length, of the next window another one: as do their positions."""
    words, places, head = nn.Embedding(20, 8), nn.Embedding(32, 8), nn.Linear(8, 1)
    draw = torch.Generator().manual_seed(3)

    def window(number: int) -> None:
        for _ in range(2):
            tokens = torch.randint(0, 20, (8, 6 + number % 7), generator=draw)[:, 1:]
            hidden = words(tokens) + places(torch.arange(tokens.shape[1]))
            ((head(torch.tanh(hidden)) - 1).square().mean() / 2).backward()

    return Loop(nn.ModuleList([words, places, head]), window)


KEPT = {
    "two": lambda: _plain(perceptron()),
    "eight": lambda: _plain(perceptron(), 8),
    "dropout": _with_dropout,
    "batch norm": _with_batch_norm,
    "a ragged last batch": _ragged,
    "random lengths": _lengths,
    "checkpoint": lambda: _plain(Checkpointed(False)),
    "reentrant checkpoint": lambda: _plain(Checkpointed(True)),
    "experts": lambda: _plain(Experts(), 4),
    "buckets of one length": _buckets,
    "positions": lambda: _plain(Positions()),
    "a frozen layer": lambda: _plain(Frozen()),
    "one autocast": _autocast,
    "noise": _no_gradient_but_noise,
}


@pytest.mark.parametrize("name", KEPT)
def test_micro_batches_keep_their_noise_scale(name):
    """Whatever the model does at random: nearly every window counts."""
    torch.manual_seed(0)
    noise = _run(KEPT[name](), lr=1e-2 if name != "noise" else 0.0).noise_scale
    assert noise.updates >= WINDOWS - 2
    assert noise.low >= 0


@pytest.mark.parametrize("options", [{"accumulate": 4}, {}], ids=["managed", "own"])
@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))]
)
def test_a_long_honest_run_keeps_it(options, seed):
    """Over many windows chance never looks like a difference."""
    torch.manual_seed(seed)
    model, draw = KnownCovariance(64), draws(40.0, 64, seed=seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with gradwatch.watch(model, optimizer, **options) as watcher:
        for _ in range(300):
            for _ in range(4):
                watcher.backward(model(draw(8)))
            watcher.step(last=True) if options else optimizer.step()
            optimizer.zero_grad()
    assert watcher.noise_scale.updates == 300


@pytest.mark.slow
@pytest.mark.parametrize("truth", [0.1, 1.0, 4.0, 16.0, 100.0])
@pytest.mark.parametrize(("k", "windows"), [(2, 60), (8, 20)])
def test_200_watched_runs_hold_the_truth(truth, k, windows):
    """In a loop of the user's own the truth is within the interval in more than 90 % of runs."""
    b_simple = truth * 8 * k
    within = 0
    for seed in range(200):
        model, draw = KnownCovariance(64), draws(b_simple, 64, seed=seed)

        def window(number: int, model=model, draw=draw) -> None:
            for _ in range(k):
                (model(draw(8)) / k).backward()

        noise = _run(Loop(model, window), lr=0.0, windows=windows).noise_scale
        within += noise.low * 8 <= b_simple <= noise.high * 8  # it is in micro-batches of 8
    assert within >= 185


def test_an_estimate_begins_anew():
    """A loop that becomes one of micro-batches again gets a noise scale again."""
    torch.manual_seed(0)
    model, batches = perceptron(), Batches()

    def window(number: int) -> None:
        _mse(model, batches()).backward()
        x, y = batches()
        (F.l1_loss if number < 1 else F.mse_loss)(model(x), y).backward()

    noise = _run(Loop(model, window), windows=40).noise_scale
    assert noise.updates >= ALIKE


def test_without_the_graph_the_numbers_tell(monkeypatch):
    """Where torch does not show the graph, nothing fails, and nothing is refused that is fine."""
    monkeypatch.setattr(callers, "ENGINE_CODE", None)
    torch.manual_seed(0)
    assert _run(_plain(perceptron())).noise_scale.updates == WINDOWS
    assert not _run(_gan(False)).noise_scale.valid


def test_the_graph_changes_no_bit():
    """Looking at the graphs leaves the weights as they are without a watcher."""
    trained = []
    for watched in (False, True):
        torch.manual_seed(0)
        loop = _with_dropout()
        optimizer = torch.optim.SGD(loop.model.parameters(), lr=0.1)
        watch = gradwatch.watch(loop.model, optimizer) if watched else contextlib.nullcontext()
        with watch:
            for number in range(10):
                loop.window(number)
                optimizer.step()
                optimizer.zero_grad()
        trained.append(copy.deepcopy(loop.model.state_dict()))
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


def test_an_unknown_weight_is_no_evidence():
    """Without weights or sketches there is nothing to judge by."""
    judge = Exchangeability()
    assert judge.judge([], [None, None], [None, None], []) == ""
