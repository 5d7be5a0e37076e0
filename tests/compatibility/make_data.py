"""Made `data/`, once, with gradwatch as it was before its modules were moved.

    python -m tests.compatibility.make_data FOLDER

Never make the data anew: it stands for the runs, checkpoints and pickles that people have kept. Data
made by the present code only says that the code can read what it writes itself, which the other tests
say already; a file that was written before a change of names or formats would be gone for good. Where
a new kind of object is to be kept, add files beside these. For the same reason this script is not kept
up to date: it imports modules that were there on that day.
"""

import importlib
import json
import os
import pickle
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch

import gradwatch
from gradwatch_tensorboard import TensorBoardWriter

from . import boards, checkpoints, pickles
from .answers import history_answers
from .told import told
from .trainings import (
    STATISTICS,
    make_model,
    make_optimizers,
    managed_steps,
    plain_steps,
)

HISTORY_STEPS, KILLED_STEPS = 25, 12
INTERNAL = {
    "AccumulationSchedule": "gradwatch.control.accumulate_schedule",
    "CommandError": "gradwatch.commands.shared.command_error",
    "Curvature": "gradwatch.explain.hessian.result",
    "CurvatureSample": "gradwatch.explain.curvature_every",
    "Finding": "gradwatch.explain.report.finding",
    "FixedAccumulation": "gradwatch.control.accumulate_schedule",
    "GradientCheck": "gradwatch.explain.gradients.result",
    "GradientMismatch": "gradwatch.explain.gradients.result",
    "Layout": "gradwatch.record.batch",
    "NoiseScaleEstimator": "gradwatch.control.noise_scale",
    "NotFiniteError": "gradwatch.explain.hessian.not_finite",
    "Options": "gradwatch.options",
    "Overhead": "gradwatch.overhead",
    "Report": "gradwatch.explain.report.report",
    "Seen": "gradwatch.explain.report.finding",
    "SpikeRule": "gradwatch.control.spikes",
    "Thresholds": "gradwatch.explain.report.thresholds",
    "TooManySkipsError": "gradwatch.control.judge",
    "UnreadableError": "gradwatch.record.folder.unreadable",
    "WrongGradientError": "gradwatch.explain.gradients.result",
}


def internal(name):
    """A class that users meet without importing it."""
    return getattr(importlib.import_module(INTERNAL[name]), name)


# -- (a) run folders -----------------------------------------------------------------------------


def write_runs(folder):
    """A run that was resumed, with its parts merged; and one of a process that was killed."""
    _write_resumed(folder / "resumed")
    with tempfile.TemporaryDirectory() as temporary:
        running = Path(temporary) / "run"
        _write_killed(running, folder / "killed")


def _write_resumed(path):
    state = None
    for numbers, bad in ((range(20), {4, 13}), (range(16, HISTORY_STEPS), {23})):
        model = make_model()
        optimizers = make_optimizers(model)
        watcher = gradwatch.watch(
            model,
            optimizers,
            clip=gradwatch.AutoClip(70.0, window=30, warmup=4),
            accumulate=3,
            on_nonfinite="skip",
            statistics=STATISTICS,
            exploding_norm=4.0,
            run_dir=path,
        )
        if state is not None:
            model.load_state_dict(state["model"])
            for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
            watcher.load_state_dict(state["watcher"])
        with watcher:
            for number in numbers:
                managed_steps(watcher, model, [number], bad=bad)
                if number == 15:
                    state = _state_of(model, optimizers, watcher)


def _state_of(model, optimizers, watcher):
    state = {
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "watcher": watcher.state_dict(),
    }
    return pickle.loads(pickle.dumps(state))


def _write_killed(running, path):
    model = make_model()
    optimizers = make_optimizers(model)
    with gradwatch.watch(model, optimizers, clip=0.5, on_nonfinite="skip", statistics=("norm", "max"),
                         every=4, run_dir=running) as watcher:  # fmt: skip
        for number in range(KILLED_STEPS):
            plain_steps(watcher, model, optimizers, [number], bad={6})
            if number % 3 == 2:
                watcher.flush()
        shutil.copytree(running, path, ignore=shutil.ignore_patterns(".lock"))


