"""GradientMonitor on a device: nothing waits for a number, and every logger gets what it does on a CPU."""

import csv
import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision

from gradwatch_lightning import GradientMonitor
from tests.integrations.lightning.conftest import (
    LIGHTNING_WARNINGS,
    CapturingLogger,
    Gan,
    Net,
    loader,
    trainer,
)
from tests.support import device
from tests.support.lightning_device import DeviceStrategy

RESIZED = r"ignore:An output with one or more elements was resized"  # how "mini" computes a loss
pytestmark = [pytest.mark.filterwarnings(one) for one in (*LIGHTNING_WARNINGS, RESIZED)]

BATCHES = 40
SAMPLED = {"statistics": ("norm", "max"), "every": 2}


class Quiet(Net):
    """Logs nothing itself: Lightning waits for each loss that it writes."""

    def training_step(self, batch, batch_idx):
        return self.loss(batch)


class Waits(Callback):
    """Counts what the host waits for from the first batch to the last, the end of the fit left out."""

    def __init__(self):
        self.waits = 0

    def on_train_start(self, trainer, pl_module):
        self._block = device.counting()
        self._counts = self._block.__enter__()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._block.__exit__(None, None, None)
        self.waits = self._counts.waits


def fit(module, *monitors, on_device=True, batches=BATCHES, precision=None, poison=None, **options):
    """Runs a fit; returns its logger, and the number of waits in it."""
    logger, waits = options.pop("logger", None) or CapturingLogger(), Waits()
    if on_device:
        options |= {"accelerator": "auto", "strategy": DeviceStrategy(precision)}
    made = trainer(*monitors, *[waits] * on_device, logger=logger, **options)
    made.fit(module, loader(batches, poison=poison))
    return logger, waits.waits


def series(logger):
    """Returns what every tag of ours was given: pairs of step and value."""
    tags = {tag for _, row in logger.rows for tag in row if tag.startswith("gradwatch")}
    return {tag: logger.of(tag) for tag in tags}


def assert_same(late, prompt):
    """Compares two logs of ours, to six digits."""
    assert late.keys() == prompt.keys()
    for tag, values in prompt.items():
        assert [step for step, _ in late[tag]] == [step for step, _ in values], tag
        expected = [value for _, value in values]
        assert [value for _, value in late[tag]] == pytest.approx(expected, rel=1e-6, nan_ok=True)


@pytest.mark.parametrize("log", [True, False])
@pytest.mark.parametrize("options", [{}, {"clip": 0.3}, {"log_blocks": True, **SAMPLED}])
def test_nothing_waits(log, options):
    """Forty batches, each of them logged, wait no more often than without a monitor."""
    _, without = fit(Quiet())
    with device.late(10):
        _, waits = fit(Quiet(), GradientMonitor(log=log, **options))
    assert waits == without


