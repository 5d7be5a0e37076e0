"""GradientMonitor: skipping, raising, and conflicts that are refused."""

from __future__ import annotations

import pytest
import torch

import gradwatch
from gradwatch import AccumulateByNoiseScale, NonFiniteGradientError
from gradwatch.testing import CapturingSink
from gradwatch_lightning import GradientMonitor


def adam(parameters):
    """Makes an Adam."""
    return torch.optim.Adam(parameters, lr=0.02)


class WithoutBatch:
    """The batches of a loader, one left out."""

    def __init__(self, loader, left_out):
        self.batches = [batch for i, batch in enumerate(loader) if i != left_out]

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)


def test_skip_leaves_a_poisoned_batch_out(kit):
    """A skipped step leaves weights and optimizer state as in a run without that batch."""
    skipping, clean = kit.Net(adam), kit.Net(adam)
    monitor = GradientMonitor(on_nonfinite="skip")
    loader = kit.loader(6, poison=2)

    with_skip, without = kit.trainer(monitor), kit.trainer()
    with_skip.fit(skipping, loader)
    without.fit(clean, WithoutBatch(loader, 2))

    for mine, other in zip(skipping.parameters(), clean.parameters(), strict=True):
        assert torch.equal(mine, other)
    mine, other = (t.optimizers[0].state_dict()["state"] for t in (with_skip, without))
    assert str(mine) == str(other)
    steps = monitor.history.steps()
    assert steps.outcome[3] == "skipped_nonfinite"
    assert (steps.outcome.drop(3) == "applied").all()
    assert [event.kind for event in monitor.events] == ["nan", "skipped"]
    assert monitor.events[0].step == 3
    assert monitor.events[0].global_step == 2


def test_skip_works_beside_the_trainers_clip(kit):
    """The Trainer's clip spreads the NaN to all gradients; the step is skipped all the same."""
    module = kit.Net(adam)
    monitor = GradientMonitor(on_nonfinite="skip")

    kit.trainer(monitor, gradient_clip_val=0.5).fit(module, kit.loader(4, poison=1))

    assert monitor.history.steps().outcome.tolist().count("skipped_nonfinite") == 1
    assert all(torch.isfinite(p).all() for p in module.parameters())


def test_skip_in_manual_optimization(kit):
    """Both optimizers of a GAN skip the poisoned batch, and train on after it."""
    module = kit.Gan()
    monitor = GradientMonitor(on_nonfinite="skip")

    kit.trainer(monitor).fit(module, kit.loader(4, poison=1))

    outcomes = monitor.history.steps().outcome.tolist()
    assert outcomes == ["applied"] * 2 + ["skipped_nonfinite"] * 2 + ["applied"] * 4
    assert all(torch.isfinite(p).all() for p in module.parameters())


def test_raise_stops_the_fit_before_a_weight_changes(kit):
    """on_nonfinite="raise" leaves the weights of the step before, and no hook."""
    raising, clean = kit.Net(adam), kit.Net(adam)
    monitor = GradientMonitor(on_nonfinite="raise")
    loader = kit.loader(6, poison=2)
    trainer = kit.trainer(monitor)

    with pytest.raises(NonFiniteGradientError, match="step 3") as caught:
        trainer.fit(raising, loader)
    kit.trainer(limit_train_batches=2).fit(clean, loader)

    assert caught.value.step == 3
    for mine, other in zip(raising.parameters(), clean.parameters(), strict=True):
        assert torch.equal(mine, other)
    assert kit.hooks_on(raising, trainer.optimizers) == 0


def test_exploding_norm_is_an_event(kit):
    """A norm above exploding_norm is an event of the step."""
    monitor = GradientMonitor(exploding_norm=1e-6)

    kit.trainer(monitor).fit(kit.Net(), kit.loader(2))

    assert [event.kind for event in monitor.events] == ["exploding", "exploding"]


def test_sinks_receive_every_step_and_are_closed(kit):
    """A sink that the user passes gets all records, and is closed when the fit ends."""
    sink = CapturingSink()
    kit.trainer(GradientMonitor(sinks=[sink])).fit(kit.Net(), kit.loader(5))

    assert [record.step for batch in sink.batches for record in batch.steps] == [1, 2, 3, 4, 5]
    assert sink.closed