# -- (d) pickles ---------------------------------------------------------------------------------


def objects_to_pickle(runs):
    """Each public class, and what users get without importing its class, as an object by its name."""
    checked = gradwatch.check_gradients(pickles.wrong_function(), torch.tensor([1.0, 3.0]))
    x = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    curvature = gradwatch.curvature({"x": x}, lambda: x[0] ** 2 + x[1] ** 2 + x[0] * x[1])
    history = gradwatch.load(runs / "resumed")
    report = history.report(few_steps=4, skipped=0.001)
    sink = gradwatch_testing().CapturingSink()
    _train_into(sink)
    batch = next(one for one in sink.batches if one.events)
    event = next(one for one in batch.events if one.kind == "nan")
    noise = _noise_scale()
    named = {
        name: internal(name)
        for name in ("CommandError", "NotFiniteError", "TooManySkipsError", "UnreadableError")
    }
    objects = {
        **pickles.policies_with_memory(),
        **_policies_of_a_device(),
        "SpikeRule": _fed_spikes(internal("SpikeRule")(4.0)),
        "FixedAccumulation": internal("FixedAccumulation")(4),
        "AccumulationSchedule": _decided(internal("AccumulationSchedule")({0: 1, 5: 2, 10: 4})),
        "ClipDecision": gradwatch.ClipDecision(torch.tensor(0.25), 1.5),
        "ClipDecisionOfUnits": gradwatch.AdaptiveGradientClip(0.1).decide(torch.tensor(1.0)),
        "CurvatureEvery": gradwatch.CurvatureEvery(
            7, gradwatch_testing().LinearModel([3.0, 4.0]), iterations=11, probes=3
        ),
        "CurvatureSample": internal("CurvatureSample")(1.5, 2.5),
        "Curvature": curvature,
        "GradientCheck": checked,
        "GradientMismatch": checked.failures[0],
        "WrongGradientError": internal("WrongGradientError")(checked),
        "NonFiniteGradientError": gradwatch.NonFiniteGradientError(
            "bad", step=3, micro_batch=2, parameter="0.weight", nan_count=4, inf_count=1
        ),
        "AccumulationError": gradwatch.AccumulationError("too early"),
        "GradwatchWarning": gradwatch.GradwatchWarning("something failed"),
        **{name: kind(f"text of {name}") for name, kind in named.items()},
        "NoiseScale": noise,
        "StepRecord": batch.steps[-1],
        "Event": event,
        "Layout": batch.layout,
        "RecordBatch": batch,
        "CapturingSink": sink,
        "LinearModel": gradwatch_testing().LinearModel([3.0, 4.0]),
        "Report": report,
        "Finding": report.findings[0],
        "Seen": report.findings[0].seen,
        "Thresholds": internal("Thresholds")(spike=20.0, few_steps=5),
        "Overhead": internal("Overhead")(0.5, 0.125),
        "GradientMonitor": pickles.fitted_monitor(),
        "GradientMonitorFresh": pickles.fresh_monitor(),
    }
    objects["classes"] = _classes()
    return {**objects, **_objects_with_paths()}


def _policies_of_a_device():
    """The policies whose memory is on a device; the CPU is treated like one."""
    with gradwatch_testing().late_readings():
        policies = pickles.policies_with_memory()
        rule = _fed_spikes(internal("SpikeRule")("auto"))
    names = ("RobustClip", "AutoClip", "ZClip", "AdaGC")
    return {**{f"{name}OfDevice": policies[name] for name in names}, "SpikeRuleOfDevice": rule}


