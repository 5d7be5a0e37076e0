"""Each of several optimizers has its own steps, windows and norms; optimizers are found by themselves."""

import json
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch import StepRecord
from gradwatch.adapters import StepScalars
from gradwatch.testing import CapturingSink, late_readings
from tests.support import float64, zoo
from tests.support.float64 import gradient_norm
from tests.support.state import identical, snapshot

from .windows import found_or_named, new_run, norms_and_counts, to_none


class _Gan(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.generator = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4))
        self.critic = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


@pytest.mark.parametrize("detached", [True, False], ids=["fake_detached", "fake_attached"])
@to_none
@found_or_named
@pytest.mark.parametrize("clip", [None, 0.05])
def test_a_gan_in_alternation(
    clip: float | None, found: bool, set_to_none: bool, detached: bool
) -> None:
    """Each of two optimizers has its own steps, micro-batches and norms, over its own parameters only."""
    results = []
    for watched in (True, False):
        gan = _Gan()
        of_critic = torch.optim.SGD(gan.critic.parameters(), lr=0.1)
        of_generator = torch.optim.Adam(gan.generator.parameters(), lr=0.01)
        optimizers = None if found else [of_generator, of_critic]
        watcher = gradwatch.watch(gan, optimizers, clip=clip) if watched else None
        expected: dict[str, list[float]] = {"SGD": [], "Adam": []}
        data = torch.Generator().manual_seed(1)
        with watcher or torch.enable_grad():
            for _ in range(4):
                real, noise = torch.randn(5, 4, generator=data), torch.randn(5, 3, generator=data)
                of_critic.zero_grad(set_to_none=set_to_none)
                fake = gan.generator(noise)
                fake = fake.detach() if detached else fake
                (gan.critic(fake).mean() - gan.critic(real).mean()).backward()
                expected["SGD"].append(gradient_norm(gan.critic))
                if clip and not watched:
                    nn.utils.clip_grad_norm_(gan.critic.parameters(), clip)
                of_critic.step()
                of_generator.zero_grad(set_to_none=set_to_none)
                (-gan.critic(gan.generator(noise)).mean()).backward()
                expected["Adam"].append(gradient_norm(gan.generator))
                if clip and not watched:
                    nn.utils.clip_grad_norm_(gan.generator.parameters(), clip)
                of_generator.step()
        results.append(snapshot(gan))
        if watched:
            steps = watcher.history.steps()
            assert sorted(set(steps["optimizer"])) == ["Adam", "SGD"]
            for name, norms in expected.items():
                mine = steps[steps["optimizer"] == name]
                assert list(mine.index) == [1, 2, 3, 4]
                assert list(mine["micro_batches"]) == [1] * 4
                assert list(mine["grad_norm"]) == pytest.approx(norms, rel=1e-5)
                limited = [min(norm, clip or math.inf) for norm in norms]
                assert list(mine["grad_norm_clipped"]) == pytest.approx(limited, rel=1e-4)
            assert not [event for event in watcher.events if event.kind != "no_gradient"]
    assert identical(*results)


@to_none
def test_a_critic_with_five_steps_per_generator_step(set_to_none: bool) -> None:
    """Where the critic steps five times per generator step, both counts are right."""
    gan = _Gan()
    of_critic = torch.optim.SGD(gan.critic.parameters(), lr=0.1)
    of_generator = torch.optim.Adam(gan.generator.parameters(), lr=0.01)
    with gradwatch.watch(gan, [of_critic, of_generator]) as watcher:
        for _ in range(2):
            for _ in range(5):
                of_critic.zero_grad(set_to_none=set_to_none)
                gan.critic(torch.randn(5, 4)).mean().backward()
                of_critic.step()
            of_generator.zero_grad(set_to_none=set_to_none)
            gan.critic(gan.generator(torch.randn(5, 3))).mean().backward()
            of_generator.step()
    steps = watcher.history.steps()
    assert len(steps[steps["optimizer"] == "SGD"]) == 10
    assert len(steps[steps["optimizer"] == "Adam"]) == 2
    assert set(steps["micro_batches"]) == {1}


