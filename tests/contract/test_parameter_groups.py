"""history.groups(): norm and learning rate of each parameter group, live and from a run folder."""

import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import gradwatch
from gradwatch import GradwatchWarning
from gradwatch.testing import late_readings
from tests.support import zoo
from tests.support.calls import CountCalls

from .windows import found_or_named


def _norm(parameters: Any, p: float = 2.0) -> float:
    gradients = [one.grad.flatten().double() for one in parameters if one.grad is not None]
    return float(torch.linalg.vector_norm(torch.cat([torch.zeros(1), *gradients]).double(), p))


def _grouped(case: zoo.Case, **options: Any) -> torch.optim.Optimizer:
    """An optimizer with weights and biases in two groups, of different rates."""
    weights = [p for p in case.model.parameters() if p.ndim > 1]
    biases = [p for p in case.model.parameters() if p.ndim == 1]
    groups = [{"params": weights, "lr": 0.1}, {"params": biases, "lr": 0.2, **options}]
    return torch.optim.SGD(groups, lr=0.3)


def _train(case: zoo.Case, optimizer: torch.optim.Optimizer, steps: int = 5) -> list[float]:
    expected = []
    for index in range(steps):
        optimizer.zero_grad()
        case.loss(case.model, case.batch(index)).backward()
        expected += [_norm(group["params"]) for group in optimizer.param_groups]
        optimizer.step()
    return expected


@found_or_named
@pytest.mark.parametrize("late", [False, True], ids=["host", "device"])
def test_norm_and_rate_of_each_group(found: bool, late: bool, tmp_path: Path) -> None:
    """One row per step and group, with its index, norm and rate; the folder gives the same."""
    case = zoo.mlp()
    optimizer = _grouped(case)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    expected, rates = [], []
    named = None if found else optimizer
    with (
        late_readings() if late else nullcontext(),
        gradwatch.watch(case.model, named, run_dir=tmp_path) as watcher,
    ):
        for _ in range(4):
            rates += [group["lr"] for group in optimizer.param_groups]
            expected += _train(case, optimizer, 1)
            schedule.step()
    groups = watcher.history.groups()
    assert list(groups.columns) == [
        "step", "optimizer", "group", "grad_norm", "grad_norm_clipped", "lr",
    ]  # fmt: skip
    assert list(groups["step"]) == [1, 1, 2, 2, 3, 3, 4, 4]
    assert list(groups["group"]) == [0, 1] * 4
    assert set(groups["optimizer"]) == {"SGD"}
    assert list(groups["grad_norm"]) == pytest.approx(expected, rel=1e-5)
    assert list(groups["grad_norm_clipped"]) == list(groups["grad_norm"])
    assert list(groups["lr"]) == rates
    pd.testing.assert_frame_equal(gradwatch.load(tmp_path).groups(), groups)


def test_a_group_has_the_name_that_it_was_given() -> None:
    """A key "name" is the label of the group; others, and a second one of that name, are numbers."""
    layers = [nn.Linear(2, 2) for _ in range(3)]
    optimizer = torch.optim.SGD(
        [
            {"params": layers[0].parameters(), "name": "head"},
            {"params": layers[1].parameters()},
            {"params": layers[2].parameters(), "name": "head"},
        ],
        lr=0.1,
    )
    with gradwatch.watch(nn.ModuleList(layers), optimizer) as watcher:
        optimizer.step()
    groups = watcher.history.groups()
    assert list(groups["group"]) == ["head", 1, 2]
    assert groups["group"].dtype == object
    assert list(groups["grad_norm"]) == [0.0, 0.0, 0.0]


def test_one_group_has_the_numbers_of_the_step() -> None:
    """Where an optimizer has one group, its row has the numbers of the step, bit for bit."""
    case = zoo.mlp()
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
    with gradwatch.watch(case.model, optimizer, clip=0.05) as watcher:
        _train(case, optimizer)
    steps, groups = watcher.history.steps(), watcher.history.groups()
    assert list(groups["group"]) == [0] * 5
    for column in ("grad_norm", "grad_norm_clipped", "lr"):
        assert list(groups[column]) == list(steps[column])
    assert list(watcher.history.groups(start=2, stop=4)["step"]) == [2, 3]


