"""GradientMonitor: mixed precision with a GradScaler, which the precision plugin owns."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from gradwatch_lightning import GradientMonitor


def test_loss_scale_is_taken_out(kit):
    """With a GradScaler the norms are in true units and the scale is in the record."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    monitor, reference = GradientMonitor(), kit.Reference()
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)

    kit.trainer(monitor, reference, plugins=[plugin]).fit(kit.Net(), kit.loader(4))

    steps = monitor.history.steps()
    assert set(steps.loss_scale) == {1024.0}
    assert steps.grad_norm.tolist() == pytest.approx(reference.before, rel=1e-5)
    assert steps.clip_coef.tolist() == pytest.approx([1.0] * 4, rel=1e-5)


def test_overflow_under_a_scaler_is_a_skipped_step(kit):
    """A step that the GradScaler leaves out is recorded as skipped by the scaler."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    monitor = GradientMonitor()
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)

    kit.trainer(monitor, plugins=[plugin]).fit(kit.Net(), kit.loader(4, poison=1))

    outcomes = monitor.history.steps().outcome.tolist()
    assert outcomes == ["applied", "skipped_scaler", "applied", "applied"]


@pytest.mark.parametrize("options", [{"clip": 0.05}, {"clip": "auto", "skip_spikes": "auto"}])
def test_a_fused_optimizer_can_be_clipped(kit, options):
    """float16, a fused optimizer and a clip: the Trainer itself refuses that, the monitor does it."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    monitor = GradientMonitor(**options)
    module = kit.Net(lambda parameters: torch.optim.AdamW(parameters, lr=0.05, fused=True))

    kit.trainer(monitor, plugins=[plugin]).fit(module, kit.loader(4))

    steps = monitor.history.steps()
    assert steps["loss_scale"].tolist() == [1024.0] * 4
    assert (steps["outcome"] == "applied").all()
    if options["clip"] == 0.05:
        assert steps["clipped"].all()
        assert steps["grad_norm_clipped"].tolist() == pytest.approx([0.05] * 4, rel=1e-3)