@found_or_named
def test_two_optimizers_that_share_one_backward(found: bool) -> None:
    """One backward, two optimizers stepped after it: one micro-batch and the own norm for each; names differ."""
    case = zoo.mlp()
    parts = [case.model[0], case.model[2]]
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in parts]
    expected: list[list[float]] = [[], []]
    with gradwatch.watch(case.model, None if found else optimizers) as watcher:
        for index in range(3):
            case.model.zero_grad()
            case.loss(case.model, case.batch(index)).backward()
            for norms, part, optimizer in zip(expected, parts, optimizers, strict=True):
                norms.append(gradient_norm(part))
                optimizer.step()
    steps = watcher.history.steps()
    names = list(dict.fromkeys(steps["optimizer"]))
    assert len(names) == 2
    for name, norms in zip(names, expected, strict=True):
        mine = steps[steps["optimizer"] == name]
        assert list(mine.index) == [1, 2, 3]
        assert list(mine["micro_batches"]) == [1, 1, 1]
        assert list(mine["grad_norm"]) == pytest.approx(norms, rel=1e-5)


@found_or_named
@pytest.mark.parametrize("clip", [None, 0.05])
def test_an_optimizer_that_replaces_another(clip: float | None, found: bool) -> None:
    """A second training phase with a new optimizer over the same parameters is watched, and clipped, as the first."""
    results = []
    for watched in (True, False):
        case = zoo.mlp()
        phases = [
            torch.optim.Adam(case.model.parameters(), lr=0.01),
            torch.optim.SGD(case.model.parameters(), lr=0.5),
        ]
        watcher = (
            gradwatch.watch(case.model, None if found else phases, clip=clip) if watched else None
        )
        expected: list[list[float]] = [[], []]
        with watcher or torch.enable_grad():
            for norms, optimizer in zip(expected, phases, strict=True):
                for index in range(3):
                    case.loss(case.model, case.batch(index)).backward()
                    norms.append(gradient_norm(case.model))
                    if clip and not watched:
                        nn.utils.clip_grad_norm_(case.model.parameters(), clip)
                    optimizer.step()
                    optimizer.zero_grad()
        results.append(snapshot(case.model))
        if watched:
            steps = watcher.history.steps()
            for name, norms in zip(("Adam", "SGD"), expected, strict=True):
                mine = steps[steps["optimizer"] == name]
                assert list(mine.index) == [1, 2, 3]
                assert list(mine["grad_norm"]) == pytest.approx(norms, rel=1e-5)
                assert list(mine["micro_batches"]) == [1, 1, 1]
    assert identical(*results)


@found_or_named
def test_two_optimizers_with_a_parameter_in_common(found: bool) -> None:
    """A parameter that two optimizers step is in the norm of both."""
    case = zoo.mlp()
    parts = [
        list(case.model[0].parameters()),
        [*case.model[0].parameters(), *case.model[2].parameters()],
    ]
    optimizers = [torch.optim.SGD(parts[0], lr=0.1), torch.optim.Adam(parts[1], lr=0.1)]
    expected: list[list[float]] = [[], []]
    with gradwatch.watch(case.model, None if found else optimizers) as watcher:
        for index in range(3):
            case.model.zero_grad()
            case.loss(case.model, case.batch(index)).backward()
            for norms, part, optimizer in zip(expected, parts, optimizers, strict=True):
                norms.append(math.hypot(*(float64.norm(p.grad) for p in part)))
                optimizer.step()
    steps = watcher.history.steps()
    for name, norms in zip(("SGD", "Adam"), expected, strict=True):
        mine = steps[steps["optimizer"] == name]
        assert list(mine["grad_norm"]) == pytest.approx(norms, rel=1e-5)
        assert list(mine["micro_batches"]) == [1, 1, 1]


@to_none
@found_or_named
def test_a_gan_that_freezes_its_critic_in_turns(found: bool, set_to_none: bool) -> None:
    """requires_grad_(False) on the critic while the generator trains, and back: all norms and counts stay right."""
    gan = _Gan()
    of_critic = torch.optim.SGD(gan.critic.parameters(), lr=0.1)
    of_generator = torch.optim.Adam(gan.generator.parameters(), lr=0.01)
    expected: dict[str, list[float]] = {"SGD": [], "Adam": []}
    with gradwatch.watch(gan, None if found else [of_generator, of_critic]) as watcher:
        for _ in range(4):
            gan.critic.requires_grad_(True)
            of_critic.zero_grad(set_to_none=set_to_none)
            gan.critic(gan.generator(torch.randn(5, 3)).detach()).mean().backward()
            expected["SGD"].append(gradient_norm(gan.critic))
            of_critic.step()
            gan.critic.requires_grad_(False)
            of_generator.zero_grad(set_to_none=set_to_none)
            (-gan.critic(gan.generator(torch.randn(5, 3))).mean()).backward()
            expected["Adam"].append(gradient_norm(gan.generator))
            of_generator.step()
    steps = watcher.history.steps()
    for name, norms in expected.items():
        mine = steps[steps["optimizer"] == name]
        assert list(mine["grad_norm"]) == pytest.approx(norms, rel=1e-5)
        assert list(mine["micro_batches"]) == [1] * 4
    assert watcher.events == []


