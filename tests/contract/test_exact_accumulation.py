"""A window has the gradient of its whole batch at once: in float64 the weights differ by rounding only."""

import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gradwatch
from tests.support.float64 import gradients, norms

from .full_batch import (
    Batch,
    Make,
    Trained,
    Words,
    adamw,
    assert_equal,
    at_once,
    batch_of,
    count,
    empty,
    joined,
    loss_of,
    several,
    sgd,
    start,
    watched,
    weights_of,
    windows_of,
)

EQUAL = [[2, 2, 2], [2, 2, 2], [2, 2], [2], [2, 2, 2]]
UNEQUAL = [[2, 3, 1], [1, 4, 2], [5, 1], [3], [1, 1, 4]]

OPTIMIZERS: dict[str, Make] = {
    "sgd": functools.partial(sgd, foreach=True),
    "sgd_loop": functools.partial(sgd, foreach=False),
    "sgd_fused": functools.partial(sgd, fused=True),
    "adamw": functools.partial(adamw, foreach=True),
    "adamw_fused": functools.partial(adamw, fused=True),
    "several": several,
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)
with_or_without_scaler = pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])


def _scaler(scaled: bool, **options: Any) -> torch.amp.GradScaler | None:
    return torch.amp.GradScaler("cpu", init_scale=2.0**10, **options) if scaled else None


@every_optimizer
@with_or_without_scaler
def test_equal_windows(name: str, scaled: bool) -> None:
    """Without weights, micro-batches of equal size are the whole batch, also in short last windows."""
    windows, make = windows_of(EQUAL, ignored=0.0), OPTIMIZERS[name]
    options = {"accumulate": 3, "scaler": _scaler(scaled), "weigh": lambda part: None}
    assert_equal(watched(make, windows, **options), at_once(make, windows))


@every_optimizer
@with_or_without_scaler
def test_windows_weighed_by_tokens(name: str, scaled: bool) -> None:
    """Weighed by their targets, micro-batches of any size are the whole batch, also in short windows."""
    windows, make = windows_of(UNEQUAL), OPTIMIZERS[name]
    found = watched(make, windows, accumulate=3, scaler=_scaler(scaled))
    assert_equal(found, at_once(make, windows))


WEIGHTS: dict[str, Any] = {
    "int": count,
    "float": lambda part: float(count(part)),
    "fraction": lambda part: count(part) / 7,
    "tensor": lambda part: (part[1] != -100).sum(),
    "float tensor": lambda part: torch.tensor([count(part)], dtype=torch.float64),
    "int64": lambda part: np.int64(count(part)),
    "float32": lambda part: np.float32(count(part)),
    "huge": lambda part: count(part) * 1e200,
    "tiny": lambda part: count(part) * 1e-200,
}


@pytest.mark.parametrize("kind", WEIGHTS)
def test_weights_of_every_type(kind: str) -> None:
    """Weights may be numbers of Python or NumPy or tensors of one element, in any unit."""
    windows = windows_of(UNEQUAL)
    found = watched(sgd, windows, accumulate=3, weigh=WEIGHTS[kind])
    assert_equal(found, at_once(sgd, windows))


@pytest.mark.parametrize("place", [0, 1, 2])
@with_or_without_scaler
def test_a_micro_batch_that_weighs_nothing(place: int, scaled: bool) -> None:
    """A micro-batch without a target counts in the window and changes nothing, the first one too."""
    windows = windows_of(UNEQUAL)
    for window in windows:
        window.insert(place % (len(window) + 1), empty(batch_of(2, 77)))
    found = watched(sgd, windows, accumulate=4, scaler=_scaler(scaled))
    assert_equal(found, at_once(sgd, windows))
    assert list(found.steps()["micro_batches"]) == [4, 4, 3, 2, 4]


def test_a_window_that_weighs_nothing() -> None:
    """Where no micro-batch has a target the step has gradients of zero, and the next one is right."""
    windows = windows_of(UNEQUAL)
    windows[1] = [empty(part) for part in windows[1]]
    found = watched(sgd, windows, accumulate=3)
    assert_equal(found, at_once(sgd, windows))
    assert list(found.steps()["weight"])[1] == 0.0
    assert list(found.steps()["grad_norm"])[1] == 0.0


def _clip_norm(parameters: list[Tensor]) -> None:
    nn.utils.clip_grad_norm_(parameters, 0.05)


def _clip_value(parameters: list[Tensor]) -> None:
    nn.utils.clip_grad_value_(parameters, 0.01)


def _clip_each(parameters: list[Tensor]) -> None:
    for parameter in parameters:
        nn.utils.clip_grad_norm_([parameter], 0.02)


