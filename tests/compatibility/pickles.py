"""Objects as users pickle them, and what each holds and does once it is loaded."""

import copy
import os
import shutil
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

import gradwatch
from gradwatch.testing import LinearModel

from .told import told, told_frame
from .trainings import clip_policies, wave

WIDTH = 3
"""Parameters that a policy of norms per parameter is asked about."""


def norm(number):
    """A numbered gradient norm; every ninth is seven times as large."""
    return (1.0 + 0.3 * float(wave(number + 1)[-1])) * (7.0 if number % 9 == 8 else 1.0)


def norms_for(policy, number):
    """What a policy is given at a numbered step: the norm, or those of the parameters."""
    scopes = {"global": 1.0, "parameter": torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)}
    return torch.as_tensor(norm(number) * scopes[policy.scope], dtype=torch.float64)


def noise_scale():
    """A noise scale that is believed, and far above the batch."""
    return gradwatch.NoiseScale(
        b_simple=60.0, tr_sigma=60.0, grad_sq=1.0, stderr=2.0, valid=True, updates=100,
        suggested_micro_batches=8, micro_batches=7.5, significance=30.0, batch=16.0,
    )  # fmt: skip


def policies_with_memory():
    """Every policy after ten updates."""
    policies = clip_policies()
    for policy in policies.values():
        for number in range(10):
            policy.decide(norms_for(policy, number))
    accumulate = gradwatch.AccumulateByNoiseScale(2, 16, every=2, min_updates=4, scale_lr="linear")
    for step in range(5):
        accumulate.decide(step, noise_scale())
    return {**policies, "AccumulateByNoiseScale": accumulate}


def fed_estimator(estimator):
    """The estimator of the noise scale after 25 windows."""
    for number in range(25):
        estimator.update(8.0 + norm(number), norm(number + 1), 16.0, 8.0)
    return estimator


def wrong_function():
    """A function whose backward is off by a factor of two."""

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**2

        @staticmethod
        def backward(ctx, gradient):
            return gradient * ctx.saved_tensors[0]

    return Square.apply


# -- Lightning -----------------------------------------------------------------------------------


def fresh_monitor():
    """A monitor that has not watched yet, with a policy that has a memory."""
    from gradwatch_lightning import GradientMonitor

    return GradientMonitor(
        clip=policies_with_memory()["AutoClip"], on_nonfinite="skip", statistics=("max",),
        exploding_norm=50.0, accumulate={0: 1, 4: 2},
    )  # fmt: skip


def fitted_monitor():
    """A monitor after a fit."""
    monitor = fresh_monitor()
    fit(monitor)
    return monitor


def fit(monitor):
    """Trains eight batches under a monitor; tells the steps."""
    import lightning.pytorch as pl

    class Net(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2).double()
            with torch.no_grad():
                self.layer.weight.copy_(wave(2, 4))
                self.layer.bias.copy_(wave(2))

        def training_step(self, batch, batch_idx):
            return self.layer(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.05)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loader = torch.utils.data.DataLoader([wave(4, phase=n) for n in range(16)], batch_size=2)
        trainer = pl.Trainer(
            accelerator="cpu", devices=1, max_epochs=1, logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, callbacks=[monitor],
        )  # fmt: skip
        trainer.fit(Net(), loader)
    return told_frame(monitor.history.steps().drop(columns="time_s"))


# -- what an object holds ------------------------------------------------------------------------


def held_by(name, value):
    """What an object holds and what it does next, as plain values; the object is used up by it."""
    if name == "classes":
        return {key: getattr(one, "__name__", "") for key, one in value.items()}
    held = {"class": type(value).__name__, "fields": told(value)}
    if isinstance(value, BaseException):
        held |= {"text": str(value), "args": told(value.args), "attributes": told(vars(value))}
        held["bases"] = [one.__name__ for one in type(value).__mro__]
    if name in TEXTS:
        held["text"] = str(value)
    if name in REPRS:
        held["repr"] = repr(value)
    if hasattr(value, "state_dict") and not isinstance(value, nn.Module):
        held["state"] = told(value.state_dict())
    return held | {"does": told(DOES[name](value)) if name in DOES else None}


def _decisions(policy):
    return [policy.decide(norms_for(policy, number)) for number in range(10, 20)]