@found_or_named
def test_backwards_that_reach_one_optimizer_only(found: bool) -> None:
    """A backward counts for the optimizers whose parameters it reached, in the first window of a run too."""
    case = zoo.mlp()
    first, rest = case.model[0], case.model[2:]
    of_first = torch.optim.SGD(first.parameters(), lr=0.1)
    of_rest = torch.optim.Adam(rest.parameters(), lr=0.1)
    with gradwatch.watch(case.model, None if found else [of_first, of_rest]) as watcher:
        for _ in range(2):
            first(case.batch(0)[0]).pow(2).mean().backward()
            first(case.batch(1)[0]).pow(2).mean().backward()
            case.loss(case.model, case.batch(2)).backward()
            of_rest.step()
            of_first.step()
            case.model.zero_grad()
    steps = watcher.history.steps()
    assert list(steps[steps["optimizer"] == "Adam"]["micro_batches"]) == [1, 1]
    assert list(steps[steps["optimizer"] == "SGD"]["micro_batches"]) == [3, 3]


def test_a_found_optimizer_leaves_the_same_record_as_a_named_one() -> None:
    """watch(model) and watch(model, optimizer) leave the same tables, the first step included."""
    tables = []
    for found in (True, False):
        case, optimizer, watching = new_run(found, clip=0.3)
        with watching as watcher:
            for index in range(4):
                for i in range(2):
                    case.loss(case.model, case.batch(2 * index + i)).backward()
                optimizer.step()
                optimizer.zero_grad()
        tables.append(
            (watcher.history.steps().drop(columns="time_s"), watcher.history.parameters())
        )
    for one, other in zip(*tables, strict=True):
        assert one.equals(other)


def test_an_optimizer_of_other_parameters_is_none_of_ours() -> None:
    """An optimizer that steps none of the model's parameters leaves no row and no hook."""
    case, optimizer, watching = new_run(found=True)
    stranger = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    with watching as watcher:
        for index in range(3):
            case.loss(case.model, case.batch(index)).backward()
            stranger.step()
            optimizer.step()
            stranger.step()
            optimizer.zero_grad()
    assert list(watcher.history.steps().index) == [1, 2, 3]
    assert not stranger._optimizer_step_pre_hooks


def test_no_optimizer_at_all() -> None:
    """Where no optimizer steps each backward is a step, in the history at once: x**2 + 3x + 1 at 2 shows 7."""
    x = torch.tensor(2.0, requires_grad=True)
    with gradwatch.watch({"x": x}) as watcher:
        (x**2 + 3 * x + 1).backward()
        assert watcher.history.steps().loc[1, "grad_norm"] == 7.0
        x.grad = None
        (x**3).backward()
        assert list(watcher.history.steps()["grad_norm"]) == [7.0, 12.0]
    assert list(watcher.history.steps().index) == [1, 2]
    assert list(watcher.history.parameters()["parameter"]) == ["x", "x"]
    assert watcher.last.grad_norm == 12.0


def test_no_optimizer_and_a_growing_gradient() -> None:
    """Without an optimizer and without zeroing, each row has the norm that .grad has."""
    x = torch.tensor(2.0, requires_grad=True)
    with gradwatch.watch({"x": x}) as watcher:
        for _ in range(3):
            (3 * x).backward()
    assert list(watcher.history.steps()["grad_norm"]) == [3.0, 6.0, 9.0]


def test_backwards_before_a_found_optimizer_belong_to_its_first_window() -> None:
    """Backwards that were steps of nobody are one window once an optimizer steps them."""
    case, optimizer, watching = new_run(found=True)
    with watching as watcher:
        for index in range(3):
            case.loss(case.model, case.batch(index)).backward()
        expected = gradient_norm(case.model)
        optimizer.step()
    norms, micro_batches = norms_and_counts(watcher)
    assert norms == pytest.approx([expected], rel=1e-5)
    assert micro_batches == [3]


