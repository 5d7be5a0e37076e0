"""What a History makes of a run: report, flow and plots, the same live and loaded."""

import matplotlib as mpl
import pytest
import torch
from torch import nn

import gradwatch

mpl.use("Agg")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a deep sigmoid stack, live and loaded."""
    pytest.importorskip("pyarrow")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("runs") / "a"
    layers = [layer for _ in range(12) for layer in (nn.Linear(16, 16), nn.Sigmoid())]
    model = nn.Sequential(*layers, nn.Linear(16, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.watch(model, optimizer, clip=0.5, run_dir=folder) as watcher:
        for _ in range(60):
            x = torch.randn(8, 16)
            (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return watcher, gradwatch.load(folder)


def test_reports_are_equal(run):
    """The findings, and every number in them; the stack is too deep for its gradients."""
    watcher, loaded = run
    assert watcher.report().to_dict() == loaded.report().to_dict()
    assert "vanishing" in loaded.report().kinds


def test_flows_are_equal(run):
    """One row per parameter, in the order of the model, and the first layers receive the least."""
    watcher, loaded = run
    flow = loaded.flow()
    assert flow.equals(watcher.history.flow())
    assert list(flow.index) == list(loaded.names)
    assert flow["grad_norm"].iloc[0] < 1e-3 * flow["grad_norm"].iloc[-1]


@pytest.mark.parametrize("name", ["plot_norms", "plot_flow", "plot_heatmap", "plot_clipping"])
def test_pictures_are_equal(run, name):
    """Pixel by pixel."""
    import numpy as np
    from matplotlib import pyplot as plt

    pictures = []
    for history in (run[0].history, run[1]):
        figure = getattr(history, name)().figure
        figure.canvas.draw()
        pictures.append(np.asarray(figure.canvas.buffer_rgba()).copy())
        plt.close(figure)
    assert np.array_equal(*pictures)
    assert len(np.unique(pictures[0])) > 10


def test_a_run_that_begins_anew_leaves_the_earlier_one(tmp_path):
    """A second run at step 1 in the same folder is told of, and the first stays readable beside it."""
    pytest.importorskip("pyarrow")
    for steps in (5, 3):
        x = torch.tensor(1.0, requires_grad=True)
        optimizer = torch.optim.SGD([x], lr=0.1)
        with gradwatch.watch({"x": x}, optimizer, run_dir=tmp_path / "a") as watcher:
            for _ in range(steps):
                (x * 2).backward()
                optimizer.step()
                optimizer.zero_grad()
            if steps == 3:
                with pytest.warns(gradwatch.GradwatchWarning, match="earlier-1"):
                    watcher.flush()
    assert len(gradwatch.load(tmp_path / "a")) == 3
    assert len(gradwatch.load(tmp_path / "a" / "earlier-1")) == 5
