"""Checkpoints as users save them, policies as whole objects included, and how trainings go on."""

import copy

import torch

import gradwatch

from .told import told_frame
from .trainings import clip_policies, make_model, make_optimizers, managed_steps, plain_steps

STEPS, MORE = 34, 5


def make():
    """What goes into the file: for each training its states, and policies and records as they are."""
    return {
        **{name: _save(policy, managed=False) for name, policy in clip_policies().items()},
        **{name: _save(policy, managed=True) for name, policy in accumulate_policies().items()},
    }


def load(folder):
    """Loads the file as users do whose checkpoints hold more than tensors and numbers."""
    return torch.load(folder / "checkpoints.pt", weights_only=False)


def kept(folder, name):
    """The records and policies in the file as they are."""
    saved = load(folder)[name]
    return {key: saved[key] for key in ("policy", "last", "events", "noise_scale", "report")}


def resume(saved, name, *, whole, give="steps"):
    """Goes on with a training, and tells its next steps, or gives its state after them.

    Args:
        saved: Of the file.
        name: Of the training.
        whole: Whether the policy is the object from the file, rather than a fresh one.
        give: "steps" or "state".
    """
    managed = name in accumulate_policies()
    policy = {**clip_policies(), **accumulate_policies()}[name]
    if whole:
        policy = saved["policy"]
    model, optimizers, watcher = _begin(policy, managed)
    model.load_state_dict(saved["model"])
    for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    with watcher:
        watcher.load_state_dict(saved["watcher"])
        _train(watcher, model, optimizers, range(STEPS, STEPS + MORE), managed)
        state = watcher.state_dict()
    return state if give == "state" else steps_of(watcher)


def steps_of(watcher):
    """The records of a run, without times."""
    return told_frame(watcher.history.steps().drop(columns="time_s"))


def accumulate_policies():
    """A fresh policy of each kind that says how much to accumulate."""
    return {
        "AccumulateByNoiseScale": gradwatch.AccumulateByNoiseScale(
            2, 8, start=8, every=3, min_updates=6, scale_lr="sqrt"
        ),
        "schedule": {0: 2, 20: 3, 32: 4},
        "fixed": 3,
    }


def _begin(policy, managed):
    model = make_model()
    if managed:
        optimizers = [torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)]
        options = {"accumulate": policy, "clip": "auto"}
    else:
        optimizers = make_optimizers(model)
        options = {"clip": policy, "skip_spikes": 5.0}
    watcher = gradwatch.watch(model, optimizers, on_nonfinite="skip", **options)
    return model, optimizers, watcher


def _train(watcher, model, optimizers, numbers, managed):
    if managed:
        managed_steps(watcher, model, numbers, bad={11})
    else:
        plain_steps(watcher, model, optimizers, numbers, bad={11})


def _save(policy, *, managed):
    model, optimizers, watcher = _begin(policy, managed)
    with watcher:
        _train(watcher, model, optimizers, range(STEPS), managed)
        return {
            "model": model.state_dict(),
            "optimizers": [copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers],
            "watcher": watcher.state_dict(),
            "policy": policy,
            "last": watcher.last,
            "events": watcher.events[-2:],
            "noise_scale": watcher.noise_scale,
            "report": watcher.report() if policy == 3 else None,
        }