def _objects_with_paths():
    """What opens its files only when it is used; with paths that are the same on every machine."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as temporary:
        os.chdir(temporary)
        try:
            _write_killed(Path("running"), Path("killed"))
            folder = gradwatch.RunFolder("kept")
            folder.close()  # gives back the lock, whose path is absolute
            history = gradwatch.load("killed")
            history.parameters()
            writer = TensorBoardWriter("log", every=5, heatmap=False)
            return {"History": history, "RunFolder": folder, "TensorBoardWriter": writer}
        finally:
            os.chdir(before)


def gradwatch_testing():
    """The module; `import gradwatch` does not load it."""
    return importlib.import_module("gradwatch.testing")


def _classes():
    from gradwatch_lightning import GradientMonitor

    public = {name: getattr(gradwatch, name) for name in gradwatch.__all__}
    testing = {name: getattr(gradwatch_testing(), name) for name in gradwatch_testing().__all__}
    adapters = {"GradientMonitor": GradientMonitor, "TensorBoardWriter": TensorBoardWriter}
    return {**public, **testing, **adapters, **{name: internal(name) for name in INTERNAL}}


def _train_into(sink):
    model = make_model()
    optimizers = make_optimizers(model)
    with gradwatch.watch(model, optimizers, clip="auto", on_nonfinite="skip", statistics=("max",),
                         sinks=[sink]) as watcher:  # fmt: skip
        plain_steps(watcher, model, optimizers, range(4))
        watcher.flush()
        plain_steps(watcher, model, optimizers, range(4, 9), bad={5})


def _noise_scale():
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with gradwatch.watch(model, optimizer, accumulate=4) as watcher:
        managed_steps(watcher, model, range(30))
    return watcher.noise_scale


def _fed_spikes(rule):
    for number in range(30):
        rule.is_spike(torch.tensor(pickles.norm(number), dtype=torch.float64))
    return rule


def _decided(policy):
    policy.decide(6, pickles.noise_scale())
    return policy


def write_pickles(folder, runs):
    """A file each, and what each held; a Watcher and the history of a live run do not pickle."""
    folder.mkdir()
    held = {}
    for name, value in objects_to_pickle(runs).items():
        (folder / f"{name}.pickle").write_bytes(pickle.dumps(value, protocol=4))
        with pickles.in_folder(runs):
            held[name] = pickles.held_by(name, pickle.loads(pickle.dumps(value, protocol=4)))
    (folder.parent / "pickles.json").write_text(as_json(held))


# -- (c) checkpoints -----------------------------------------------------------------------------


def _resumed(folder):
    """The next steps of each training, the same in whichever way it is resumed."""
    answers = {}
    for name in checkpoints.load(folder):
        ways = [
            checkpoints.resume(checkpoints.load(folder)[name], name, whole=whole)
            for whole in (False, True)
        ]
        if ways[0] != ways[1]:
            raise RuntimeError(f"{name} goes on otherwise with the policy as an object")
        answers[name] = {"steps": ways[0], "kept": told(checkpoints.kept(folder, name))}
    return answers


# -- all -----------------------------------------------------------------------------------------


def as_json(content):
    """JSON with a line for each entry."""
    lines = (
        f"{json.dumps(key)}: {json.dumps(one, separators=(',', ':'))}"
        for key, one in content.items()
    )
    return "{\n" + ",\n".join(lines) + "\n}\n"


def main(folder):
    """Writes everything into a folder that is not there yet."""
    folder.mkdir(parents=True)
    runs = folder / "folders"
    runs.mkdir()
    write_runs(runs)
    answers = {path.name: history_answers(gradwatch.load(path)) for path in sorted(runs.iterdir())}
    (folder / "folders.json").write_text(as_json(answers))
    boards.write_log(folder / "logs" / "run")
    (folder / "logs.json").write_text(as_json(boards.answers_of(folder / "logs")))
    torch.save(checkpoints.make(), folder / "checkpoints.pt")
    (folder / "checkpoints.json").write_text(as_json(_resumed(folder)))
    write_pickles(folder / "pickles", runs)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    # NumPy 2 says numpy._core, which NumPy 1 has not; every version loads the old name.
    importlib.import_module("numpy.core.multiarray")
    np.zeros(1).__reduce__()[0].__module__ = "numpy.core.multiarray"
    main(Path(sys.argv[1]))