CLIPS: dict[str, tuple[Any, Any]] = {
    "number": (0.05, _clip_norm),
    "value": (gradwatch.ClipByValue(0.01), _clip_value),
    "parameter": (gradwatch.ClipByNorm(0.02, scope="parameter"), _clip_each),
}


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("name", ["sgd", "adamw_fused", "several"])
@with_or_without_scaler
def test_the_mean_is_what_is_clipped(clip: str, name: str, scaled: bool) -> None:
    """The clip sees the gradient of the whole batch, and does to it what torch's own clip does."""
    windows, make = windows_of(UNEQUAL), OPTIMIZERS[name]
    policy, by_torch = CLIPS[clip]
    found = watched(make, windows, accumulate=3, clip=policy, scaler=_scaler(scaled))
    expected = at_once(make, windows, clip=by_torch)
    assert_equal(found, expected)
    assert found.steps()["clipped"].any()
    unclipped = at_once(make, windows)
    assert not torch.equal(unclipped.weights["mix.weight"], expected.weights["mix.weight"])


POLICIES: dict[str, Any] = {
    "auto": lambda: "auto",
    "zclip": lambda: gradwatch.ZClip(warmup_steps=3),
    "group": lambda: gradwatch.ClipByNorm(0.02, scope="group"),
    "agc": gradwatch.AdaptiveGradientClip,
}


@pytest.mark.parametrize("policy", POLICIES)
@with_or_without_scaler
def test_every_policy_decides_as_over_the_whole_batch(policy: str, scaled: bool) -> None:
    """A policy clips a window by the factor by which it clips the whole batch."""
    windows = windows_of(UNEQUAL * 3)
    whole = [[joined(window)] for window in windows]
    make = OPTIMIZERS["several"]
    found = watched(make, windows, accumulate=3, clip=POLICIES[policy](), scaler=_scaler(scaled))
    expected = watched(make, whole, clip=POLICIES[policy](), weigh=lambda part: None)
    assert_equal(found, expected)
    for column in ("clip_coef", "grad_norm_clipped"):
        one, other = (list(run.steps()[column]) for run in (found, expected))
        assert one == pytest.approx(other, rel=1e-10)


@pytest.mark.parametrize("sparse", [False, True])
@with_or_without_scaler
def test_a_sparse_embedding(sparse: bool, scaled: bool) -> None:
    """A sparse gradient is weighed like a dense one, duplicate rows and tied weights included."""
    windows, model = windows_of(UNEQUAL), Words(sparse=sparse)
    found = watched(several, windows, model, accumulate=3, clip=0.2, scaler=_scaler(scaled))
    clip = functools.partial(nn.utils.clip_grad_norm_, max_norm=0.2)
    assert_equal(found, at_once(several, windows, Words(), clip=clip))


SPLITS = [1, 2, 3, 5, 50]


def _split(
    batches: list[list[Batch]], size: int, scaled: bool, tokens: bool, **options: Any
) -> Trained:
    """Train on windows of batches, each of them split."""
    model, optimizers = start(several, None)
    with gradwatch.watch(model, optimizers, scaler=_scaler(scaled), **options) as watcher:
        for window in batches:
            for index, batch in enumerate(window):
                for part in watcher.micro_batches(batch, size):
                    weight = count(part) if tokens else None
                    watcher.backward(loss_of(model, part), weight=weight)
                ends = index + 1 == len(window)
                assert watcher.step(last=ends) is ends
    return Trained(weights_of(model), watcher=watcher)


