"""watch() through the life of an Accelerator: checkpoints, free_memory(), NaN batches, copies."""

import functools
import gc
import weakref

import pytest
import torch

import gradwatch

pytest.importorskip("accelerate", reason="NOT TESTED: accelerate is not installed")

from gradwatch_huggingface import AcceleratorSink
from tests.integrations.huggingface.accelerate_loops import (
    data,
    fresh,
    net,
    same,
    squared,
    train,
)


def _train_epochs(accelerator, model, optimizer, loader, epochs):
    for _ in range(epochs):
        for inputs, targets in loader:
            with accelerator.accumulate(model):
                accelerator.backward(squared(model(inputs), targets))
                optimizer.step()
                optimizer.zero_grad()


def _run(folder, load, epochs, save):
    accelerator = fresh(gradient_accumulation_steps=2)
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, data())
    watcher = gradwatch.watch(model, optimizer, clip="auto")
    accelerator.register_for_checkpointing(watcher)
    if load:
        accelerator.load_state(folder)
    with watcher:
        _train_epochs(accelerator, model, optimizer, loader, epochs)
        if save:
            accelerator.save_state(folder)
    return watcher.history.steps(), [p.detach().clone() for p in model.parameters()]


def test_save_state_and_load_state(tmp_path):
    """A registered watcher goes on counting, and its policy goes on where it was."""
    whole, weights = _run(tmp_path, load=False, epochs=4, save=False)
    _run(tmp_path, load=False, epochs=2, save=True)
    rest, resumed = _run(tmp_path, load=True, epochs=2, save=False)
    assert rest.index.tolist() == list(range(9, 17))
    for column in ("grad_norm", "grad_norm_clipped", "clip_threshold", "micro_batches"):
        assert rest[column].tolist() == whole.loc[9:, column].tolist()
    assert same(weights, resumed)


@pytest.mark.parametrize("with_sink", [False, True])
def test_free_memory(with_sink):
    """After close() nothing of gradwatch keeps the model, and a second training starts anew."""
    accelerator = fresh()
    for _ in range(2):
        model = net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        model, optimizer, loader = accelerator.prepare(model, optimizer, data())
        sinks = [AcceleratorSink(accelerator)] if with_sink else []
        with gradwatch.watch(model, optimizer, sinks=sinks) as watcher:
            _train_epochs(accelerator, model, optimizer, loader, 1)
        reference = weakref.ref(model)
        model, optimizer, loader = accelerator.free_memory(model, optimizer, loader)
        gc.collect()
        assert reference() is None
        assert len(watcher.history.steps()) == 7
    assert not {"backward", "end_training"} & vars(accelerator).keys()


def test_the_accelerator_is_left_as_it_was():
    """Also where somebody had wrapped its methods before, or does so meanwhile."""
    accelerator = fresh()
    calls = []
    own = accelerator.backward

    def before(loss, **kwargs):
        calls.append("before")
        own(loss, **kwargs)

    accelerator.backward = before
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, data())
    with gradwatch.watch(model, optimizer, sinks=[AcceleratorSink(accelerator)]):
        _train_epochs(accelerator, model, optimizer, loader, 1)
        assert accelerator.backward is not before
    assert accelerator.backward is before
    assert calls == ["before"] * 7

    watcher = gradwatch.watch(model, optimizer, sinks=[AcceleratorSink(accelerator)]).attach()
    ours = accelerator.backward
    accelerator.backward = functools.partial(ours)
    watcher.close()
    _train_epochs(accelerator, model, optimizer, loader, 1)
    assert calls == ["before"] * 14


def test_a_backward_that_raises_raises():
    """What the loop's own call raises comes through, and the next backward counts."""
    accelerator = fresh(gradient_accumulation_steps=2)
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, data())
    with gradwatch.watch(model, optimizer, sinks=[AcceleratorSink(accelerator)]) as watcher:
        with pytest.raises(RuntimeError, match="does not require grad"):
            accelerator.backward(torch.zeros(()))
        _train_epochs(accelerator, model, optimizer, loader, 1)
    assert watcher.history.steps()["micro_batches"].tolist() == [2, 2, 2, 1]


def _poison(batch, inputs):
    if batch == 5:
        inputs = inputs.clone()
        inputs[2, 1] = float("nan")
    return inputs


@pytest.mark.parametrize(("number", "step", "micro_batch"), [(1, 6, 1), (4, 2, 2)])
@pytest.mark.parametrize("with_sink", [False, True])
def test_a_nan_batch_is_explained(number, step, micro_batch, with_sink, caplog):
    """Step, micro-batch, line and example are named, and the step is left out."""
    run = train(
        {"on_nonfinite": "explain"},
        change=_poison,
        epochs=1,
        gradient_accumulation_steps=number,
        sinks=lambda accelerator: [AcceleratorSink(accelerator)] if with_sink else [],
    )
    assert run.steps.index[run.steps["outcome"] == "skipped_nonfinite"].tolist() == [step]
    (found,) = run.watcher.explanations
    assert (found.step, found.micro_batch, found.origin) == (step, micro_batch, "input")
    assert found.source == "loss = squared(model(inputs), targets)"
    assert "in example 2" in str(found)


@pytest.mark.parametrize("with_sink", [False, True])
def test_a_nan_from_the_loss_is_explained(with_sink, caplog):
    """The line of the loss is found, through accelerator.backward() as through loss.backward()."""
    accelerator = fresh()
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, data())
    sinks = [AcceleratorSink(accelerator)] if with_sink else []
    with gradwatch.watch(model, optimizer, on_nonfinite="explain", sinks=sinks) as watcher:
        for index, (inputs, targets) in enumerate(loader):
            with accelerator.accumulate(model):
                output = model(inputs)
                error = (output - targets) * (index != 3)
                loss = torch.sqrt(error.square().mean())
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
    (found,) = watcher.explanations
    assert found.source == "loss = torch.sqrt(error.square().mean())"
    assert watcher.history.steps()["outcome"].tolist().index("skipped_nonfinite") == 3
