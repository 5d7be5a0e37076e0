"""Section 10: a loop that accumulates, clips, survives a bad batch and records the run.

One weight w goes from 0 toward 4 by the loss (w - 4)^2 / 2, whose gradient is w - 4, with a
learning rate of 0.5. Clipped to 1, each good step moves w by 0.5. The third batch is NaN and must
not move it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor

import gradwatch
from _table import compare

BATCHES = (4.0, 4.0, float("nan"), 4.0)


def train(run_dir: Path) -> tuple[Tensor, gradwatch.Watcher]:
    """Trains in a managed loop, where gradwatch accumulates, clips, steps and zeroes."""
    w = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.SGD([w], lr=0.5)
    with gradwatch.watch(
        {"w": w}, optimizer, accumulate=2, clip=1.0, on_nonfinite="skip", run_dir=run_dir
    ) as watcher:
        for target in BATCHES:
            for _ in range(2):  # two equal micro-batches: their mean is each of them
                watcher.backward((w - target) ** 2 / 2)
                watcher.step()
    return w, watcher


def overwritten() -> bool:
    """Modifies the result of exp in place, which its backward needs; torch raises an error."""
    x = torch.ones(2, requires_grad=True)
    y = x.exp()
    y.add_(1)
    try:
        y.sum().backward()
    except RuntimeError:
        return True
    return False


def main() -> dict[str, float]:
    """Runs the section, and returns the measured numbers."""
    with tempfile.TemporaryDirectory() as folder:
        w, watcher = train(Path(folder) / "run")
        loaded = gradwatch.load(Path(folder) / "run")
        same = loaded.steps().equals(watcher.history.steps())
        same_report = str(loaded.report()) == str(watcher.report())
    steps = watcher.history.steps()
    columns = ["micro_batches", "loss", "grad_norm", "clip_coef", "outcome"]
    print(steps[columns].to_string(float_format="{:.3g}".format))
    print(*(f"{finding.kind}: {finding.title}" for finding in watcher.report()), sep="\n")
    return compare(
        {
            "w after four steps": (3 * 0.5, w.item()),
            "norm, step 1": (4, steps["grad_norm"][1]),
            "norm, step 2": (3.5, steps["grad_norm"][2]),
            "norm, step 4": (3, steps["grad_norm"][4]),
            "loss, step 4": (3**2 / 2, steps["loss"][4]),
            "factor of the clip, step 4": (1 / 3, steps["clip_coef"][4]),
            "steps left out": (1, (steps["outcome"] == "skipped_nonfinite").sum()),
            "the folder's steps are the same": (1, same),
            "and so is its report": (1, same_report),
            "exp overwritten: an error": (1, overwritten()),
        }
    )


if __name__ == "__main__":
    main()
