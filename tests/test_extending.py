"""docs/extending.md: every snippet runs, and does what the page says."""

import contextlib
import csv
import io
import re
from pathlib import Path

import pandas as pd
import pytest
import torch

import gradwatch
from gradwatch.adapters import STATISTICS

PAGE = (Path(__file__).parent.parent / "docs" / "extending.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.MULTILINE))


@pytest.fixture
def names_of(tmp_path, monkeypatch):
    """Runs the snippets of a section, one after the other; what they define, and print."""
    monkeypatch.chdir(tmp_path)
    known = dict(STATISTICS)

    def run(section):
        names = {}
        printed = io.StringIO()
        torch.manual_seed(0)
        with contextlib.redirect_stdout(printed):
            for snippet in re.findall(
                r"^```python\n(.*?)^```", SECTIONS[section], re.DOTALL | re.MULTILINE
            ):
                exec(compile(snippet, section, "exec"), names)
        return {**names, "printed": printed.getvalue()}

    yield run
    for name in STATISTICS.keys() - known.keys():
        del STATISTICS[name]


def test_a_sink(names_of):
    """The file has a row per step, with the parameter of the largest norm."""
    names_of("A sink")
    with Path("norms.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == list(map(str, range(1, 11)))
    assert {row["loudest"] for row in rows} <= {"0.weight", "0.bias", "1.weight", "1.bias"}


def test_a_clipping_policy(names_of):
    """The spike comes down to twice the median, and its state goes into a checkpoint and back."""
    names = names_of("A clipping policy")
    steps = names["watcher"].history.steps()
    # Of an even number of norms torch takes the lower one in the middle.
    median = steps["grad_norm"].loc[:16].sort_values().iloc[7]
    assert steps.loc[16, "grad_norm_clipped"] == pytest.approx(2 * median, rel=1e-5)
    assert not steps.loc[1:15, "clipped"].any()
    policy = names["ClipByMedian"]()
    policy.load_state_dict(names["watcher"].state_dict()["control"]["SGD"]["clip"])
    assert len(policy._norms) == 20


def test_a_statistic(names_of):
    """Every fifth step has it, as float64 counts it."""
    names = names_of("A statistic")
    frame = names["watcher"].history.parameters()
    taken = frame.dropna()
    assert taken["step"].unique().tolist() == [1, 6]
    assert (taken["negative"] == 0).all()  # the gradient of a mean of ones is positive
    assert "negative" in names["printed"]


def test_an_adapter(names_of):
    """The adapter records, clips, logs and is closed; conflicts and unknown options are refused."""
    names = names_of("An adapter")
    watcher, looper = names["monitor"].watcher, names["looper"]
    steps = watcher.history.steps()
    assert len(steps) == 10
    assert (steps["micro_batches"] == 2).all()
    assert (steps["grad_norm_clipped"] <= 1.0 + 1e-6).all()
    assert [step for step, _ in looper.logged] == list(range(2, 21, 2))
    logged = pd.DataFrame([values for _, values in looper.logged])
    assert logged["gradwatch/grad_norm"].tolist() == steps["grad_norm"].tolist()
    assert (logged["gradwatch/micro_batches"] == 2).all()
    resumed = names["LooperMonitor"]()
    resumed.load_state_dict(looper.checkpoint()[0])
    model = names["model"]
    again = names["Looper"]([resumed], accumulate=2)
    again.fit(model, torch.optim.SGD(model.parameters(), lr=0.1), torch.randn(4, 16, 4))
    assert resumed.watcher.history.steps().index.tolist() == [11, 12]
    monitor, looper = names["LooperMonitor"], names["Looper"]
    with pytest.raises(TypeError, match=r"LooperMonitor\(\) got an unexpected argument 'clop'"):
        monitor(clop=1.0)
    with pytest.raises(ValueError, match=r"LooperMonitor\(clip=\) must be"):
        monitor(clip=-1.0)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="would both clip"):
        looper([monitor(clip=1.0)], clip=2.0).fit(model, optimizer, [])
    with gradwatch.watch(model, optimizer):
        pass  # the failed fit has left no hook behind