@pytest.mark.parametrize("size", SPLITS)
@pytest.mark.parametrize("tokens", [False, True], ids=["examples", "tokens"])
@with_or_without_scaler
def test_split_batches_are_whole_ones(size: int, tokens: bool, scaled: bool) -> None:
    """A batch in parts, weighed by examples or by tokens, is the batch at once, alone in its window."""
    windows = windows_of([[5], [6], [1], [4]], ignored=0.4 if tokens else 0.0)
    found = _split(windows, size, scaled, tokens)
    assert_equal(found, at_once(several, windows))
    assert list(found.steps()["micro_batches"]) == [-(-n // size) for n in (5, 6, 1, 4)]
    wanted = [count(w[0]) for w in windows] if tokens else [5.0, 6.0, 1.0, 4.0]
    assert list(found.steps()["weight"]) == wanted


@pytest.mark.parametrize("size", SPLITS)
@pytest.mark.parametrize("tokens", [False, True], ids=["examples", "tokens"])
def test_split_batches_count_as_one(size: int, tokens: bool) -> None:
    """With accumulate=3, three batches make a step however many parts each was run in."""
    sizes = [[5, 2, 4], [3, 3, 3], [4, 1], [1, 6, 2]]
    windows = windows_of(sizes, ignored=0.4 if tokens else 0.0)
    found = _split(windows, size, False, tokens, accumulate=3, clip=0.05)
    clip = functools.partial(nn.utils.clip_grad_norm_, max_norm=0.05)
    assert_equal(found, at_once(several, windows, clip=clip))
    parts = [sum(-(-n // size) for n in window) for window in sizes]
    assert list(found.steps()["micro_batches"]) == parts


@with_or_without_scaler
@pytest.mark.parametrize("clip", [None, 0.05])
def test_records_are_those_of_the_whole_batch(clip: float | None, scaled: bool) -> None:
    """Weight, loss and norms before and after the clip are those of the whole batch at once."""
    windows = windows_of(UNEQUAL)
    found = watched(sgd, windows, accumulate=3, clip=clip, scaler=_scaler(scaled))
    expected = at_once(sgd, windows, clip=_clip_norm if clip else lambda parameters: None)
    steps = found.steps()
    assert list(steps["weight"]) == [sum(map(count, window)) for window in windows]
    assert list(steps["micro_batches"]) == [3, 3, 2, 1, 3]
    assert list(steps["loss"]) == pytest.approx(expected.losses, rel=1e-12)
    assert list(steps["grad_norm"]) == pytest.approx(expected.norms, rel=1e-10)
    assert list(steps["grad_norm_clipped"]) == pytest.approx(expected.clipped, rel=1e-6)
    assert list(steps["outcome"]) == ["applied"] * 5


def test_norms_per_parameter_are_those_of_the_whole_batch() -> None:
    """The parameters' own norms carry the correction of a short window too."""
    windows = windows_of([[2, 3, 1], [4, 1]])
    model, optimizers = start(sgd, None)
    expected = []
    for window in windows:
        loss_of(model, joined(window)).backward()
        expected += norms(gradients(model)).values()
        optimizers[0].step()
        optimizers[0].zero_grad()
    found = watched(sgd, windows, accumulate=3).watcher.history.parameters()
    assert sorted(found["grad_norm"]) == pytest.approx(sorted(expected), rel=1e-6)


def test_weighed_and_unweighed_micro_batches_in_one_window() -> None:
    """A micro-batch without a weight weighs 1 beside one with a weight, whichever came first."""
    for given in ((None, 3), (3, None)):
        model, optimizers = start(sgd, None)
        parts = [batch_of(1 if w is None else w, seed, ignored=0.0) for seed, w in enumerate(given)]
        with gradwatch.watch(model, optimizers) as watcher:
            for weight, part in zip(given, parts, strict=True):
                watcher.backward(loss_of(model, part), weight=weight)
            watcher.step()
        expected = at_once(sgd, [parts])
        assert_equal(Trained(weights_of(model)), expected)
        assert watcher.last.weight == 4.0
        assert watcher.last.loss == pytest.approx(expected.losses[0], rel=1e-12)


def test_without_weights_and_accumulation_backwards_add_up() -> None:
    """With accumulate=1 and no weights two backwards before a step are a sum, as without gradwatch."""
    model, optimizers = start(sgd, None)
    twin, by_hand = start(sgd, None)
    parts = [batch_of(2, seed) for seed in range(4)]
    with gradwatch.watch(model, optimizers) as watcher:
        for index, part in enumerate(parts):
            watcher.backward(loss_of(model, part))
            loss_of(twin, part).backward()
            if index % 2:
                watcher.step()
                by_hand[0].step()
                by_hand[0].zero_grad()
    assert_equal(Trained(weights_of(model)), Trained(weights_of(twin)))


def test_a_loss_for_each_optimizer() -> None:
    """Where each optimizer has a loss and backwards of its own, each window is its own mean."""
    models = [Words(), Words()]
    both = nn.ModuleList(models)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.3) for model in models]
    windows = windows_of(UNEQUAL)
    others = [[batch_of(3, 500 + 10 * w + i) for i in range(len(windows[w]))] for w in range(5)]
    with gradwatch.watch(both, optimizers, accumulate=3) as watcher:
        for window, other in zip(windows, others, strict=True):
            for index, parts in enumerate(zip(window, other, strict=True)):
                for model, part in zip(models, parts, strict=True):
                    watcher.backward(loss_of(model, part), weight=count(part))
                watcher.step(last=index + 1 == len(window))
    for model, mine, label in zip(models, (windows, others), ("SGD", "SGD-1"), strict=True):
        plain = at_once(lambda m: [torch.optim.SGD(m.parameters(), lr=0.3)], mine)
        assert_equal(Trained(weights_of(model)), plain)
        steps = watcher.history.steps()
        steps = steps[steps["optimizer"] == label]
        assert list(steps["loss"]) == pytest.approx(plain.losses, rel=1e-12)
        assert list(steps["grad_norm"]) == pytest.approx(plain.norms, rel=1e-10)
        assert list(steps["micro_batches"]) == [3, 3, 2, 1, 3]