CASES = {
    "plain": (Net, {}, {}),
    "clipped": (Net, {"clip": 0.3}, {}),
    "every third": (Net, {}, {"log_every_n_steps": 3}),
    "accumulated": (Net, {}, {"accumulate_grad_batches": 2}),
    "accumulated, every third": (
        Net,
        {},
        {"accumulate_grad_batches": 2, "log_every_n_steps": 3, "max_epochs": 2},
    ),
    "clipped by the Trainer": (Net, {}, {"gradient_clip_val": 0.3}),
    "skipped": (Net, {"on_nonfinite": "skip"}, {"poison": 5}),
    "two optimizers": (Gan, {}, {}),
    "one rests": (lambda: Gan(discriminator_every=2), {}, {"log_every_n_steps": 2}),
    "a number that changes": (Net, {"accumulate": {0: 1, 4: 2}}, {}),
    "blocks": (Net, {"log_blocks": True, **SAMPLED}, {"log_every_n_steps": 3}),
    "blocks of two": (Gan, {"log_blocks": True}, {}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("polls", [0, 3])
def test_the_loggers_get_what_they_get_on_a_cpu(case, polls):
    """Each series has the same steps and values, in the same order, the last steps included."""
    make, options, trained = CASES[case]
    prompt, _ = fit(make(), GradientMonitor(**options), on_device=False, batches=13, **trained)
    with device.late(polls):
        late, _ = fit(make(), GradientMonitor(**options), batches=13, **trained)
    assert_same(series(late), series(prompt))


def test_numbers_are_sent_as_they_arrive():
    """A logger has the first norms long before the fit ends, and the bar shows the newest of them."""
    logger, seen = CapturingLogger(), []

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            shown = trainer.progress_bar_metrics.get("grad_norm")
            seen.append((len(logger.of("gradwatch/grad_norm")), shown))

    with device.late(2):
        fit(Quiet(), GradientMonitor(), Look(), logger=logger, batches=12)
    norms = [value for _, value in logger.of("gradwatch/grad_norm")]
    assert len(norms) == 12
    written, shown = seen[-1]
    assert written >= 8
    assert shown in norms[written - 1 :]


def test_callbacks_read_the_last_norm_after_the_fit():
    """callback_metrics and logged_metrics end with the norm of the last step."""
    monitor = GradientMonitor()
    made = trainer(monitor, logger=False, accelerator="auto", strategy=DeviceStrategy())
    with device.late(3):
        made.fit(Net(), loader(5))
    last = monitor.history.steps().grad_norm.iloc[-1]
    assert float(made.callback_metrics["gradwatch/grad_norm"]) == pytest.approx(last, rel=1e-6)
    assert float(made.logged_metrics["gradwatch/grad_norm"]) == pytest.approx(last, rel=1e-6)


def test_a_csv_file_has_every_step(tmp_path):
    """Late norms are in rows of their own, under the step that they belong to."""
    logger, monitor = CSVLogger(tmp_path), GradientMonitor()
    with device.late(3):
        fit(Net(), monitor, logger=logger, batches=6)
    with Path(logger.log_dir, "metrics.csv").open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["gradwatch/grad_norm"]]
    assert [row["step"] for row in rows] == ["0", "1", "2", "3", "4", "5"]
    norms = [float(row["gradwatch/grad_norm"]) for row in rows]
    assert norms == pytest.approx(monitor.history.steps().grad_norm.tolist(), rel=1e-6)


def test_a_fit_that_is_stopped_by_an_error_logs_what_came_before():
    """What was on its way when the module raised is written all the same."""

    class Stops(Net):
        def training_step(self, batch, batch_idx):
            if batch_idx == 4:
                raise ZeroDivisionError
            return super().training_step(batch, batch_idx)

    logger = CapturingLogger()
    with device.late(10), pytest.raises(ZeroDivisionError):
        fit(Stops(), GradientMonitor(), logger=logger)
    assert [step for step, _ in logger.of("gradwatch/grad_norm")] == [0, 1, 2, 3]


def test_a_logger_that_raises(caplog):
    """The fit goes on without our numbers, and says so once."""

    class Broken(CapturingLogger):
        def log_metrics(self, metrics, step=None):
            if "gradwatch/grad_norm" in metrics:
                raise OSError("no space left")
            super().log_metrics(metrics, step)

    monitor = GradientMonitor()
    with device.late(3):
        fit(Net(), monitor, logger=Broken(), batches=6)
    assert len(monitor.history) == 6
    assert caplog.text.count("log_metrics() of Broken failed with OSError") == 1


def mixed():
    """Makes Lightning's plugin for float16, with a scale that overflows at first."""
    kind = device.DEVICE.type
    scaler = torch.amp.GradScaler(kind, init_scale=2.0**18, growth_interval=4)
    return MixedPrecision("16-mixed", kind, scaler)


def test_float16_with_a_scaler():
    """Norms are in true units, and overflows are skipped_scaler and no NaN of the model's."""
    monitor = GradientMonitor(clip=0.3)
    with device.late(3):
        logger, _ = fit(Net(), monitor, batches=12, precision=mixed())
    steps = monitor.history.steps()
    assert set(steps.outcome) == {"applied", "skipped_scaler"}
    applied = steps[steps.outcome == "applied"]
    assert applied.grad_norm.between(1e-3, 1e3).all()
    assert (applied.grad_norm_clipped <= 0.3 * (1 + 1e-5)).all()
    logged = [value for _, value in logger.of("gradwatch/grad_norm") if math.isfinite(value)]
    assert logged == pytest.approx(applied.grad_norm.tolist(), rel=1e-6)


def test_a_checkpoint_holds_every_step(tmp_path):
    """state_dict() waits for what is on its way, and a resumed fit counts on."""
    path = tmp_path / "fit.ckpt"
    with device.late(10):
        made = trainer(GradientMonitor(), accelerator="auto", strategy=DeviceStrategy())
        made.fit(Net(), loader(5))
        made.save_checkpoint(path)
        resumed = GradientMonitor()
        again = trainer(resumed, accelerator="auto", strategy=DeviceStrategy(), max_epochs=2)
        again.fit(Net(), loader(5), ckpt_path=path)
    assert resumed.history.steps().index.tolist() == [6, 7, 8, 9, 10]