def test_several_optimizers_with_groups() -> None:
    """Rows are ordered by step, then by optimizer, and each optimizer has its own groups."""
    case = zoo.mlp()
    first = torch.optim.SGD(
        [{"params": [case.model[0].weight]}, {"params": [case.model[0].bias], "lr": 0.5}], lr=0.1
    )
    second = torch.optim.Adam(case.model[2].parameters(), lr=0.01)
    with gradwatch.watch(case.model, {"muon": first, "adamw": second}) as watcher:
        for index in range(2):
            case.loss(case.model, case.batch(index)).backward()
            first.step()
            second.step()
    groups = watcher.history.groups()
    assert list(zip(groups["step"], groups["optimizer"], groups["group"], strict=True)) == [
        (1, "muon", 0), (1, "muon", 1), (1, "adamw", 0),
        (2, "muon", 0), (2, "muon", 1), (2, "adamw", 0),
    ]  # fmt: skip
    assert list(groups["lr"]) == [0.1, 0.5, 0.01] * 2


def test_phases_over_the_same_parameters() -> None:
    """Two optimizers that step the same parameters, one after the other, each have their norms."""
    case = zoo.mlp()
    phases = [_grouped(case), torch.optim.Adam(case.model.parameters(), lr=0.01), _grouped(case)]
    with gradwatch.watch(case.model, phases) as watcher:
        expected = [_train(case, optimizer, 2) for optimizer in phases]
    groups = watcher.history.groups()
    for label, norms in zip(("SGD", "Adam", "SGD-1"), expected, strict=True):
        mine = groups[groups["optimizer"] == label]
        assert list(mine["grad_norm"]) == pytest.approx(norms, rel=1e-5)


@found_or_named
def test_a_group_that_is_added(found: bool, tmp_path: Path) -> None:
    """A group of add_param_group has rows from its first step on."""
    case = zoo.mlp()
    optimizer = torch.optim.SGD(case.model[0].parameters(), lr=0.1)
    with gradwatch.watch(case.model, None if found else optimizer, run_dir=tmp_path) as watcher:
        expected = _train(case, optimizer, 3)
        case.model.zero_grad()
        optimizer.add_param_group({"params": case.model[2].parameters(), "lr": 0.7, "name": "new"})
        expected += _train(case, optimizer, 2)
        watcher.flush()
        loaded = gradwatch.load(tmp_path).groups()
    groups = watcher.history.groups()
    assert list(groups["group"]) == [0, 0, 0, 0, "new", 0, "new"]
    assert list(groups["grad_norm"]) == pytest.approx(expected, rel=1e-5)
    assert list(groups["lr"]) == [0.1, 0.1, 0.1, 0.1, 0.7, 0.1, 0.7]
    pd.testing.assert_frame_equal(loaded, groups)


@pytest.mark.parametrize("norm_type", [1.0, 3.0, math.inf])
def test_norms_of_groups_have_the_norm_type_of_the_clip(norm_type: float, tmp_path: Path) -> None:
    """They are combined with the p that they were measured with, from a folder too."""
    case = zoo.mlp()
    optimizer = _grouped(case)
    clip = gradwatch.ClipByNorm(1e6, norm_type=norm_type)
    with gradwatch.watch(case.model, optimizer, clip=clip, run_dir=tmp_path) as watcher:
        case.loss(case.model, case.batch(0)).backward()
        expected = [_norm(group["params"], norm_type) for group in optimizer.param_groups]
        optimizer.step()
    assert list(watcher.history.groups()["grad_norm"]) == pytest.approx(expected, rel=1e-5)
    assert list(gradwatch.load(tmp_path).groups()["grad_norm"]) == pytest.approx(expected, rel=1e-5)


