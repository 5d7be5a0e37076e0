"""What is written of a training on a device: the run folder, and TensorBoard's event files."""

import math

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import gradwatch
from gradwatch_tensorboard import TensorBoardWriter
from tests.support import device, zoo

STEPS = 90
COLUMNS = ["grad_norm", "grad_norm_clipped", "clip_coef", "outcome", "lr", "nonfinite_parameters"]
TAGS = {"gradwatch/grad_norm": "grad_norm", "gradwatch/clip_coef": "clip_coef"}


def _train(folder, place, to, tensor):
    """Trains with a clip, of which step 40 is skipped; returns the watcher."""
    torch.manual_seed(0)
    model, data = to(zoo.small()), [tensor(torch.randn(8, 4)) for _ in range(STEPS)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sinks = [TensorBoardWriter(folder / place / "board")]
    options = {"clip": 0.5, "on_nonfinite": "skip", "statistics": ("std", "zeros")}
    with gradwatch.watch(
        model, optimizer, run_dir=folder / place / "run", sinks=sinks, **options
    ) as watcher:
        for step, x in enumerate(data):
            factor = math.nan if step == 39 else 1.0
            (model(x).square().mean() * factor).backward()
            optimizer.step()
            optimizer.zero_grad()
    return watcher


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Gives a folder with the same training on the CPU and, with late numbers, on the device."""
    folder = tmp_path_factory.mktemp("runs")
    _train(folder, "cpu", lambda module: module, lambda x: x)
    with device.late(3):
        watcher = _train(folder, "device", device.to, device.tensor)
    return folder, watcher


def test_the_run_folder_holds_what_the_history_does(runs):
    """All steps, in order, however late their numbers came."""
    folder, watcher = runs
    loaded = gradwatch.load(folder / "device" / "run")
    assert loaded.steps()[COLUMNS].equals(watcher.history.steps()[COLUMNS])
    assert loaded.parameters().equals(watcher.history.parameters())
    assert loaded.events()["kind"].tolist() == watcher.history.events()["kind"].tolist()


def test_the_run_folder_is_that_of_the_same_training_on_a_cpu(runs):
    """Numbers to six digits, outcomes and events exactly."""
    there, here = (gradwatch.load(runs[0] / name / "run") for name in ("device", "cpu"))
    told = ["kind", "step", "parameter", "nan_count"]
    assert there.events()[told].values.tolist() == here.events()[told].values.tolist()
    assert there.steps().outcome.tolist() == here.steps().outcome.tolist()
    for column in ("grad_norm", "grad_norm_clipped", "clip_coef"):
        expected = here.steps()[column].tolist()
        assert there.steps()[column].tolist() == pytest.approx(expected, 1e-5, nan_ok=True)
    for column in ("grad_norm", "std", "zeros"):
        expected = here.parameters()[column].tolist()
        assert there.parameters()[column].tolist() == pytest.approx(expected, 1e-5, nan_ok=True)


def test_tensorboard_has_every_step(runs):
    """The scalars are those of the history, each at its own step."""
    folder, watcher = runs
    reader = EventAccumulator(str(folder / "device" / "board"), size_guidance={"scalars": 0})
    reader.Reload()
    steps = watcher.history.steps()
    for tag, column in TAGS.items():
        found = {one.step: one.value for one in reader.Scalars(tag)}
        finite = steps[column].map(math.isfinite)
        expected = dict(zip(steps.index[finite], steps[column][finite], strict=True))
        assert {step: found[step] for step in expected} == pytest.approx(expected, 1e-6)