def test_a_mapping_with_an_optimizer() -> None:
    """A mapping of leaf tensors is watched like a model, by its own names."""
    leaves = {"left": torch.ones(3, requires_grad=True), "right": torch.ones(2, requires_grad=True)}
    optimizer = torch.optim.SGD(list(leaves.values()), lr=0.1)
    with gradwatch.watch(leaves, optimizer) as watcher:
        (2 * leaves["left"].sum() + 5 * leaves["right"].sum()).backward()
        optimizer.step()
    table = watcher.history.parameters().set_index("parameter")["grad_norm"]
    assert table["left"] == pytest.approx(2 * math.sqrt(3))
    assert table["right"] == pytest.approx(5 * math.sqrt(2))


# -- names -----------------------------------------------------------------------------------------


def test_names_label_everything(tmp_path: Path) -> None:
    """The names in a mapping are in steps, events, checkpoint and run folder, instead of the classes."""
    case = zoo.mlp()
    optimizers = {
        "muon": torch.optim.SGD(case.model[0].parameters(), lr=0.1),
        "adamw": torch.optim.SGD(case.model[2].parameters(), lr=0.1),
    }
    with gradwatch.watch(case.model, optimizers, run_dir=tmp_path, exploding_norm=1e-9) as watcher:
        case.loss(case.model, case.batch(0)).backward()
        for optimizer in optimizers.values():
            optimizer.step()
        state = watcher.state_dict()
    assert list(watcher.history.steps()["optimizer"]) == ["muon", "adamw"]
    assert [event.optimizer for event in watcher.events] == ["muon", "adamw"]
    assert state["steps"] == {"muon": 1, "adamw": 1}
    assert list(gradwatch.load(tmp_path).steps()["optimizer"]) == ["muon", "adamw"]
    described = json.loads((tmp_path / "meta.json").read_text())["sessions"][0]["optimizers"]
    assert [one["name"] for one in described] == ["muon", "adamw"]


def test_a_resumed_run_finds_its_optimizers_by_name() -> None:
    """Steps are counted on by name, in whatever order the optimizers are given again."""
    case = zoo.mlp()
    first = torch.optim.SGD(case.model[0].parameters(), lr=0.1)
    second = torch.optim.SGD(case.model[2].parameters(), lr=0.1)
    with gradwatch.watch(case.model, {"a": first, "b": second}) as watcher:
        for _ in range(3):
            case.loss(case.model, case.batch(0)).backward()
            first.step()
        second.step()
        state = watcher.state_dict()
    with gradwatch.watch(case.model, {"b": second, "a": first}) as watcher:
        watcher.load_state_dict(state)
        case.loss(case.model, case.batch(0)).backward()
        first.step()
        second.step()
    steps = watcher.history.steps()
    assert dict(zip(steps["optimizer"], steps.index, strict=True)) == {"a": 4, "b": 2}


# -- the norm over all optimizers that step together -------------------------------------------------


class _Pair:
    """A perceptron whose two layers have an optimizer each, and what their norms must be."""

    def __init__(self, found: bool = False, **options: Any) -> None:
        self.case = zoo.mlp()
        self.parts = [self.case.model[:2], self.case.model[2:]]
        self.optimizers = [torch.optim.SGD(part.parameters(), lr=0.01) for part in self.parts]
        self.sink = CapturingSink()
        named = None if found else dict(zip("ab", self.optimizers, strict=True))
        self.watching = gradwatch.watch(self.case.model, named, sinks=[self.sink], **options)
        self.expected: list[float] = []

    def backward(self, index: int) -> None:
        self.case.loss(self.case.model, self.case.batch(index)).backward()

    def check(self) -> None:
        found = list(self.watching.history.steps()["grad_norm_all"])
        assert found == pytest.approx(self.expected, rel=1e-5)
        assert [record.grad_norm_all for record in self.sink.steps] == found


def _poison(part: nn.Module, value: float) -> Any:
    """Makes every gradient of a weight bad, already in the backward."""
    weight = next(part.parameters())
    return weight.register_hook(lambda gradient: torch.full_like(gradient, value))


late = pytest.mark.parametrize("late", [False, True], ids=["host", "device"])


@late
@found_or_named
@pytest.mark.parametrize("read", [False, True], ids=["unread", "read"])
def test_the_total_of_optimizers_that_share_a_backward(found: bool, late: bool, read: bool) -> None:
    """Both rows have the norm over all gradients, before the clip, however early somebody reads."""
    pair = _Pair(found, clip=0.05)
    with late_readings(2) if late else nullcontext(), pair.watching as watcher:
        for index in range(4):
            pair.case.model.zero_grad()
            pair.backward(index)
            pair.expected += [gradient_norm(pair.case.model)] * 2
            for optimizer in pair.optimizers:
                optimizer.step()
                if read:
                    assert watcher.last is not None
                    watcher.postfix()
            if read:
                assert watcher.last.grad_norm_all == pytest.approx(pair.expected[-1], rel=1e-5)
    pair.check()