def test_after_the_clip() -> None:
    """The norms after a clip by elements, which no factor gives, are those of the groups too."""
    case = zoo.mlp()
    optimizer = _grouped(case)
    with gradwatch.watch(case.model, optimizer, clip=gradwatch.ClipByValue(1e-3)) as watcher:
        case.loss(case.model, case.batch(0)).backward()
        optimizer.step()
        clipped = [_norm(group["params"]) for group in optimizer.param_groups]
    assert list(watcher.history.groups()["grad_norm_clipped"]) == pytest.approx(clipped, rel=1e-5)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_gradient_is_in_the_norm_of_its_group(value: float) -> None:
    """A NaN or Inf stands in the row of its group and in no other."""
    case = zoo.mlp()
    optimizer = _grouped(case)
    case.model[0].bias.register_hook(lambda gradient: torch.full_like(gradient, value))
    with gradwatch.watch(case.model, optimizer) as watcher:
        case.loss(case.model, case.batch(0)).backward()
        optimizer.step()
    norms = list(watcher.history.groups()["grad_norm"])
    assert math.isfinite(norms[0])
    assert norms[1] == pytest.approx(value, nan_ok=True)


def test_rates_that_are_tensors() -> None:
    """A rate that the schedule writes into is the one that the step had."""
    case = zoo.mlp()
    optimizer = _grouped(case)
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(group["lr"], dtype=torch.float64)
    with late_readings(3), gradwatch.watch(case.model, optimizer) as watcher:
        for _ in range(2):
            _train(case, optimizer, 1)
            for group in optimizer.param_groups:
                group["lr"] *= 0.5
    assert list(watcher.history.groups()["lr"]) == pytest.approx([0.1, 0.2, 0.05, 0.1])


def test_several_groups_cost_no_operation() -> None:
    """A step of an optimizer with many groups makes the ATen calls of one with a single group."""

    def calls(groups: int) -> int:
        tensors = {f"p{i}": torch.ones(2, requires_grad=True) for i in range(12)}
        parts = [list(tensors.values())[i::groups] for i in range(groups)]
        # The rates keep torch from stepping all groups in one call, so its own calls are left out.
        optimizer = torch.optim.SGD([{"params": part, "lr": 0.1} for part in parts], foreach=False)
        counts = []
        for watched in (False, True):
            watcher = gradwatch.watch(tensors, optimizer, clip=1e9)
            if watched:
                watcher.attach()
            with CountCalls() as counter:
                torch.stack(torch._foreach_norm(list(tensors.values()))).sum().backward()
                optimizer.step()
                watcher.close()
            counts.append(sum(counter.calls.values()))
        return counts[1] - counts[0]

    assert calls(1) == calls(4)


def test_two_optimizers_cost_no_operation_for_their_total() -> None:
    """The norm over all is calculated on the host: two optimizers make twice the calls of one."""

    def added(number: int) -> int:
        tensors: dict[str, Tensor] = {
            f"p{i}": torch.ones(2, requires_grad=True) for i in range(number)
        }
        optimizers = [torch.optim.SGD([tensor], lr=0.1) for tensor in tensors.values()]
        counts = []
        for watched in (False, True):
            watcher = gradwatch.watch(tensors, optimizers)
            if watched:
                watcher.attach()
            for _ in range(3):  # in the third step nothing is done for the first time
                with CountCalls() as counter:
                    torch.stack(torch._foreach_norm(list(tensors.values()))).sum().backward()
                    for optimizer in optimizers:
                        optimizer.step()
                        optimizer.zero_grad()
            watcher.close()
            counts.append(sum(counter.calls.values()))
        return counts[1] - counts[0]

    assert added(2) == 2 * added(1)
    assert added(3) == 3 * added(1)


