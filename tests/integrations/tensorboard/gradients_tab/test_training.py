"""Real trainings: what is written, what is lost when one is killed, and disks that fail."""

import math
import resource
import shutil
import signal
import subprocess
import time
import warnings

import numpy as np
import pytest
import torch

import gradwatch
from gradwatch.testing import CapturingSink
from gradwatch_tensorboard import TensorBoardWriter
from tests.support import processes, zoo

from . import logs


def train(model, steps, *, sinks=(), before=lambda step: None, optimizers=None, nan_at=()):
    """Trains on numbers that do not depend on the sinks; returns the watcher's history."""
    optimizers = optimizers or [torch.optim.SGD(model.parameters(), lr=0.01)]
    generator = torch.Generator().manual_seed(0)
    with gradwatch.watch(model, optimizers, sinks=sinks, on_nonfinite="skip") as watcher:
        for step in range(1, steps + 1):
            before(step)
            x = torch.randn(8, 4, generator=generator)
            for optimizer in optimizers:
                loss = model(x).square().mean()
                (loss * math.nan if step in nan_at else loss).backward()
                optimizer.step()
                optimizer.zero_grad()
    return watcher.history


def test_the_matrix_is_what_the_history_holds(load, tmp_path):
    """Every norm of every step, to the bit."""
    folder = tmp_path / "run"
    history = train(zoo.small(), 100, sinks=[TensorBoardWriter(folder)])
    (stream,) = logs.streams(load(folder))
    table = history.parameters().pivot_table(index="step", columns="parameter", values="grad_norm")
    np.testing.assert_array_equal(
        stream.norms, table[list(stream.layout.parameters)].to_numpy(np.float32)
    )
    assert stream.steps() == list(range(1, 101))
    np.testing.assert_allclose(stream.column("grad_norm"), history.steps()["grad_norm"])
    assert stream.layout.shapes == ((8, 4), (8,), (1, 8), (1,))
    assert stream.layout.modules == ("0", "0", "2", "2")


def test_two_real_optimizers(load, tmp_path):
    """Each stream has the parameters of its own optimizer."""
    folder = tmp_path / "run"
    model = zoo.small()
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.01) for part in (model[0], model[2])]
    train(model, 80, sinks=[TensorBoardWriter(folder)], optimizers=optimizers)
    first, second = logs.streams(load(folder))
    assert first.layout.parameters == ("0.weight", "0.bias")
    assert second.layout.parameters == ("2.weight", "2.bias")
    assert first.steps() == second.steps() == list(range(1, 81))
    assert (first.norms > 0).all()


@pytest.fixture
def full_disk():
    """Makes files fail beyond a size, as a full disk does; call it with the size."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def weights(model):
    """All weights in one row."""
    return torch.nn.utils.parameters_to_vector(model.parameters())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("failure", ["deleted", "full"])
def test_a_disk_that_fails_leaves_the_training_alone(tmp_path, full_disk, failure):
    """The training goes on to the same weights, bit for bit, and other sinks get every step."""
    plain, watched = zoo.small(), zoo.small()
    train(plain, 300, nan_at=(150, 250))
    folder = tmp_path / "run"
    other = CapturingSink()

    def fail(step):
        if step == 100 and failure == "deleted":
            shutil.rmtree(folder)
        if step == 100 and failure == "full":
            full_disk(sum(file.stat().st_size for file in folder.iterdir()) + 100)

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(
            watched, 300, sinks=[TensorBoardWriter(folder), other], before=fail, nan_at=(150, 250)
        )
    full_disk(resource.RLIM_INFINITY)
    ours = [
        str(entry.message)
        for entry in caught
        if issubclass(entry.category, gradwatch.GradwatchWarning)
    ]
    assert len(ours) == 3
    assert "may be missing in TensorBoard" in ours[0]
    assert "TensorBoardWriter failed in write() with" in ours[1]
    assert "The training and the other sinks go on." in ours[1]
    # The limit is one for each file: a new one has room again, unless it fills up as well before the
    # writer's own thread tells. A deleted folder stays deleted.
    assert "is given up. Lost: " in ours[2] or (failure == "full" and "works again" in ours[2])
    assert folder.exists() == (failure == "full")
    assert torch.equal(weights(plain), weights(watched))
    assert len(other.steps) == 300


SCRIPT = """
    import sys, torch, gradwatch
    from gradwatch_tensorboard import TensorBoardWriter
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with gradwatch.watch(model, optimizer, sinks=[TensorBoardWriter(sys.argv[1])]):
        step = 0
        while True:
            step += 1
            loss = model(torch.randn(8, 4)).square().mean()
            (loss * float("nan") if step == 300 else loss).backward()
            optimizer.step()
            optimizer.zero_grad()
            if step == 300:
                print("NaN", flush=True)
"""


def last_step(folder):
    """The last step that stands in the files; 0 if there is none."""
    steps = (stream.steps() for stream in logs.streams(logs.tensors(folder)))
    return max(map(max, filter(None, steps)), default=0)


def test_a_killed_process_leaves_a_file_that_reads(load, tmp_path):
    """All steps up to some one are there, each once: the rest had not been delivered."""
    folder = tmp_path / "run"
    with processes.start(folder, code=SCRIPT, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"NaN\n"
        while last_step(folder) < 300:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    (stream,) = logs.streams(load(folder))
    steps = stream.steps()
    assert steps == list(range(1, len(steps) + 1))
    assert len(steps) >= 300
    assert stream.column("bad_steps")[299] == 1
    assert np.isnan(stream.norms[299]).all()
