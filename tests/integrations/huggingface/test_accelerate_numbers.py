"""watch() in loops of Accelerate: the numbers are those of float64, and the weights stay."""

import pytest
import torch
from torch import nn

import gradwatch

accelerate = pytest.importorskip("accelerate", reason="NOT TESTED: accelerate is not installed")

from gradwatch_huggingface import AcceleratorSink  # noqa: E402
from tests.integrations.huggingface.accelerate_loops import (  # noqa: E402
    clip_norm,
    clip_value,
    data,
    fresh,
    net,
    same,
    squared,
    train,
)
from tests.support import float64  # noqa: E402

SETTINGS = {
    "plain": {},
    "four micro-batches": {"gradient_accumulation_steps": 4},
    "watched before prepare()": {"gradient_accumulation_steps": 4, "before_prepare": True},
    "clipped by value": {"gradient_accumulation_steps": 3, "clip": clip_value},
    "not clipped": {"gradient_accumulation_steps": 2, "clip": None},
    "a step each batch": {"gradient_accumulation_steps": 1, "clip": clip_norm},
    "compiled": {"gradient_accumulation_steps": 4, "dynamo_backend": "eager"},
    "watched, then compiled": {"dynamo_backend": "eager", "before_prepare": True},
    "SGD": {"gradient_accumulation_steps": 2, "make_optimizer": torch.optim.SGD},
    "fused": {"make_optimizer": lambda p, lr: torch.optim.AdamW(p, lr=lr, fused=True)},
}
FAST = ("four micro-batches", "clipped by value")
EACH = [
    pytest.param(name, marks=() if name in FAST else pytest.mark.slow, id=name) for name in SETTINGS
]
compiles = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:UserWarning:torch")


@compiles
@pytest.mark.parametrize("setting", EACH)
def test_numbers_are_those_of_float64(setting):
    """Norms before and after the clip, micro-batches and the last short window are exact."""
    run = train({}, **SETTINGS[setting])
    steps, expected = run.steps, run.expected
    assert steps["grad_norm"].tolist() == pytest.approx(expected.before, rel=1e-5)
    assert steps["grad_norm"].tolist() == pytest.approx(expected.seen, rel=1e-6)
    assert steps["grad_norm_clipped"].tolist() == pytest.approx(expected.after, rel=1e-6)
    assert steps["micro_batches"].tolist() == expected.micro_batches
    assert set(steps["outcome"]) == {"applied"}
    assert run.watcher.history.parameters()["parameter"].iloc[0] == "0.weight"
    assert run.watcher.events == []


@compiles
@pytest.mark.parametrize("setting", EACH)
def test_weights_stay_bit_identical(setting):
    """With and without, sink included, the loop ends at the same weights."""
    setting = SETTINGS[setting]
    watched = train({}, sinks=lambda accelerator: [AcceleratorSink(accelerator)], **setting)
    assert same(watched.weights, train(None, **setting).weights)


@pytest.mark.parametrize("before", [False, True])
def test_bf16(before):
    """Under autocast the norms are those of the gradients that are there, and near float64's."""
    setting = {"mixed_precision": "bf16", "gradient_accumulation_steps": 4}
    run = train({}, before_prepare=before, **setting)
    assert run.steps["grad_norm"].tolist() == pytest.approx(run.expected.seen, rel=1e-6)
    assert run.steps["grad_norm"].tolist() == pytest.approx(run.expected.before, rel=0.02)
    assert same(run.weights, train(None, **setting).weights)


def test_losses_are_those_before_the_division():
    """With the sink, `loss` is the mean over the micro-batches as the loop had them."""
    run = train(
        {}, gradient_accumulation_steps=4, sinks=lambda accelerator: [AcceleratorSink(accelerator)]
    )
    assert run.steps["loss"].tolist() == pytest.approx(run.expected.losses, rel=1e-6)


def test_a_loss_that_the_loop_may_have_divided_is_not_guessed():
    """Where Accelerate divides by 1 and a step has several backwards, `loss` stays unknown."""
    accelerator = fresh()
    model, loader = net(), data()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    with gradwatch.watch(model, optimizer, sinks=[AcceleratorSink(accelerator)]) as watcher:
        for index, (inputs, targets) in enumerate(loader):
            accelerator.backward(squared(model(inputs), targets) / 2)
            if index % 2:
                optimizer.step()
                optimizer.zero_grad()
    assert watcher.history.steps()["micro_batches"].tolist() == [2, 2, 2]
    assert watcher.history.steps()["loss"].isna().all()


def test_noise_scale_is_that_of_the_same_loop_by_hand():
    """It is estimated from the same micro-batches, whoever divides the losses."""
    run = train({}, gradient_accumulation_steps=3, clip=None, make_optimizer=torch.optim.SGD)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    with gradwatch.watch(model, optimizer) as watcher:
        for index, (inputs, targets) in enumerate(data()):
            (squared(model(inputs), targets) / 3).backward()
            if index in (2, 5, 6):
                optimizer.step()
                optimizer.zero_grad()
    ours = run.steps["noise_scale"].tolist()[:3]
    assert ours == watcher.history.steps()["noise_scale"].tolist()
    assert ours[0] > 0


