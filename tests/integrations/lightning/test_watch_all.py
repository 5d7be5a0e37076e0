"""watch_all() around a fit: the module has no callback of gradwatch, and need not have one."""

import math

import pytest
import torch
from torch.optim import LBFGS

import gradwatch
from gradwatch_lightning import GradientMonitor


def test_norms(kit):
    """The norms are those of each step from the first on, and the weights bit-identical."""
    plain, watched = kit.Net(), kit.Net()
    reference = kit.Reference()
    with gradwatch.watch_all() as watching:
        kit.trainer(gradient_clip_val=0.1).fit(watched, kit.loader())
    kit.trainer(reference, gradient_clip_val=0.1).fit(plain, kit.loader())
    (watcher,) = watching.watchers
    steps = watcher.history.steps()
    assert watcher.label == "Net"
    assert steps["grad_norm_clipped"].tolist() == pytest.approx(reference.after, rel=1e-5)
    assert steps["clipped"].all()
    assert set(watcher.history.parameters()["parameter"]) == set(dict(plain.named_parameters()))
    torch.testing.assert_close(watched.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_micro_batches(kit):
    """Batches that the Trainer accumulates are counted from the first step on."""
    reference = kit.Reference()
    with gradwatch.watch_all() as watching:
        kit.trainer(reference, accumulate_grad_batches=3).fit(kit.Net(), kit.loader())
    steps = watching.watchers[0].history.steps()
    assert steps["micro_batches"].tolist() == [3, 3]
    assert steps["grad_norm"].tolist() == pytest.approx(reference.before, rel=1e-5)


def test_two_networks(kit):
    """In manual optimization each optimizer has its steps, although the other is switched off."""
    reference = kit.Reference()
    with gradwatch.watch_all() as watching:
        kit.trainer(reference).fit(kit.Gan(), kit.loader())
    frames = [watcher.history.steps() for watcher in watching.watchers]
    norms = sorted(norm for frame in frames for norm in frame["grad_norm"])
    assert norms == pytest.approx(sorted(reference.before), rel=1e-5)
    assert sorted(len(one) for frame in frames for _, one in frame.groupby("optimizer")) == [6, 6]


def test_closures_that_run_again(kit):
    """LBFGS, which runs its closure several times, is watched from its first step on."""
    with gradwatch.watch_all() as watching:
        kit.trainer(max_steps=3).fit(kit.Net(lambda p: LBFGS(p, max_iter=2)), kit.loader())
    steps = watching.watchers[0].history.steps()
    assert len(steps) == 3
    assert not steps["grad_norm"].isna().any()


def test_a_bad_batch(kit):
    """A batch of NaN is left out, and explained to the line of the training step."""
    module = kit.Net()
    with gradwatch.watch_all(on_nonfinite="explain") as watching:
        kit.trainer().fit(module, kit.loader(poison=2))
    (watcher,) = watching.watchers
    outcomes = watcher.history.steps()["outcome"].tolist()
    assert outcomes == ["applied"] * 2 + ["skipped_nonfinite"] + ["applied"] * 3
    assert [one.step for one in watcher.explanations] == [3]
    assert all(math.isfinite(float(p.detach().sum())) for p in module.parameters())


def test_a_monitor(kit):
    """A fit that has a GradientMonitor is left to it."""
    monitor = GradientMonitor()
    with gradwatch.watch_all() as watching:
        kit.trainer(monitor).fit(kit.Net(), kit.loader())
    assert watching.watchers == []
    assert len(monitor.history.steps()) == 6
    assert "itself" in watching.nothing_watched()


class TestClip:
    """``watch_all(clip=)`` beside a Trainer."""

    def test_gradient_clip_val(self, kit):
        """The clip of the Trainer is told by its argument."""
        text = r"Trainer\(gradient_clip_val=0.5\) would both .* Net.* or remove gradient_clip_val"
        with gradwatch.watch_all(clip=1.0), pytest.raises(ValueError, match=text):
            kit.trainer(gradient_clip_val=0.5).fit(kit.Net(), kit.loader())

    def test_a_method_of_the_module(self, kit):
        """The clip of the module is told by its method."""

        class Clips(kit.Net):
            def configure_gradient_clipping(self, *args, **kwargs):
                """Clips nothing today."""

        text = r"Clips.configure_gradient_clipping\(\) would both .* or remove that method"
        with gradwatch.watch_all(clip=1.0), pytest.raises(ValueError, match=text):
            kit.trainer().fit(Clips(), kit.loader())

    def test_neither(self, kit):
        """Where neither clips, every step is clipped."""
        with gradwatch.watch_all(clip=1e-3) as watching:
            kit.trainer().fit(kit.Net(), kit.loader())
        steps = watching.watchers[0].history.steps()
        assert steps["clipped"].tolist() == [True] * 6
        assert steps["grad_norm_clipped"].tolist() == pytest.approx([1e-3] * 6, rel=1e-3)