def _unit_decisions(policy):
    gradient, weight = wave(3, 4, phase=1.0), wave(3, 4)
    return [policy.coefficient(name, gradient, weight) for name in ("0.weight", "2.bias")]


def _accumulation(policy):
    counts = [
        [policy.decide(step, noise_scale()), policy.micro_batches, policy.lr_factor]
        for step in range(5, 18)
    ]
    return [*counts, policy.most, str(policy)]


def _spikes(rule):
    return [rule.is_spike(norms_for(_GLOBAL, number)) for number in range(30, 45)]


def _of_sink(sink):
    batches = [[len(batch.steps), batch.norms, batch.statistics] for batch in sink.batches]
    return {
        "batches": batches,
        "events": sink.events,
        "last": sink.steps[-1],
        "closed": sink.closed,
    }


def _of_report(report):
    counts = [len(report), len(list(report)), bool(report), len(report.of_kind("nan"))]
    return [report.kinds, counts, report._repr_html_()]


def _of_estimator(estimator):
    before = estimator.read()
    estimator.update(9.0, 1.5, 16.0, 8.0)
    return [before, estimator.read(), estimator.updates]


def _of_linear_model(model):
    loss = model()
    loss.backward()
    return [loss, model.weight.grad, sorted(model.state_dict())]


def _of_check(check):
    return [check.ok, bool(check), [failure.relative_error for failure in check.failures]]


def _of_units(decision):
    return _unit_decisions(decision.units)


def _of_history(history):
    return [repr(history), history.layout, told_frame(history.steps(["grad_norm"], start=9))]


def _of_run_folder(folder):
    return str(folder.path)


def _of_writer(writer):
    """Writes with it, into the folder of this process that has its name."""
    model, before = LinearModel([3.0, 4.0]), set(Path("log").glob("*"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.watch(model, optimizer, sinks=[writer]):
        for _ in range(7):
            model().backward()
            optimizer.step()
    return [writer.log_dir, len(set(Path("log").glob("*")) - before)]


@contextmanager
def in_folder(runs):
    """Works in a new folder, in which there is the run of a process that was killed."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as temporary:
        shutil.copytree(runs / "killed", Path(temporary) / "killed")
        os.chdir(temporary)
        try:
            yield
        finally:
            os.chdir(before)


def _of_monitor(monitor):
    return {"watched": monitor.watcher is not None, "steps": fit(copy.deepcopy(monitor))}


DOES = {
    **dict.fromkeys(clip_policies(), _decisions),
    **{f"{name}OfDevice": _decisions for name in clip_policies()},
    "AdaptiveGradientClip": _unit_decisions,
    **dict.fromkeys(
        ("AccumulateByNoiseScale", "AccumulationSchedule", "FixedAccumulation"), _accumulation
    ),
    **dict.fromkeys(("SpikeRule", "SpikeRuleOfDevice"), _spikes),
    "NoiseScaleEstimator": _of_estimator,
    "ClipDecisionOfUnits": _of_units,
    "CurvatureEvery": lambda asked: asked.loss(),
    "Curvature": lambda found: [found.dominant_eigenvalue, found.learning_rate_limit],
    "GradientCheck": _of_check,
    "WrongGradientError": lambda error: _of_check(error.check),
    "NoiseScale": lambda noise: [float(noise), noise.out_of_range],
    "Event": lambda event: event.nonfinite,
    "CapturingSink": _of_sink,
    "LinearModel": _of_linear_model,
    "Report": _of_report,
    "History": _of_history,
    "RunFolder": _of_run_folder,
    "TensorBoardWriter": _of_writer,
    "GradientMonitor": _of_monitor,
    "GradientMonitorFresh": _of_monitor,
}
_GLOBAL = gradwatch.ClipByValue(1.0)

TEXTS = ("Report", "Curvature", "GradientCheck", "GradientMismatch")
REPRS = (
    *clip_policies(), "AccumulateByNoiseScale", "AccumulationSchedule", "FixedAccumulation",
    "CurvatureEvery", "SpikeRule", "NoiseScale", "Layout", "StepRecord", "Event", "Thresholds",
    "Seen", "Overhead", "CurvatureSample", "Curvature",
)  # fmt: skip