def test_a_run_in_blocks_is_the_run_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long run is read in pieces, which give the same table."""
    case = zoo.mlp()
    optimizer = _grouped(case)
    with gradwatch.watch(case.model, optimizer, run_dir=tmp_path):
        _train(case, optimizer, 20)
    whole = gradwatch.load(tmp_path).groups()
    monkeypatch.setattr("gradwatch.report.parameter_groups.ROWS_AT_ONCE", 12)
    pd.testing.assert_frame_equal(gradwatch.load(tmp_path).groups(), whole)


def test_a_resumed_run_with_other_groups(tmp_path: Path) -> None:
    """Each session has its own groups, from its first step on."""
    case = zoo.mlp()
    optimizer = torch.optim.SGD(case.model.parameters(), lr=0.1)
    with gradwatch.watch(case.model, optimizer, run_dir=tmp_path) as watcher:
        _train(case, optimizer, 2)
        state = watcher.state_dict()
        _train(case, optimizer, 3)
    optimizer = _grouped(case)
    with gradwatch.watch(case.model, optimizer, run_dir=tmp_path) as watcher:
        watcher.load_state_dict(state)
        _train(case, optimizer, 2)
    groups = gradwatch.load(tmp_path).groups()
    assert list(groups["step"]) == [1, 2, 3, 3, 4, 4]
    assert list(groups["group"]) == [0, 0, 0, 1, 0, 1]


def _forget_groups(folder: Path, session: int = 0) -> None:
    """Turns a run folder into one of a gradwatch that did not write the groups down."""
    meta = json.loads((folder / "meta.json").read_text())
    del meta["sessions"][session]["groups"]
    (folder / "meta.json").write_text(json.dumps(meta))


def test_a_run_of_before_says_that_its_groups_are_not_known(tmp_path: Path) -> None:
    """A folder without the groups is told in words, and where a later session has them, left out."""
    case = zoo.mlp()
    optimizer = _grouped(case)
    with gradwatch.watch(case.model, optimizer, run_dir=tmp_path) as watcher:
        _train(case, optimizer, 2)
        state = watcher.state_dict()
    _forget_groups(tmp_path)
    with pytest.raises(ValueError, match=r"which parameters are in which group.*parameters\(\)"):
        gradwatch.load(tmp_path).groups()
    with gradwatch.watch(case.model, optimizer, run_dir=tmp_path) as watcher:
        watcher.load_state_dict(state)
        _train(case, optimizer, 1)
    with pytest.warns(GradwatchWarning, match="leaves out 2 steps"):
        groups = gradwatch.load(tmp_path).groups()
    assert list(groups["step"]) == [3, 3]


def test_a_run_without_optimizer_has_no_groups() -> None:
    """Backwards that no optimizer steps are in no group: the table is empty, with all columns."""
    x = torch.tensor(2.0, requires_grad=True)
    with gradwatch.watch({"x": x}) as watcher:
        (x**2).backward()
    groups = watcher.history.groups()
    assert len(groups) == 0
    assert list(groups.dtypes.astype(str)) == [
        "int64", "str", "object", "float64", "float64", "float64",
    ]  # fmt: skip


def test_the_report_names_the_rate_of_the_group() -> None:
    """Advice about the rate of a parameter is about the rate of its group."""
    model = nn.ModuleDict({"calm": nn.Linear(4, 4), "wild": nn.Linear(4, 4)})
    optimizer = torch.optim.SGD(
        [
            {"params": model["calm"].parameters(), "lr": 1e-4},
            {"params": model["wild"].parameters(), "lr": 0.9, "name": "head"},
        ]
    )
    with gradwatch.watch(model, optimizer, statistics=("update_ratio",)) as watcher:
        for _ in range(25):
            optimizer.zero_grad()
            # A loss that pulls weights to and fro: each step is as large as the weights.
            sum(layer.weight.square().sum() for layer in model.values()).backward()
            optimizer.step()
    advice = [one.advice for one in watcher.report().findings if one.kind == "update_large"]
    assert len(advice) == 1
    assert "(0.9 in parameter group 'head' of SGD)" in advice[0]
