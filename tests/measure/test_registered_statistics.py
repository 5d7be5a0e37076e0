"""Statistics of the user's own: checked when they are registered, and never a danger to a training."""

import numpy as np
import pytest
import torch

import gradwatch
from gradwatch.adapters import STATISTICS, Statistic, register_statistic
from gradwatch.measure import statistics
from gradwatch.measure.statistics import gradient_rows, statistics_of


def count(values):
    """The number of elements."""
    return torch.tensor(float(values.numel()), device=values.device)


def below_zero(values):
    """The number of elements below zero."""
    return (values < 0).sum()


NEGATIVE = Statistic(
    meaning="share of the elements that are below zero",
    sums={"elements": count, "below_zero": below_zero},
    formula=lambda totals, loss_scale: totals["below_zero"] / totals["elements"],
)
LARGEST = Statistic(
    meaning="largest element",
    maxima={"largest": lambda values: values.max()},
    formula=lambda totals, loss_scale: totals["largest"] / loss_scale,
)


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    """What a test registers, and what failed in it, is forgotten at its end."""
    known = dict(STATISTICS)
    monkeypatch.setattr(statistics, "_failed", set())
    yield
    STATISTICS.clear()
    STATISTICS.update(known)


def train(names, **options):
    """Three steps; the watcher."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.watch(model, optimizer, statistics=names, **options) as watcher:
        for _ in range(3):
            model(torch.randn(4, 3)).sin().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    return watcher


def test_of_whole_gradients_and_of_parts():
    """Sums add up over the parts, of maxima the largest counts, and the unit is the true one."""
    register_statistic("negative", NEGATIVE)
    register_statistic("largest", LARGEST)
    gradient = torch.randn(7, 5)
    whole = {name: row.array() for name, row in gradient_rows([gradient], STATISTICS).items()}
    parts = [gradient_rows([part], STATISTICS) for part in gradient.split(3)]
    joined = {
        name: (np.max if name in ("max", "largest") else np.sum)(
            [p[name].array() for p in parts], 0
        )
        for name in parts[0]
    }
    for rows in (whole, joined):
        taken = statistics_of(("negative", "largest"), rows, 2.0)
        assert taken["negative"] == pytest.approx([(gradient < 0).double().mean().item()])
        assert taken["largest"] == pytest.approx([gradient.max().item() / 2])


@pytest.mark.parametrize("options", [{}, {"clip": 1.0, "on_nonfinite": "skip"}])
def test_is_a_column(tmp_path, options):
    """The live history and the run folder have it, at the steps it was taken at."""
    pytest.importorskip("pyarrow")
    register_statistic("negative", NEGATIVE)
    watcher = train(("negative",), every=2, run_dir=tmp_path / "run", **options)
    for history in (watcher.history, gradwatch.load(tmp_path / "run")):
        taken = history.parameters().dropna()
        assert taken["step"].unique().tolist() == [1, 3]
        assert taken["negative"].between(0, 1).all()


@pytest.mark.parametrize("options", [{}, {"clip": 1.0, "on_nonfinite": "skip"}])
@pytest.mark.parametrize(
    ("broken", "named"),
    [
        (Statistic(meaning="m", sums={"m": lambda v: 1 / 0}, formula=lambda t, s: t["m"]), "'m'"),
        (Statistic(meaning="m", sums={"m": lambda v: v}, formula=lambda t, s: t["m"]), "'m'"),
        (Statistic(meaning="m", sums={"m": count}, formula=lambda t, s: t["n"]), "'mine'"),
        (Statistic(meaning="m", sums={"m": count}, formula=lambda t, s: np.ones(9)), "'mine'"),
    ],
    ids=["measure_raises", "measure_of_a_shape", "formula_raises", "formula_of_a_length"],
)
def test_one_that_fails_is_nan(broken, named, options):
    """One warning names it; its column is NaN, and everything else is as without it."""
    register_statistic("mine", broken)
    with pytest.warns(
        gradwatch.GradwatchWarning, match=f"{named} of a registered statistic"
    ) as seen:
        watcher = train(("mine", "zeros"), **options)
    assert len(seen) == 1
    plain = train(("zeros",), **options)
    frame = watcher.history.parameters()
    assert frame["mine"].isna().all()
    columns = ["step", "parameter", "grad_norm", "grad_norm_clipped", "zeros"]
    assert frame[columns].equals(plain.history.parameters()[columns])


@pytest.mark.parametrize(
    ("name", "statistic", "error", "words"),
    [
        ("zeros", NEGATIVE, ValueError, "that is not taken yet, got 'zeros'"),
        ("grad_norm", NEGATIVE, ValueError, "got 'grad_norm'"),
        ("a name", NEGATIVE, ValueError, "must be an identifier"),
        ("mine", "negative", TypeError, r"must be a Statistic, got 'negative'\. Write Statistic\("),
        ("mine", Statistic(meaning="m", formula=len), ValueError, "measures nothing"),
        (
            "mine",
            Statistic(meaning="m", formula=len, sums={"m": count}, weights=("squared_weights",)),
            ValueError,
            "measures both gradient and weights",
        ),
        (
            "mine",
            Statistic(meaning="m", formula=len, sums={"count": below_zero}),
            ValueError,
            "has a measure 'count', and so has the statistic 'mean'",
        ),
    ],
)
def test_refused(name, statistic, error, words):
    """A mistake is told when the statistic is registered, which then stays unknown."""
    known = dict(STATISTICS)
    with pytest.raises(error, match=words):
        register_statistic(name, statistic)
    assert known == STATISTICS


def test_a_measure_may_be_shared():
    """A statistic may use the measure of another one, built in or registered, by its name."""
    register_statistic("negative", NEGATIVE)
    known = {**STATISTICS["mean"].sums, **STATISTICS["negative"].sums}
    shared = {name: known[name] for name in ("count", "below_zero", "elements")}
    share = Statistic(meaning="m", sums=shared, formula=lambda t, s: t["below_zero"] / t["count"])
    register_statistic("shared", share)
    gradient = torch.tensor([-1.0, 2.0, -3.0, 4.0])
    rows = {name: row.array() for name, row in gradient_rows([gradient], STATISTICS).items()}
    taken = statistics_of(("negative", "shared", "mean"), rows, 1.0)
    assert [float(taken[name][0]) for name in taken] == [0.5, 0.5, 0.5]


def test_unknown_until_registered():
    """watch() lists what it knows."""
    model = torch.nn.Linear(1, 1)
    with pytest.raises(ValueError, match=r"one of \('norm', 'max', .*\), got 'negative'"):
        gradwatch.watch(model, statistics=("negative",))
    register_statistic("negative", NEGATIVE)
    with pytest.raises(ValueError, match=r"'negative'\), got 'positive'"):
        gradwatch.watch(model, statistics=("positive",))