@pytest.fixture
def scaled(monkeypatch):
    """An accelerator with a GradScaler: Accelerate itself makes one on accelerators only."""
    accelerator = fresh()
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    accelerator.native_amp = True
    monkeypatch.setattr(accelerate.Accelerator, "mixed_precision", "fp16")
    return accelerator


@pytest.mark.parametrize("with_sink", [False, True])
def test_a_scaler(scaled, with_sink):
    """Norms and losses are in true units, and a step that the scaler leaves out is named."""
    model, loader = net(), scaled.prepare(data())
    optimizer = scaled.prepare_optimizer(torch.optim.AdamW(model.parameters(), lr=1e-2))
    seen, clipped, skipped, losses = [], [], [], []
    sinks = [AcceleratorSink(scaled)] if with_sink else []
    with gradwatch.watch(model, optimizer, sinks=sinks) as watcher:
        for index, (inputs, targets) in enumerate(loader):
            with scaled.accumulate(model):
                loss = squared(model(inputs), targets) * (1e38 if index == 2 else 1.0)
                losses.append(loss.item())
                scale = scaled.scaler.get_scale()
                scaled.backward(loss)
                seen.append(float64.gradient_norm(model) / scale)
                scaled.clip_grad_norm_(model.parameters(), 0.5)
                clipped.append(float64.gradient_norm(model))
                optimizer.step()
                optimizer.zero_grad()
                skipped.append(scaled.optimizer_step_was_skipped)
    steps = watcher.history.steps()
    assert skipped == [index == 2 for index in range(7)]
    assert (steps["outcome"] == "skipped_scaler").tolist() == skipped
    taken = [index for index in range(7) if index != 2]
    for column, wanted in {"grad_norm": seen, "grad_norm_clipped": clipped}.items():
        ours = steps[column].tolist()
        assert [ours[i] for i in taken] == pytest.approx([wanted[i] for i in taken], rel=1e-5)
    if with_sink:
        ours = steps["loss"].tolist()
        assert [ours[i] for i in taken] == pytest.approx([losses[i] for i in taken], rel=1e-5)


def test_a_closure():
    """LBFGS in its wrapper: the first evaluation counts, with its loss."""
    accelerator = fresh()
    model, loader = net(), data(batch=13)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    firsts = []
    sinks = [AcceleratorSink(accelerator)]
    with gradwatch.watch(model, optimizer, sinks=sinks) as watcher:
        for inputs, targets in loader:
            values = []

            def closure(inputs=inputs, targets=targets, values=values):
                optimizer.zero_grad()
                loss = squared(model(inputs), targets)
                accelerator.backward(loss)
                values.append((float64.gradient_norm(model), loss.item()))
                return loss

            optimizer.step(closure)
            firsts.append(values)
    steps = watcher.history.steps()
    for row, values in zip(steps.itertuples(), firsts, strict=True):
        assert (row.grad_norm, row.loss) in [pytest.approx(one, rel=1e-5) for one in values]
    assert steps["optimizer"].tolist() == ["LBFGS"] * 2


def test_several_models_and_optimizers():
    """Each optimizer has its rows, with the norm of its own parameters."""
    accelerator = fresh(gradient_accumulation_steps=2)
    first, second = net(0), net(5)
    optimizers = (
        torch.optim.SGD(first.parameters(), lr=0.1),
        torch.optim.AdamW(second.parameters(), lr=0.01),
    )
    first, second, one, two, loader = accelerator.prepare(first, second, *optimizers, data())
    expected = {"gen": [], "dis": []}
    models = nn.ModuleDict({"g": first, "d": second})
    with gradwatch.watch(models, {"gen": one, "dis": two}) as watcher:
        for inputs, targets in loader:
            with accelerator.accumulate(first, second):
                for name, model, optimizer in (("gen", first, one), ("dis", second, two)):
                    accelerator.backward(squared(model(inputs), targets))
                    if accelerator.sync_gradients:
                        expected[name].append(float64.gradient_norm(model))
                    optimizer.step()
                    optimizer.zero_grad()
    steps = watcher.history.steps()
    for name, norms in expected.items():
        own = steps[steps["optimizer"] == name]
        assert own["grad_norm"].tolist() == pytest.approx(norms, rel=1e-6)
        assert own["micro_batches"].tolist() == [2, 2, 2, 1]


def test_gradwatch_clips_beside_accumulate():
    """watch(clip=) in the place of accelerate's clip ends at the same weights, nearly."""
    setting = {"gradient_accumulation_steps": 4}
    ours = train({"clip": 0.5}, clip=None, **setting)
    theirs = train(None, clip=clip_norm, **setting)
    assert ours.steps["grad_norm"].tolist() == pytest.approx(ours.expected.before, rel=1e-5)
    assert ours.steps["grad_norm_clipped"].max() == pytest.approx(0.5, rel=1e-6)
    for a, b in zip(ours.weights, theirs.weights, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_managed_number_beside_accelerates_own_is_refused():
    """watch(accelerate=4) with a last window of three: the error says what to write."""
    with pytest.raises(gradwatch.AccumulationError, match=r"after 3 of the 4 micro-batches"):
        train({"accumulate": 4}, gradient_accumulation_steps=4)