@found_or_named
def test_optimizers_that_step_apart_have_no_common_total(found: bool) -> None:
    """As in a GAN each steps on a backward of its own, which reaches the other's parameters too."""
    pair = _Pair(found)
    with pair.watching:
        for index in range(4):
            for part, optimizer in zip(pair.parts, pair.optimizers, strict=True):
                optimizer.zero_grad()
                pair.backward(index)
                pair.expected.append(gradient_norm(part))
                optimizer.step()
    pair.check()
    steps = pair.watching.history.steps()
    assert list(steps["grad_norm_all"]) == list(steps["grad_norm"])


def test_two_losses_and_then_two_steps() -> None:
    """Optimizers that step after separate backwards, with none in between, step together."""
    pair = _Pair()
    with pair.watching:
        for _ in range(3):
            for part in pair.parts:
                part.zero_grad()
                sum(p.square().sum() + p.sum() for p in part.parameters()).backward()
            pair.expected += [gradient_norm(pair.case.model)] * 2
            for optimizer in pair.optimizers:
                optimizer.step()
    pair.check()


@found_or_named
def test_an_optimizer_that_steps_less_often(found: bool) -> None:
    """Where the second steps every other time, the total is over those that step."""
    pair = _Pair(found)
    with pair.watching:
        for index in range(4):
            pair.backward(index)
            both = index % 2 == 1
            pair.expected += [gradient_norm(pair.case.model if both else pair.parts[0])] * (
                1 + both
            )
            for optimizer in pair.optimizers[: 1 + both]:
                optimizer.step()
                optimizer.zero_grad()
    pair.check()


def test_a_step_taken_twice_on_one_backward() -> None:
    """A second step of the same optimizer begins a new total."""
    pair = _Pair()
    first, second = pair.optimizers
    with pair.watching:
        pair.backward(0)
        whole, alone = gradient_norm(pair.case.model), gradient_norm(pair.parts[0])
        first.step()
        second.step()
        first.step()
        pair.expected = [whole, whole, alone]
    pair.check()


@pytest.mark.parametrize("norm_type", [1.0, 3.0, math.inf])
def test_the_total_has_the_norm_type_of_the_clip(norm_type: float) -> None:
    """Norms are combined with the p that they were measured with."""
    pair = _Pair(clip=gradwatch.ClipByNorm(1e6, norm_type=norm_type))
    with pair.watching:
        pair.backward(0)
        gradients = [p.grad.flatten().double() for p in pair.case.model.parameters()]
        pair.expected = [float(torch.linalg.vector_norm(torch.cat(gradients), norm_type))] * 2
        for optimizer in pair.optimizers:
            optimizer.step()
    pair.check()


