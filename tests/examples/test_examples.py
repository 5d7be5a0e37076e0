"""The scripts in examples/ run as a reader would run them, with few steps."""

from __future__ import annotations

import functools
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import processes

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SCRIPTS = sorted(path.name for path in EXAMPLES.glob("[!_]*.py"))
FEW = {
    "noise_scale.py": ("--steps", "6"),
    "plain_loop.py": ("--steps", "6"),
    "train_accelerate.py": ("--steps", "6"),
    "train_ddp.py": ("--steps", "6"),
    "train_fabric.py": ("--steps", "6"),
    "train_fsdp2.py": ("--steps", "6"),
    "train_huggingface.py": ("--steps", "6"),
    "train_lightning.py": ("--epochs", "1"),
}
RANKED = ("train_ddp.py", "train_fsdp2.py")
WITHOUT_MATPLOTLIB = """
import pathlib, runpy, sys
sys.modules["matplotlib"] = None
del sys.argv[0]
sys.path.insert(0, str(pathlib.Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# Seen of torch 2.13 on a busy machine: a rank that is done aborts while its interpreter ends, when a
# thread of gloo wants the GIL at that moment. It says nothing of the script, which is run again.
ABORTED = "terminate called without an active exception"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
NEEDS_FSDP2 = pytest.mark.skipif(
    torch.__version__ < (2, 9), reason="FSDP2 on CPUs needs torch 2.9 or newer"
)
MARKS = {
    "train_ddp.py": [pytest.mark.slow],
    "train_fsdp2.py": [pytest.mark.slow, NEEDS_FSDP2],
}
RUNS = [pytest.param(script, marks=MARKS.get(script, [])) for script in SCRIPTS]
# A script for FSDP2 cannot even be read by an older torch.
READABLE = [
    pytest.param(script, marks=[NEEDS_FSDP2] if script == "train_fsdp2.py" else [])
    for script in SCRIPTS
]


def start_example(
    script: str, *options: object, launcher: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """Runs a script with the same packages as this test."""
    return processes.run(*launcher, EXAMPLES / script, *options)


def run_example(script: str, *options: object) -> str:
    """Runs a script, on two ranks if it is for several, and returns what it printed."""
    result = start_example(script, *options, launcher=TORCHRUN if script in RANKED else ())
    for _ in range(3):
        if script not in RANKED or result.returncode == 0 or ABORTED not in result.stderr:
            break
        result = start_example(script, *options, launcher=TORCHRUN)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[str, Path]]:
    """Runs a script with few steps, once for all tests; what it printed, and its log folder."""

    @functools.cache
    def run(script: str) -> tuple[str, Path]:
        logdir = tmp_path_factory.mktemp("few") / "logs"
        return run_example(script, *FEW[script], "--logdir", logdir), logdir

    return run


@pytest.fixture
def end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[object, str, str]]:
    """Runs here a script that ends before it trains: its exit code, and what it printed."""

    def run(script: str, *options: str) -> tuple[object, str, str]:
        monkeypatch.syspath_prepend(str(EXAMPLES))
        monkeypatch.setattr(sys, "argv", [str(EXAMPLES / script), *options])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(EXAMPLES / script), run_name="__main__")
        return ended.value.code, *capsys.readouterr()

    return run


def row(output: str, name: str) -> str:
    """Returns the value beside a name in the closing table."""
    found = re.search(rf"^  {name} +(.*)$", output, flags=re.MULTILINE)
    assert found, f"no row {name!r} in:\n{output}"
    return found[1]


def test_every_example_is_tested() -> None:
    """A script that is added to examples/ is run here too."""
    assert sorted(FEW) == SCRIPTS


@pytest.mark.parametrize("script", READABLE)
def test_help_names_the_options(script: str, end: Callable[..., Any]) -> None:
    """``--help`` says what can be set."""
    code, output, _ = end(script, "--help")
    assert code == 0
    assert all(option in output for option in ("--clip", "--on-nonfinite", "--logdir", "--seed"))


@pytest.mark.slow
@pytest.mark.parametrize("script", RUNS)
def test_ends_with_a_table_and_what_to_open(script: str, few: Callable[..., Any]) -> None:
    """A run ends with the closing table, and left event files where it says."""
    output, logdir = few(script)
    assert int(row(output, "steps")) >= 6
    assert float(row(output, "median norm")) > 0
    assert re.fullmatch(r"\S+ \(step \d+\)", row(output, "largest norm"))
    assert re.fullmatch(r"\d+% of the steps", row(output, "clipped"))
    assert row(output, "events") == "none"
    assert f"tensorboard --logdir {logdir}\n" in output
    assert len(list(logdir.rglob("events.out.tfevents.*"))) == 1
    assert len(list(logdir.iterdir())) == 1


def test_noise_scale_draws_a_picture(few: Callable[..., Any]) -> None:
    """The run leaves a PNG beside its logs, and says where."""
    output, logdir = few("noise_scale.py")
    picture = logdir.with_suffix(".png")
    assert f"Plot: {picture}\n" in output
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert "(20 windows are needed, 6 were seen)" in output


def test_noise_scale_without_matplotlib_trains_all_the_same(tmp_path: Path) -> None:
    """Without the package the script says before the training what to install, and goes on."""
    options = (*FEW["noise_scale.py"], "--logdir", tmp_path / "logs")
    result = start_example("noise_scale.py", *options, launcher=("-c", WITHOUT_MATPLOTLIB))
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("There will be no plot")
    assert "pip install 'gradwatch[plot]'" in result.stdout
    assert row(result.stdout, "steps") == "6"
    assert not (tmp_path / "logs.png").exists()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (("--min", "3"), "must be a power of two, got 3"),
        (("--min", "8", "--max", "4"), "must be at most the max of 4, got 8"),
        (("--steps", "0"), "must be at least 1"),
    ],
)
def test_noise_scale_refuses_bounds_in_one_line(
    options: tuple[str, ...], text: str, end: Callable[..., Any]
) -> None:
    """A bound that makes no sense is an error of the command line and not a traceback."""
    code, _, error = end("noise_scale.py", *options)
    assert code == 2
    assert text in error
    assert "Traceback" not in error


@pytest.mark.slow
def test_the_batch_follows_the_noise_scale(tmp_path: Path) -> None:
    """Within 150 steps the batch doubles, the table says so, and the comparison has three rows."""
    options = ("--steps", 150, "--micro-batch", 2, "--compare", "--logdir", tmp_path / "logs")
    output = run_example("noise_scale.py", *options)
    assert "a step has 4 micro-batches instead of 2: the noise scale is" in output
    batches = [int(cell) for cell in re.findall(r"\d \xb1 \d+ +(\d+) +0\.", output)]
    assert batches == sorted(batches)
    assert batches[0] == 4 < batches[-1]
    rows = re.findall(r"^  (auto|always \d+) +([\d,]+) +\d\.\d{3} ", output, flags=re.MULTILINE)
    assert [name for name, _ in rows] == ["auto", "always 4", f"always {batches[-1]}"]
    auto, small, large = (int(steps.replace(",", "")) for _, steps in rows)
    assert small > auto == 150 > large


@pytest.mark.slow
def test_the_same_seed_gives_the_same_numbers(tmp_path: Path) -> None:
    """Two runs of the plain loop with one seed print the same norms."""
    options = (*FEW["plain_loop.py"], "--logdir", tmp_path)
    outputs = [run_example("plain_loop.py", *options) for _ in range(2)]
    assert row(outputs[0], "largest norm") == row(outputs[1], "largest norm")


def test_a_poisoned_batch_costs_one_step(tmp_path: Path) -> None:
    """By default the poisoned step is skipped and explained to its line; training goes on."""
    output = run_example("plain_loop.py", "--steps", 6, "--poison-step", 3, "--logdir", tmp_path)
    assert row(output, "steps") == "6"
    assert row(output, "skipped") == "1"
    assert row(output, "events") == "1 explained, 1 nan, 1 skipped"
    assert "return (losses * weights).sum() / weights.sum()" in output
    assert "Made possible by what is in the input weights." in output
    assert "nan nats" not in output


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_nan_in_a_loop_of_fabric_is_found(precision: str, tmp_path: Path) -> None:
    """The poisoned step is skipped, and the example with the NaN named, in mixed precision too."""
    options = ("--steps", 6, "--poison-step", 3, "--precision", precision, "--logdir", tmp_path)
    output = run_example("train_fabric.py", *options)
    assert row(output, "steps") == "6"
    assert row(output, "skipped") == "1"
    assert "of the input input (float32, [64, 2]) are NaN, in example 7." in output
    assert "loss = F.cross_entropy(model(inputs), targets)" in output


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


@pytest.mark.parametrize("script", [one for one in READABLE if one.values[0] in RANKED])
def test_says_how_to_start_it_on_several_ranks(script: str, end: Callable[..., Any]) -> None:
    """A script for several ranks that is started as a plain one names the command."""
    code, _, error = end(script)
    assert code == 2
    assert f"torchrun --nproc-per-node 2 {os.path.relpath(EXAMPLES / script)}" in error


def ranks(output: str) -> list[list[str]]:
    """Returns the cells of the table with one line per rank."""
    lines = re.findall(r"^  \d  .*$", output, flags=re.MULTILINE)
    return [re.split(r"  +", line.strip()) for line in lines]


@pytest.mark.slow
def test_the_norm_before_the_reduction_tells_the_sick_rank(tmp_path: Path) -> None:
    """With DDP both ranks have the NaN and skip the step; one of them had it before."""
    output = run_example("train_ddp.py", "--steps", 4, "--poison-step", 3, "--logdir", tmp_path)
    (_, healthy, *seen), (_, sick, *seen_too) = ranks(output)
    assert float(healthy) > 0
    assert sick == "nan"
    assert seen == ["nan", "skipped_nonfinite", "nan in head.bias, from another rank"]
    assert seen_too == ["nan", "skipped_nonfinite", "nan in head.bias, micro-batch 1"]
    assert "nan nats" not in output


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [(), TORCHRUN], ids=["one process", "two"])
def test_accelerate_names_the_sick_batch(launcher: tuple[str, ...], tmp_path: Path) -> None:
    """In one process and in two there is one summary, one event file and one step left out."""
    options = ("--steps", 6, "--poison-step", 3, "--logdir", tmp_path)
    result = start_example("train_accelerate.py", *options, launcher=launcher)
    assert result.returncode == 0, result.stderr
    assert row(result.stdout, "steps") == "6"
    assert row(result.stdout, "skipped") == "1"
    assert result.stdout.count("Next, see every parameter") == 1
    assert "loss = (model(inputs) - targets).square().mean()" in result.stdout
    assert len(list(tmp_path.rglob("events.out.tfevents.*"))) == 1


@NEEDS_FSDP2
@pytest.mark.slow
def test_every_rank_of_a_sharded_model_sees_the_whole(tmp_path: Path) -> None:
    """With FSDP2 each rank holds half and records the norm of all; both skip the same step."""
    options = ("--bf16", "--steps", 4, "--poison-step", 3, "--logdir", tmp_path)
    output = run_example("train_fsdp2.py", *options)
    (_, *seen), (_, *seen_too) = ranks(output)
    assert seen == seen_too
    assert seen[0].startswith("50% of ")
    assert seen[-1] == "1 of 4 steps"
    assert "nan nats" not in output


@NEEDS_FSDP2
@pytest.mark.slow
def test_ddp_and_fsdp2_train_alike(tmp_path: Path) -> None:
    """The same seed gives the same norms, whole or sharded."""
    outputs = [run_example(s, "--steps", 6, "--seed", 3, "--logdir", tmp_path) for s in RANKED]
    assert row(outputs[0], "median norm") == row(outputs[1], "median norm")
    assert row(outputs[0], "largest norm") == row(outputs[1], "largest norm")


@pytest.mark.slow
def test_a_rank_that_fails_fails_the_run(tmp_path: Path) -> None:
    """An error on the ranks leaves a non-zero exit status, and no rank hangs."""
    result = start_example("train_ddp.py", "--steps", "0", "--logdir", tmp_path, launcher=TORCHRUN)
    assert result.returncode != 0
    assert "buffer_size" in result.stderr
