"""The summary that all examples print at the end."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pandas as pd

import gradwatch


def print_summary(watcher: gradwatch.Watcher, logdir: Path) -> None:
    """Prints a summary of a run, and what to open next.

    Args:
        watcher: The watcher of the run, closed or not.
        logdir: The folder to open in TensorBoard.
    """
    rows = {
        **_norm_rows(watcher.history.steps()),
        "events": _count_kinds(watcher.history.events()),
        "gradwatch took": f"{watcher.overhead.share:.1%} of the time",
    }
    width = max(map(len, rows))
    print()
    for name, value in rows.items():
        print(f"  {name:<{width}}  {value}")
    for explanation in watcher.explanations[:1]:
        print(f"\n{explanation}")
    if watcher.events and not watcher.explanations:
        print(f"\nFirst event: {watcher.events[0].message}")
    board = f"{command('tensorboard')} --logdir {logdir}"
    print(f"\nNext, see every parameter at every step, in the tab Gradients: {board}")


def _norm_rows(steps: pd.DataFrame) -> dict[str, str]:
    if steps.empty:
        return {"steps": "0"}
    norms = steps["grad_norm"]
    rows = {"steps": f"{len(steps)}", "skipped": f"{(steps['outcome'] != 'applied').sum()}"}
    finite = norms[norms < float("inf")]
    if not finite.empty:
        rows["median norm"] = f"{finite.median():.3g}"
        rows["largest norm"] = f"{finite.max():.3g} (step {finite.idxmax()})"
    rows["clipped"] = f"{steps['clipped'].mean():.0%} of the steps"
    return rows


def _count_kinds(events: pd.DataFrame) -> str:
    counts = events["kind"].value_counts()
    return ", ".join(f"{number} {kind}" for kind, number in counts.items()) or "none"


def command(name: str) -> str:
    """Returns a command as it can be typed here, even if the environment is not activated.

    Args:
        name: A command that comes with a package of this environment.
    """
    if shutil.which(name):
        return name
    return os.path.relpath(Path(sys.executable).with_name(name))