@late
@pytest.mark.parametrize("bad", [0, 1], ids=["first", "second"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_gradient_is_in_the_total_of_both(value: float, bad: int, late: bool) -> None:
    """A NaN or Inf in the gradients of either optimizer is in both rows."""
    pair = _Pair()
    _poison(pair.parts[bad], value)
    with late_readings() if late else nullcontext(), pair.watching:
        pair.backward(0)
        for optimizer in pair.optimizers:
            optimizer.step()
    totals = list(pair.watching.history.steps()["grad_norm_all"])
    assert totals == pytest.approx([value, value], nan_ok=True)


@pytest.mark.filterwarnings("ignore:torch.cuda.amp:FutureWarning")
def test_a_step_that_the_scaler_leaves_out_is_in_the_total() -> None:
    """An optimizer that a GradScaler does not call belongs to the total of the other one's step."""
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    pair = _Pair(scaler=scaler)
    poison = _poison(pair.parts[0], math.inf)
    with pair.watching:
        for index in range(2):
            pair.case.model.zero_grad()
            loss = pair.case.loss(pair.case.model, pair.case.batch(index))
            scaler.scale(loss).backward()
            for optimizer in pair.optimizers:
                scaler.step(optimizer)
            scaler.update()
            poison.remove()
    steps = pair.watching.history.steps()
    left_out = steps[steps["outcome"] == "skipped_scaler"]
    assert list(left_out["optimizer"]) == ["a"]
    other = steps[(steps["optimizer"] == "b") & (steps.index == 1)]
    assert list(other["outcome"]) == ["applied"]
    assert math.isfinite(other["grad_norm"].iloc[0])
    assert list(steps["grad_norm_all"][1]) == [math.inf, math.inf]


def test_optimizers_inside_the_backward_step_together() -> None:
    """Where each parameter has an optimizer that steps in its hook, all rows have the total."""
    case = zoo.mlp()
    norms: list[float] = []
    optimizers = {p: torch.optim.SGD([p], lr=0.01) for p in case.model.parameters()}

    def step_in_backward(parameter: Any) -> None:
        norms.append(float(parameter.grad.double().norm()))
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    handles = [p.register_post_accumulate_grad_hook(step_in_backward) for p in optimizers]
    expected = []
    with gradwatch.watch(case.model, list(optimizers.values())) as watcher:
        for index in range(3):
            norms.clear()
            case.loss(case.model, case.batch(index)).backward()
            expected += [math.hypot(*norms)] * len(norms)
    for handle in handles:
        handle.remove()
    assert list(watcher.history.steps()["grad_norm_all"]) == pytest.approx(expected, rel=1e-5)


def test_one_optimizer_has_its_own_norm_as_total() -> None:
    """Where one optimizer steps alone, or none at all, the two columns are equal bit for bit."""
    for named in (True, False):
        case, optimizer, watching = new_run(found=not named, clip=0.1)
        with watching as watcher:
            for index in range(3):
                case.loss(case.model, case.batch(index)).backward()
                optimizer.step()
        steps = watcher.history.steps()
        assert list(steps["grad_norm_all"]) == list(steps["grad_norm"])
    x = torch.tensor(2.0, requires_grad=True)
    with gradwatch.watch({"x": x}) as watcher:
        (x**2 + 3 * x + 1).backward()
    assert list(watcher.history.steps()["grad_norm_all"]) == [7.0]


def test_the_total_is_in_the_run_folder(tmp_path: Path) -> None:
    """The folder holds final totals, also at the borders between deliveries."""
    pair = _Pair(run_dir=tmp_path, buffer_size=3)
    with pair.watching as watcher:
        for index in range(10):
            pair.case.model.zero_grad()
            pair.backward(index)
            pair.expected += [gradient_norm(pair.case.model)] * 2
            for optimizer in pair.optimizers:
                optimizer.step()
                assert watcher.last is not None
    totals = list(gradwatch.load(tmp_path).steps()["grad_norm_all"])
    assert totals == pytest.approx(pair.expected, rel=1e-5)


def test_tensorboard_and_loggers_get_the_total_where_it_differs() -> None:
    """A run with one optimizer gets no series that only repeats another."""
    alone = StepRecord(1, "SGD", grad_norm=2.0, grad_norm_all=2.0)
    joined = StepRecord(2, "SGD", grad_norm=2.0, grad_norm_all=3.0)
    poisoned = StepRecord(3, "SGD", grad_norm=math.nan, grad_norm_all=math.nan)
    series = StepScalars(["grad_norm_all"])
    assert series.of(alone) == series.of(poisoned) == {}
    assert series.of(joined) == {"grad_norm_all": 3.0}
    assert series.of(alone) == {"grad_norm_all": 2.0}


@pytest.mark.parametrize("loaded", [False, True])
def test_rows_of_parameters_say_whose_they_are(loaded: bool, tmp_path: Path) -> None:
    """With several optimizers, each of which counts its own steps, a row names its optimizer."""
    pytest.importorskip("pyarrow")
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    head = torch.optim.SGD(model[1].parameters(), lr=0.1)
    whole = torch.optim.Adam(model.parameters(), lr=0.1)
    with gradwatch.watch(model, [head, whole], run_dir=tmp_path / "run") as watcher:
        for optimizer in (head, whole):
            optimizer.zero_grad()
            model(torch.ones(4, 2)).sum().backward()
            optimizer.step()
    history = gradwatch.load(tmp_path / "run") if loaded else watcher.history
    frame = history.parameters()
    assert list(frame.columns[:2]) == ["step", "parameter"]
    assert frame.groupby("optimizer")["parameter"].agg(sorted).to_dict() == {
        "SGD": ["1.bias", "1.weight"],
        "Adam": ["0.bias", "0.weight", "1.bias", "1.weight"],
    }
    assert "optimizer" in history.parameters("1.bias", columns=["grad_norm"]).columns
