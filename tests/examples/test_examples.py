"""The scripts in examples/ run as a reader would run them, with few steps."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("[!_]*.py"))
FEW = {"plain_loop.py": ("--steps", "6"), "train_lightning.py": ("--epochs", "1")}


def run_example(script: str, *options: object) -> str:
    """Runs a script with the same packages as this test, and returns what it printed."""
    # The packages come from here without an install, from site-packages on the wheel in CI.
    paths = [path for path in sys.path if path and Path(path).is_dir()]
    result = subprocess.run(
        [sys.executable, EXAMPLES / script, *map(str, options)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def row(output: str, name: str) -> str:
    """Returns the value beside a name in the closing table."""
    found = re.search(rf"^  {name} +(.*)$", output, flags=re.MULTILINE)
    assert found, f"no row {name!r} in:\n{output}"
    return found[1]


def test_every_example_is_tested() -> None:
    """A script that is added to examples/ is run here too."""
    assert sorted(FEW) == SCRIPTS


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_names_the_options(script: str) -> None:
    """``--help`` says what can be set."""
    output = run_example(script, "--help")
    assert all(option in output for option in ("--clip", "--on-nonfinite", "--logdir", "--seed"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_ends_with_a_table_and_what_to_open(script: str, tmp_path: Path) -> None:
    """A run ends with the closing table, and left event files where it says."""
    logdir = tmp_path / "logs"
    output = run_example(script, *FEW[script], "--logdir", logdir)
    assert int(row(output, "steps")) >= 6
    assert float(row(output, "median norm")) > 0
    assert re.fullmatch(r"\S+ \(step \d+\)", row(output, "largest norm"))
    assert re.fullmatch(r"\d+% of the steps", row(output, "clipped"))
    assert row(output, "events") == "none"
    assert f"tensorboard --logdir {logdir}\n" in output
    assert list(logdir.rglob("events.out.tfevents.*"))


@pytest.mark.slow
def test_the_same_seed_gives_the_same_numbers(tmp_path: Path) -> None:
    """Two runs of the plain loop with one seed print the same norms."""
    options = (*FEW["plain_loop.py"], "--logdir", tmp_path)
    outputs = [run_example("plain_loop.py", *options) for _ in range(2)]
    assert row(outputs[0], "largest norm") == row(outputs[1], "largest norm")


def test_a_poisoned_batch_costs_one_step(tmp_path: Path) -> None:
    """By default the poisoned step is skipped, the event says which, and training goes on."""
    output = run_example("plain_loop.py", "--steps", 6, "--poison-step", 3, "--logdir", tmp_path)
    assert row(output, "steps") == "6"
    assert row(output, "skipped") == "1"
    assert row(output, "events") == "1 nan, 1 skipped"
    assert "First event: NaN in the gradient of head.bias" in output
    assert "nan nats" not in output


@pytest.mark.slow
def test_a_recorded_nan_ruins_the_model(tmp_path: Path) -> None:
    """With ``--on-nonfinite record`` every step after the poisoned one is lost too."""
    output = run_example(
        "plain_loop.py",
        "--steps",
        6,
        "--poison-step",
        3,
        "--on-nonfinite",
        "record",
        "--logdir",
        tmp_path,
    )
    assert row(output, "events") == "4 nan"
    assert "-> nan nats" in output


@pytest.mark.slow
def test_raise_stops_before_the_weights_change(tmp_path: Path) -> None:
    """With ``--on-nonfinite raise`` the run stops, and the model is still good."""
    output = run_example(
        "plain_loop.py",
        "--steps",
        6,
        "--poison-step",
        3,
        "--on-nonfinite",
        "raise",
        "--logdir",
        tmp_path,
    )
    assert "stopped: NaN in the gradient of head.bias" in output
    assert "nan nats" not in output


@pytest.mark.slow
def test_no_clip_clips_nothing(tmp_path: Path) -> None:
    """``--clip 0`` leaves the gradients alone."""
    output = run_example("plain_loop.py", *FEW["plain_loop.py"], "--clip", 0, "--logdir", tmp_path)
    assert row(output, "clipped") == "0% of the steps"
