"""Each of several optimizers has its own steps, windows and norms; optimizers are found by themselves."""

import math

import pytest
import torch
from torch import nn

import gradwatch
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