def test_two_clips_are_refused(kit):
    """Own clip and Trainer(gradient_clip_val=) together are refused before the first step."""
    module, monitor = kit.Net(), GradientMonitor(clip=1.0)
    before = [p.detach().clone() for p in module.parameters()]

    with pytest.raises(ValueError, match=r"would both clip the gradients") as caught:
        kit.trainer(monitor, gradient_clip_val=0.5).fit(module, kit.loader(2))

    text = str(caught.value)
    assert "GradientMonitor(clip=ClipByNorm(max_norm=1.0" in text
    assert "Trainer(gradient_clip_val=0.5)" in text
    assert "leave clip out of GradientMonitor" in text
    assert "remove gradient_clip_val" in text
    for parameter, value in zip(module.parameters(), before, strict=True):
        assert torch.equal(parameter, value)


def test_a_clip_in_the_module_is_refused_too(kit):
    """configure_gradient_clipping of the module's own is the other owner of a clip."""

    class Clipping(kit.Net):
        def configure_gradient_clipping(
            self, optimizer, gradient_clip_val, gradient_clip_algorithm
        ):
            self.clip_gradients(optimizer, 0.1, "norm")

    with pytest.raises(ValueError, match=r"Clipping.configure_gradient_clipping\(\)"):
        kit.trainer(GradientMonitor(clip=1.0)).fit(Clipping(), kit.loader(2))

    monitor = GradientMonitor()
    kit.trainer(monitor).fit(Clipping(), kit.loader(2))
    assert monitor.history.steps().clipped.all()


@pytest.mark.parametrize("value", [None, 0, 0.0])
def test_a_trainer_that_does_not_clip_is_no_conflict(kit, value):
    """gradient_clip_val of None or 0 means that the Trainer does not clip."""
    monitor = GradientMonitor(clip=0.1)
    kit.trainer(monitor, gradient_clip_val=value).fit(kit.Net(), kit.loader(2))

    assert monitor.history.steps().clipped.all()


def test_a_module_that_a_plain_watcher_watches_goes_unwatched(kit, caplog):
    """A monitor that only watches says why it does not, and the fit goes on."""
    monitor, module = GradientMonitor(), kit.Net()
    with gradwatch.watch(module) as watcher:
        trainer = kit.trainer(monitor)
        trainer.fit(module, kit.loader(2))

    assert trainer.global_step == len(watcher.history) == 2
    assert monitor.watcher is None
    assert "does not watch this fit" in caplog.text
    assert "another watcher is attached" in caplog.text


def test_clipping_a_module_that_a_plain_watcher_watches_is_refused(kit):
    """A monitor that clips raises: without its clip it would be another training."""
    module = kit.Net()
    with (
        gradwatch.watch(module),
        pytest.raises(RuntimeError, match="another watcher is attached"),
    ):
        kit.trainer(GradientMonitor(clip=1.0)).fit(module, kit.loader(1))


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"clip": -1.0}, ValueError, "must be greater than 0, got -1.0"),
        ({"clip": 0}, ValueError, "must be greater than 0, got 0"),
        ({"clip": float("nan")}, ValueError, "must be greater than 0, got nan"),
        ({"clip": "much"}, ValueError, "clip"),
        ({"clip": True}, TypeError, "clip"),
        ({"on_nonfinite": "ignore"}, ValueError, "on_nonfinite"),
        ({"statistics": ("median",)}, ValueError, "statistics"),
        ({"statistics": "norm"}, TypeError, "statistics"),
        ({"every": 0}, ValueError, "every=\\) must be at least 1, got 0"),
        ({"every": 1.5}, TypeError, "every"),
        ({"buffer_size": 0}, ValueError, "buffer_size"),
        ({"exploding_norm": -2.0}, ValueError, "exploding_norm"),
        ({"sinks": [object()]}, TypeError, "write"),
        ({"sinks": 3}, TypeError, "sinks"),
        ({"log": "yes"}, TypeError, "log"),
        ({"accumulate": 4}, ValueError, "Trainer\\(accumulate_grad_batches=4\\) instead"),
        ({"accumulate": 1}, ValueError, "Trainer\\(accumulate_grad_batches=1\\) instead"),
        ({"accumulate": True}, TypeError, "accumulate=\\) must be .*got True of type bool"),
        ({"accumulate": "much"}, ValueError, "must be \"auto\", a mapping .*got 'much'"),
        ({"accumulate": 2.0}, TypeError, "accumulate=\\) must be .*got 2.0 of type float"),
        ({"accumulate": AccumulateByNoiseScale}, TypeError, "or an object"),
        ({"accumulate": {10: 2}}, ValueError, "accumulate.*step 0"),
        ({"accumulate": {0: 0}}, ValueError, "accumulate.*at least 1, got 0"),
        ({"clipping": 1.0}, TypeError, "clipping"),
    ],
)
def test_bad_arguments_raise_at_once(arguments, error, text):
    """Each bad argument is an error of the constructor that names it."""
    with pytest.raises(error, match=text):
        GradientMonitor(**arguments)
