"""The benchmark of overhead: the script itself, and what it says where something is missing."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from torch import nn

TITLE = "MLP, tiny"


def _tiny(device):
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).to(device)
    x = torch.randn(16, 4, device=device)
    return model, lambda: model(x).square().mean()


@pytest.fixture
def tiny(monkeypatch):
    """One small workload in the place of the four, and fewer of what is measured once."""
    from benchmarks.overhead import fixed_costs, timing
    from benchmarks.overhead.workloads import WORKLOADS as workloads
    from benchmarks.overhead.workloads import Workload

    before = dict(workloads)
    workloads.clear()
    workloads["gpt"] = Workload(TITLE, _tiny)
    workloads["mlp"] = Workload("MLP, other", _tiny)
    monkeypatch.setattr(timing, "MOST_TURNS", 1)
    monkeypatch.setattr(fixed_costs, "MANY", 100)
    monkeypatch.setattr(fixed_costs, "MEMORY_FROM", 100)
    monkeypatch.setattr(fixed_costs, "MEMORY_TO", {False: 300, True: 200})
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    yield
    workloads.clear()
    workloads.update(before)


def _tables(page):
    """The rows of each table, by the heading above it."""
    found = {}
    for part in re.split(r"^## ", page, flags=re.MULTILINE)[1:]:
        heading, _, text = part.partition("\n")
        lines = [line for line in text.splitlines() if line.startswith("|")]
        found[heading] = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # those of the peers
def test_script_measures_and_writes(tiny, tmp_path, capsys):
    """A short run writes a table per setting and one of targets, and names every peer."""
    from benchmarks.overhead import __main__ as overhead
    from benchmarks.overhead.other_tools import PEERS
    from benchmarks.overhead.variants import BOTH, CLIP, EXPLAIN, MANAGED, WATCH

    page = tmp_path / "RESULTS.md"
    options = ["--quick", "--workload", "gpt", "--rounds", 2]
    options += ["--optimizer", "both", "--accumulate", 1, 2, "--out", page]
    overhead.main(list(map(str, options)))
    text = page.read_text(encoding="utf-8")
    tables = _tables(text)
    headings = [
        f"{TITLE}; AdamW {kind}; {batches} a step"
        for batches in ("one micro-batch", "2 micro-batches")
        for kind in ("unfused", "fused")
    ]
    assert [heading for heading in tables if heading.startswith(TITLE)] == headings
    for heading in headings:
        titles, _, *rows = tables[heading]
        assert titles == [
            "", "added, ms", "of the bare step", "÷ clip", "within, ms", "ATen calls"
        ]  # fmt: skip
        assert {len(row) for row in rows} == {6}
        names = [row[0] for row in rows]
        assert f"{CLIP}, nothing clipped" in names
        assert f"{BOTH}, every step clipped" in names
        assert (f"{MANAGED}, nothing clipped" in names) == ("2 micro" in heading)
        calls = {row[0]: row[5] for row in rows}
        inside = {row[0]: row[4] for row in rows}
        assert all(
            float(inside[name].split()[0]) > 0 for name in (f"{CLIP}, nothing clipped", WATCH)
        )
        assert inside["a loop of .norm().item()"] == "-"
        assert calls[WATCH] == calls[EXPLAIN] == ("+5" if "one" in heading else "+10")
        assert all((name in names) != (f"- {name}: not measured" in text) for name in PEERS)
    targets = tables["Targets"]
    assert {row[3] for row in targets[2:]} <= {"**reached**", "**not reached**", "**not measured**"}
    assert any(row[0].startswith("ATen calls") and row[2] == "5 / 5" for row in targets)
    assert "not finished" not in text
    assert f"torch | 3.{sys.version_info.minor}" in text
    assert "4 settings, about 2 minutes" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_run_that_is_cut_off_leaves_its_page(tiny, tmp_path, monkeypatch):
    """What was measured stands there, and what was not is named."""
    from benchmarks.overhead import __main__ as overhead

    real = overhead.Training.of

    def of(setting, device):
        if setting.workload == "mlp":
            raise KeyboardInterrupt
        return real(setting, device)

    monkeypatch.setattr(overhead.Training, "of", of)
    page = tmp_path / "RESULTS.md"
    with pytest.raises(KeyboardInterrupt):
        overhead.main(["--quick", "--rounds", "1", "--out", str(page)])
    text = page.read_text(encoding="utf-8")
    assert "**This was a quick run" in text
    assert "Not measured: MLP, other; AdamW unfused; one micro-batch a step" in text
    assert f"## {TITLE}; AdamW unfused; one micro-batch a step" in text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_no_setting_begins_when_the_time_is_over(tiny, tmp_path, capsys):
    """A machine that is too slow does not make the run endless, and the page names the rest."""
    from benchmarks.overhead import __main__ as overhead

    page = tmp_path / "RESULTS.md"
    overhead.main(["--quick", "--minutes", "0.001", "--out", str(page)])
    assert "out of time" in capsys.readouterr().out
    text = page.read_text(encoding="utf-8")
    assert f"Not measured: {TITLE}; AdamW unfused; one micro-batch a step; MLP, other" in text
    assert "**reached**" in text


@pytest.mark.filterwarnings("ignore")
def test_missing_peers_are_named(monkeypatch, tmp_path):
    """A package that cannot be imported has no row, and a line that says so."""
    from benchmarks.overhead.other_tools import PEERS, missing, peer_variants
    from benchmarks.overhead.report import Report
    from benchmarks.overhead.workloads import Training

    for package in ("lightning", "ignite", "wandb"):
        monkeypatch.setitem(sys.modules, package, None)
    absent, failed = missing(), {}
    assert list(absent) == ["lightning", "ignite", "wandb"]
    with peer_variants(Training(*_tiny("cpu")), failed) as variants:
        assert [variant.name for variant in variants] == ["a loop of .norm().item()"]
    text = Report(tmp_path / "page.md", [], absent, []).text()
    for name in PEERS:
        assert f"- {name}: not measured, `" in text
    assert "`pytorch-ignite` cannot be imported" in text
    assert failed == {}


@pytest.mark.filterwarnings("ignore")
def test_a_peer_that_fails_is_named(monkeypatch, tmp_path):
    """One that is installed and does not start is told, and stops nobody."""
    import types

    from benchmarks.overhead.other_tools import peer_variants
    from benchmarks.overhead.report import Report
    from benchmarks.overhead.workloads import Training

    for package in ("lightning", "ignite"):
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))
    failed = {}
    with peer_variants(Training(*_tiny("cpu")), failed) as variants:
        assert len(variants) == 1
    assert "AttributeError" in failed["wandb.watch, offline"]
    text = Report(tmp_path / "page.md", [], {}, [], failed=failed).text()
    assert "- wandb.watch, offline: not measured, it could not be started (AttributeError" in text


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--rounds", "0"], "--rounds must be at least 1, got 0."),
        (["--threads", "0"], "--threads must be at least 1, got 0."),
        (["--accumulate", "8", "0"], "--accumulate must be at least 1, got 0."),
        (["--minutes", "0"], "--minutes must be more than 0, got 0."),
    ],
)
def test_options_out_of_bounds_are_refused(options, told, capsys):
    """The error names the option, the bound and the value."""
    from benchmarks.overhead import __main__ as overhead

    with pytest.raises(SystemExit):
        overhead.parse_arguments(options)
    assert told in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_said_plainly(capsys):
    """--device cuda without a GPU ends with what to do instead, before anything is measured."""
    from benchmarks.overhead import __main__ as overhead

    with pytest.raises(SystemExit):
        overhead.main(["--device", "cuda"])
    told = " ".join(capsys.readouterr().err.split())
    assert "--device cuda needs a GPU that PyTorch can use" in told
    assert "Leave it out to measure on the CPU." in told


def test_a_quick_run_is_small():
    """It has one micro-batch and unfused AdamW, unless asked for otherwise."""
    from benchmarks.overhead import __main__ as overhead

    quick = overhead.settings_of(overhead.parse_arguments(["--quick"]))
    assert [setting.workload for setting in quick] == ["gpt", "mlp", "cnn", "lstm"]
    full = overhead.settings_of(overhead.parse_arguments([]))
    assert full[:4] == quick
    assert len(set(full)) == 16
    asked = overhead.parse_arguments(["--quick", "--accumulate", "8", "--optimizer", "fused"])
    assert {(s.fused, s.accumulate) for s in overhead.settings_of(asked)} == {(True, 8)}


@pytest.mark.parametrize("name", ["gpt", "mlp", "cnn", "lstm"])
def test_workloads_are_what_they_are_called(name):
    """Ten million parameters, 300 tensors; and every parameter has a gradient."""
    from benchmarks.overhead.workloads import Setting, Training

    training = Training.of(Setting(name), "cpu")
    sizes = [p.numel() for p in training.parameters]
    if name == "gpt":
        assert sum(sizes) == pytest.approx(10e6, rel=0.1)
    if name == "mlp":
        assert len(sizes) == 300
    found = []
    training.step(lambda: found.extend(p.grad is not None for p in training.parameters))
    assert found == [True] * len(sizes)
