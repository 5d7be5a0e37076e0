"""Reports, tables and plots of parameters with any names."""

import pytest
import torch

import gradwatch

NAMES = [
    "",
    ".",
    "a",
    "a.",
    ".a",
    "a.b",
    "a/b",
    "_orig_mod.a",
    "module.a",
    "ab",
    "a b",
    "a\nb",
    "$x$",
    "$",
    "{x}",
    "%s",
    "<b>[bold]",
    "\u65e5\u672c\u202e",
    "\ud800",
    "\x00",
    "step",
    "x" * 5000,
]


@pytest.fixture(scope="module", params=["live", "folder"])
def history(request, tmp_path_factory):
    """A run whose parameters have odd names, in memory and from disk."""
    tensors = {name: torch.ones(3, 3, requires_grad=True) for name in NAMES}
    optimizer = torch.optim.SGD(tensors.values(), lr=1e-3)
    folder = tmp_path_factory.mktemp("runs") / "run"
    statistics = ("zeros", "weight_norm", "update_ratio")
    with gradwatch.watch(tensors, optimizer, run_dir=folder, statistics=statistics) as watcher:
        for _ in range(21):
            sum(x.square().sum() for x in tensors.values()).backward()
            optimizer.step()
            optimizer.zero_grad()
    return watcher.history if request.param == "live" else gradwatch.load(folder)


def test_all_names_are_kept(history):
    """Each name stands for one parameter, as it was given."""
    assert list(history.names) == NAMES


def test_tables_and_reports_take_any_name(history):
    """flow() has a row for each, and the report can be shown in every way."""
    assert len(history.flow()) == len(NAMES)
    report = history.report()
    assert all((str(report), report._repr_html_(), report.to_dict()))
    for name in NAMES:
        assert len(history.parameters(name)) == 21


def test_plots_take_any_name(history):
    """Every plot can be drawn."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    for plot in (history.plot_norms, history.plot_flow, history.plot_heatmap):
        figure = plot().figure
        figure.canvas.draw()
        assert all(axes.has_data() for axes in figure.axes)
    pyplot.close("all")
