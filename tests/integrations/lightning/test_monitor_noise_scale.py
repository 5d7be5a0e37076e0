"""GradientMonitor: the gradient noise scale of what the Trainer accumulates."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins import MixedPrecision

import gradwatch
from gradwatch_lightning import GradientMonitor

BATCHES, WINDOW = 48, 4
SCALE = 1024.0


def by_hand(kit, dtype=None):
    """Trains the same batches in a plain loop, and returns what a watcher has recorded."""
    module = kit.Net()
    optimizer = module.configure_optimizers()
    scaler = torch.amp.GradScaler("cpu", SCALE) if dtype is torch.float16 else None
    watching = {"accumulate": WINDOW, "scaler": scaler}
    with gradwatch.watch(module, optimizer, **watching) as watcher:
        for number, batch in enumerate(kit.loader(BATCHES), start=1):
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                loss = module.loss(batch) / WINDOW
            (loss if scaler is None else scaler.scale(loss)).backward()
            if number % WINDOW == 0:
                _step(optimizer, scaler)
    return watcher.history.steps()


def _step(optimizer, scaler):
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    optimizer.zero_grad()


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("32-true", None), ("16-mixed", torch.float16), ("bf16-mixed", torch.bfloat16)],
)
@pytest.mark.parametrize("own", [False, True])
def test_it_is_that_of_the_same_loop_by_hand(kit, precision, dtype, own):
    """The noise scale of each step is the one of a plain loop through watch(), in each precision, whoever decides."""
    options = {"precision": precision}
    if dtype is torch.float16:
        scaler = torch.amp.GradScaler("cpu", SCALE)
        options = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]}
    monitor = GradientMonitor(accumulate={0: WINDOW} if own else None)
    if not own:
        options["accumulate_grad_batches"] = WINDOW

    kit.trainer(monitor, **options).fit(kit.Net(), kit.loader(BATCHES))

    steps, expected = monitor.history.steps(), by_hand(kit, dtype)
    assert len(steps) == BATCHES // WINDOW
    assert steps.noise_scale.notna().sum() > 6
    for column in ("grad_norm", "noise_scale", "noise_scale_stderr"):
        found, wanted = steps[column].tolist(), expected[column].tolist()
        assert found == pytest.approx(wanted, rel=1e-5, nan_ok=True)


def test_it_is_to_be_read_during_and_after_a_fit(kit):
    """monitor.noise_scale is the estimate so far, with all windows seen."""
    monitor = GradientMonitor()

    kit.trainer(monitor, accumulate_grad_batches=2).fit(kit.Net(), kit.loader(50))

    noise = monitor.noise_scale
    assert noise.updates == 25
    assert noise.b_simple == monitor.history.steps().noise_scale.iloc[-1]


def test_without_accumulation_there_is_none(kit):
    """One batch per step on one process has none, and the reason says so."""
    monitor, logger = GradientMonitor(), kit.CapturingLogger()

    kit.trainer(monitor, logger=logger).fit(kit.Net(), kit.loader(3))

    assert not monitor.noise_scale.valid
    assert "accumulate 2 or more" in monitor.noise_scale.reason
    assert not monitor.history.steps().noise_scale.notna().any()
    assert logger.of("gradwatch/noise_scale") == logger.of("gradwatch/micro_batches") == []


@pytest.mark.parametrize("options", [{"accumulate_grad_batches": 4}, {}])
def test_every_micro_batch_is_measured(kit, options):
    """Where the Trainer accumulates, by a number or a GradientAccumulationScheduler, hooks see each micro-batch."""
    monitor = GradientMonitor()
    callbacks = [monitor] if options else [monitor, GradientAccumulationScheduler({0: 4})]

    class Counts(kit.Net):
        def on_train_batch_start(self, batch, batch_idx):
            self.hooks = sum(len(p._backward_hooks or {}) for p in self.parameters())

    module = Counts()
    kit.trainer(*callbacks, **options).fit(module, kit.loader(8))

    assert module.hooks == 4
    assert monitor.history.steps().micro_batches.tolist() == [4, 4]


def test_it_is_logged_where_it_is_known(kit):
    """gradwatch/noise_scale is logged at the steps where it exceeds its standard error, micro_batches at all."""
    monitor, logger = GradientMonitor(), kit.CapturingLogger()
    options = {"accumulate_grad_batches": 4, "logger": logger}

    kit.trainer(monitor, **options).fit(kit.Net(), kit.loader(62))

    steps = monitor.history.steps()
    known = steps[steps.noise_scale > steps.noise_scale_stderr]
    assert 0 < len(known) < len(steps)
    logged = dict(logger.of("gradwatch/noise_scale"))
    assert list(logged) == [step - 1 for step in known.index]  # as Lightning counts
    assert list(logged.values()) == pytest.approx(known.noise_scale.tolist())
    assert [value for _, value in logger.of("gradwatch/micro_batches")] == [4] * 15 + [2]


def test_it_goes_on_after_a_resume(kit, tmp_path):
    """A resumed fit goes on with the averages of the fit before."""
    whole = GradientMonitor()
    kit.trainer(whole, accumulate_grad_batches=4, max_epochs=2).fit(kit.Net(), kit.loader(48))
    trainer = kit.trainer(GradientMonitor(), accumulate_grad_batches=4)
    trainer.fit(kit.Net(), kit.loader(48))
    trainer.save_checkpoint(tmp_path / "epoch.ckpt")

    resumed = GradientMonitor()
    trainer = kit.trainer(resumed, accumulate_grad_batches=4, max_epochs=2)
    trainer.fit(kit.Net(), kit.loader(48), ckpt_path=tmp_path / "epoch.ckpt")

    assert resumed.noise_scale == whole.noise_scale
    assert resumed.noise_scale.updates == 24
