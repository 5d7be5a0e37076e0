"""The gradient noise scale, as a training loop gets it, against brute force and known truths."""

import copy
import math
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import gradwatch
from gradwatch.accumulate.splitting import split_batch
from gradwatch.testing import late_readings
from tests.support.calls import CountCalls
from tests.support.noise import (
    KnownCovariance,
    Oracle,
    draws,
    examples,
    gradient_of,
    regression,
    regression_loss,
)
from tests.support.state import identical, snapshot

WINDOWS = 12


def _expected(model, windows, sizes, weights):
    """What brute force says of the windows that were run on a model whose weights stay as they are."""
    oracle = Oracle()
    for window in range(windows):
        batches = [examples(window, index, size) for index, size in enumerate(sizes)]
        gradients = [gradient_of(model, lambda m, x=x: regression_loss(m, x)) for x in batches]
        oracle.add(list(zip(weights, gradients, strict=True)))
    return oracle


def _agrees(noise, oracle, rel=1e-9):
    assert noise.updates == len(oracle.terms)
    assert (noise.tr_sigma, noise.grad_sq) == pytest.approx(oracle.means, rel=rel)
    assert noise.b_simple == pytest.approx(oracle.b_simple, rel=rel, nan_ok=True)


def _managed(model, sizes, weighed, **options):
    """Runs managed windows with a learning rate of 0, and returns the watcher."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, fused=options.pop("fused", False))
    scaler = options.get("scaler")
    with gradwatch.watch(model, optimizer, accumulate=len(sizes), **options) as watcher:
        for window in range(WINDOWS):
            for index, size in enumerate(sizes):
                loss = regression_loss(model, examples(window, index, size))
                watcher.backward(loss, weight=size if weighed else None)
            assert watcher.step()
    assert scaler is None or watcher.last.loss_scale > 1
    return watcher


@pytest.mark.parametrize("sizes", [(4, 4), (4, 4, 4, 4), (8, 8, 8, 2), (1, 9, 3)])
@pytest.mark.parametrize(
    "options", [{}, {"clip": 0.1}, {"clip": gradwatch.ClipByValue(0.01)}, {"fused": True}]
)
def test_managed_windows_agree_with_brute_force(sizes, options):
    """Equal and unequal micro-batches, weighed by their examples: to the rounding of float64, clip or no clip."""
    model = regression()
    noise = _managed(model, sizes, weighed=True, **options).noise_scale
    _agrees(noise, _expected(model, WINDOWS, sizes, sizes))
    assert noise.batch == sum(sizes)


def test_without_weights_the_unit_is_a_micro_batch():
    """b_simple is then a number of micro-batches, and what is suggested is the nearest power of two."""
    model = regression()
    noise = _managed(model, (4, 4, 4), weighed=False).noise_scale
    _agrees(noise, _expected(model, WINDOWS, (4, 4, 4), (1, 1, 1)))
    assert noise.micro_batches == pytest.approx(noise.b_simple)
    assert noise.batch == 3


def test_a_scaler_changes_nothing():
    """Norms are those of the scaled loss; the noise scale is in true units."""
    model = regression()
    scaler = torch.amp.GradScaler("cpu", 2.0**10, growth_interval=3)
    noise = _managed(model, (8, 8, 2), weighed=True, scaler=scaler).noise_scale
    _agrees(noise, _expected(model, WINDOWS, (8, 8, 2), (8, 8, 2)))


@pytest.mark.parametrize("accumulate", [3, 1], ids=["declared", "not declared"])
@pytest.mark.parametrize("closure", [False, True])
def test_a_loop_of_the_users_own(accumulate, closure):
    """All micro-batches are seen where the loop is known to accumulate, else the first one and the sum."""
    model, oracle = regression(), Oracle()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def backward(window, index):
        loss = regression_loss(model, examples(window, index, 4)) / 3
        loss.backward()
        return loss

    with gradwatch.watch(model, optimizer, accumulate=accumulate) as watcher:
        for window in range(WINDOWS):
            backward(window, 0)
            backward(window, 1)
            if closure:
                optimizer.step(lambda window=window: backward(window, 2))
            else:
                backward(window, 2)
                optimizer.step()
            optimizer.zero_grad()
    if accumulate == 3:
        oracle = _expected(model, WINDOWS, (4, 4, 4), (1, 1, 1))
    else:
        for window in range(WINDOWS):
            batches = [examples(window, index, 4) for index in range(3)]
            grads = [gradient_of(model, lambda m, x=x: regression_loss(m, x)) for x in batches]
            small, large = (grads[0] ** 2).sum(), (sum(grads) ** 2).sum() / 9
            oracle.terms.append(((small - large) / (1 - 1 / 3), (3 * large - small) / 2))
    _agrees(watcher.noise_scale, oracle)


def test_split_batches_are_micro_batches_of_their_examples():
    """With micro_batches() the small batch is a part, and the unit of the suggestion the whole batch."""
    model = regression()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    oracle = Oracle()
    with gradwatch.watch(model, optimizer) as watcher:
        for window in range(WINDOWS):
            batch = examples(window, 0, 11)
            for part in watcher.micro_batches(batch, size=4):
                watcher.backward(regression_loss(model, part))
            assert watcher.step()
    assert watcher.last.weight == 11
    assert watcher.noise_scale.updates == WINDOWS
    assert watcher.noise_scale.batch == 11
    for window in range(WINDOWS):
        batch = examples(window, 0, 11)
        parts = [part for part, _ in split_batch(batch, size=4)]
        oracle.add(
            [(len(p), gradient_of(model, lambda m, p=p: regression_loss(m, p))) for p in parts]
        )
    _agrees(watcher.noise_scale, oracle)


@pytest.mark.parametrize(
    ("noise_scale", "micro_batches", "least"), [(16, 2, 9), (16, 4, 10), (64, 4, 8), (64, 8, 9)]
)
def test_the_estimate_comes_close_to_the_truth(noise_scale, micro_batches, least):
    """Micro-batches of 8 from a known covariance: 50 steps lead to within 20 % of tr(Sigma) / |G|^2."""
    near = 0
    for seed in range(10):
        draw, model = draws(noise_scale, 512, seed), KnownCovariance(512)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with gradwatch.watch(model, optimizer, accumulate=micro_batches) as watcher:
            for _ in range(50 * micro_batches):
                watcher.backward(model(draw(8)), weight=8)
                watcher.step()
        assert watcher.noise_scale.valid
        near += abs(watcher.noise_scale.b_simple / noise_scale - 1) < 0.2
    assert near >= least


def test_the_columns_of_the_history():
    """noise_scale and noise_scale_stderr are those of the estimate after each step."""
    model = regression()
    watcher = _managed(model, (4, 4), weighed=True)
    steps, noise = watcher.history.steps(), watcher.noise_scale
    assert steps["noise_scale"].iloc[-1] == pytest.approx(noise.b_simple, nan_ok=True)
    assert steps["noise_scale_stderr"].iloc[-1] == pytest.approx(noise.stderr, nan_ok=True)
    assert watcher.last.noise_scale_stderr > 0


@pytest.mark.parametrize("outcome", ["nan", "spike"])
def test_a_step_that_is_left_out_says_nothing(outcome):
    """A NaN, and an outlier that was skipped, cost one update, and no number turns NaN."""
    model = regression()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    options = {"on_nonfinite": "skip", "skip_spikes": 6.0}
    with gradwatch.watch(model, optimizer, accumulate=2, **options) as watcher:
        for window in range(60):
            for index in range(2):
                factor = {"nan": math.nan, "spike": 1e3}[outcome] if window == 50 else 1.0
                watcher.backward(regression_loss(model, examples(window, index, 32)) * factor)
            watcher.step()
    assert (watcher.history.steps()["outcome"] != "applied").sum() == 1
    assert watcher.noise_scale.updates == 59
    assert math.isfinite(watcher.noise_scale.tr_sigma)


def test_a_recorded_nan_says_nothing_either():
    """With on_nonfinite="record" the step is taken, and its noise is left out all the same."""
    model = regression()
    weights = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with gradwatch.watch(model, optimizer, accumulate=2) as watcher:
        for window in range(5):
            for index in range(2):
                factor = math.nan if (window, index) == (2, 1) else 1.0
                watcher.backward(regression_loss(model, examples(window, index, 4)) * factor)
            watcher.step()
            model.load_state_dict(weights)
    assert watcher.noise_scale.updates == 4
    assert math.isfinite(watcher.noise_scale.tr_sigma)


def test_a_short_last_window_does_not_change_what_a_batch_is():
    """It is one more window for the averages; the batch that is compared with stays the full one."""
    model = regression()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with gradwatch.watch(model, optimizer, accumulate=4) as watcher:
        for index in range(6):
            watcher.backward(regression_loss(model, examples(0, index, 4)), weight=4)
            watcher.step(last=index == 5)
    assert watcher.history.steps()["micro_batches"].tolist() == [4, 2]
    assert (watcher.noise_scale.updates, watcher.noise_scale.batch) == (2, 16)


REASONS = [
    ({}, 1, "one micro-batch"),
    ({"accumulate": 2, "clip": gradwatch.ClipByNorm(1.0, norm_type=math.inf)}, 2, "L2"),
    ({"accumulate": 2}, 2, "20 windows are needed"),
]


@pytest.mark.parametrize(("options", "micro_batches", "reason"), REASONS)
def test_where_there_is_none_the_reason_is_told(options, micro_batches, reason):
    """One micro-batch per step, another norm, or too few windows: valid is False, and reason says why."""
    model = regression()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with gradwatch.watch(model, optimizer, **options) as watcher:
        assert not watcher.noise_scale.valid
        for _ in range(2):
            for index in range(micro_batches):
                watcher.backward(regression_loss(model, examples(0, index, 4)))
            watcher.step()
    assert not watcher.noise_scale.valid
    assert watcher.noise_scale.suggested_micro_batches is None
    assert reason in watcher.noise_scale.reason


def test_a_micro_batch_costs_one_pass_more():
    """Watching takes one batched norm per micro-batch; the noise scale one more from the second on.

    In its first step a loop is looked at once more, and so are the weights, at the first backward.
    """
    passes = {}
    for accumulate in (4, 1):
        model = regression(torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        with gradwatch.watch(model, optimizer, accumulate=accumulate), CountCalls() as counting:
            for index in range(4):
                regression_loss(model, examples(0, index, 4, dtype=torch.float32)).backward()
            optimizer.step()
        passes[accumulate] = counting.by_name()["_foreach_norm"]
    assert passes == {1: 4 + 2, 4: 7 + 2}


@pytest.mark.parametrize("weight", [None, 4, torch.tensor(4)], ids=["none", "int", "tensor"])
def test_on_a_device_nothing_waits(weight):
    """Weights, correction, norms and estimate stay tensors until their copy has arrived; the numbers are the same."""
    noise = []
    for late in (True, False):
        model = regression()
        with _run_late(late), CountCalls() as counting:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
            watcher = gradwatch.watch(model, optimizer, accumulate=3, clip=0.1).attach()
            for window in range(4):
                for index in range(3):
                    watcher.backward(
                        regression_loss(model, examples(window, index, 4)), weight=weight
                    )
                watcher.step()
        if late:
            assert counting.waits == 0
        watcher.close()
        noise.append(watcher.noise_scale)
        steps = watcher.history.steps()
        assert steps["weight"].tolist() == [12.0 if weight is not None else 3.0] * 4
    assert noise[0].b_simple == pytest.approx(noise[1].b_simple, rel=1e-5, nan_ok=True)
    assert noise[0].tr_sigma == pytest.approx(noise[1].tr_sigma, rel=1e-5)


def _run_late(late):
    return late_readings(polls=2) if late else torch.enable_grad()


def test_no_gradient_is_kept():
    """What is kept to be measured is gone when the backward is over, and after one that failed with the next."""
    model = regression()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    seen = []
    for parameter in model.parameters():
        parameter.register_hook(lambda gradient: seen.append(weakref.ref(gradient)))
    with gradwatch.watch(model, optimizer, accumulate=2):
        for index in range(2):
            regression_loss(model, examples(0, index, 4)).backward()
        assert len(seen) == 8
        kept = [reference() for reference in seen[4:]]
        assert all(gradient is None for gradient in kept)


def _checkpointed(reentrant):
    def loss(model, x):
        x = x.clone().requires_grad_()
        hidden = checkpoint(model[:2], x, use_reentrant=reentrant)
        return model[2](hidden).square().mean()

    return loss


@pytest.mark.parametrize(
    "loss",
    [regression_loss, _checkpointed(False), _checkpointed(True)],
    ids=["plain", "checkpoint", "nested"],
)
def test_watching_an_accumulating_loop_changes_no_bit(loss):
    """Measuring what each micro-batch adds leaves the training bit-identical, nested backwards included."""
    trained = []
    for watched in (False, True):
        model = regression(torch.float32)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        watcher = gradwatch.watch(model, optimizer, accumulate=3) if watched else None
        if watcher is not None:
            watcher.attach()
        for index in range(12):
            (loss(model, examples(0, index, 4, dtype=torch.float32)) / 3).backward()
            if index % 3 == 2:
                optimizer.step()
                optimizer.zero_grad()
        if watcher is not None:
            watcher.close()
            assert watcher.noise_scale.updates == 4
        trained.append(snapshot(model))
    assert identical(*trained)


def test_the_state_goes_on_bit_for_bit():
    """A resumed run has the noise scale of one that was never stopped."""
    model = regression()
    whole = _managed(copy.deepcopy(model), (4, 4), weighed=True).noise_scale
    state = None
    for half in (range(5), range(5, WINDOWS)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        watcher = gradwatch.watch(model, optimizer, accumulate=2)
        if state is not None:
            watcher.load_state_dict(state)
        with watcher:
            for window in half:
                for index in range(2):
                    watcher.backward(regression_loss(model, examples(window, index, 4)), weight=4)
                watcher.step()
            state = watcher.state_dict()
    assert watcher.noise_scale == whole
