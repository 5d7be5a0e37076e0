"""Who decides how many micro-batches a window has: schedules, the noise, and what a checkpoint keeps."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import gradwatch
from gradwatch.accumulate.noise_scale import NoiseScale

from .full_batch import (
    Batch,
    Trained,
    assert_equal,
    at_once,
    batch_of,
    count,
    loss_of,
    sgd,
    start,
    weights_of,
)

SCHEDULES: dict[str, tuple[Any, list[int]]] = {
    "number": (3, [3] * 6),
    "mapping": ({0: 1, 2: 4}, [1, 1, 4, 4, 4, 4]),
    "falling": ({0: 3, 2: 2, 4: 1}, [3, 3, 2, 2, 1, 1]),
    "function": (lambda step: 1 + step % 3, [1, 2, 3, 1, 2, 3]),
}


def _stream() -> Iterator[Batch]:
    return (batch_of(1 + seed % 4, seed) for seed in range(1000))


class Scripted:
    """Asks for numbers of micro-batches that were written down, and a learning rate with each."""

    most = 4

    def __init__(self, plan: list[tuple[int, float]]) -> None:
        self.plan, self.at = plan, 0

    @property
    def micro_batches(self) -> int:
        return self.plan[self.at][0]

    @property
    def lr_factor(self) -> float:
        return self.plan[self.at][1]

    def looks_at(self, step: int) -> bool:
        return False

    def decide(self, step: int, noise: NoiseScale) -> int:
        self.at = min(step, len(self.plan) - 1)
        return self.micro_batches

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at}

    def load_state_dict(self, state: Any) -> None:
        self.at = state["at"]


@pytest.mark.parametrize("name", SCHEDULES)
def test_windows_follow_the_schedule(name: str) -> None:
    """Each window has the number of its step, and the gradient of its whole batch."""
    accumulate, sizes = SCHEDULES[name]
    model, optimizers = start(sgd, None)
    stream, windows = _stream(), []
    with gradwatch.watch(model, optimizers, accumulate=accumulate) as watcher:
        for size in sizes:
            assert watcher.accumulate == size
            windows.append([next(stream) for _ in range(size)])
            for index, part in enumerate(windows[-1]):
                watcher.backward(loss_of(model, part), weight=count(part))
                assert watcher.step() is (index + 1 == size)
    assert_equal(Trained(weights_of(model)), at_once(sgd, windows))
    assert list(watcher.history.steps()["micro_batches"]) == sizes
    changes = [(e.step, e.value) for e in watcher.events if e.kind == "accumulate"]
    pairs = zip(range(2, 7), sizes, sizes[1:], strict=False)
    assert changes[: len(sizes) - 1] == [(step, new) for step, old, new in pairs if new != old]


@pytest.mark.parametrize("name", SCHEDULES)
def test_own_loops_are_held_to_the_schedule(name: str) -> None:
    """A loop that steps by itself is refused a window of another number than the schedule's."""
    accumulate, sizes = SCHEDULES[name]
    model, [optimizer] = start(sgd, None)
    stream = _stream()
    with gradwatch.watch(model, optimizer, accumulate=accumulate):
        for size in sizes:
            for index in range(size):
                if index and size > 1:
                    with pytest.raises(gradwatch.AccumulationError, match=f"{index} of the {size}"):
                        optimizer.step()
                (loss_of(model, next(stream)) / size).backward()
            optimizer.step()
            optimizer.zero_grad()


def _changing_lr(
    make: Callable[..., list[torch.optim.Optimizer]],
    scheduler: Callable[[Any], Any],
    scaled: bool,
    bad: int | None = None,
) -> tuple[list[float], list[float], Trained, Trained]:
    """Train with factors 1, 2, 0.5 ... on the rate, beside the same by hand."""
    factors = [1.0, 2.0, 0.5, 4.0, 1.0, 2.0]
    plan = [(2, factor) for factor in factors]
    model, [optimizer] = start(make, None)
    twin, [by_hand] = start(make, None)
    schedules = [scheduler(optimizer), scheduler(by_hand)]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8) if scaled else None
    between, used = [], []
    options: dict[str, Any] = {"scaler": scaler, "on_nonfinite": "skip"}
    with gradwatch.watch(model, optimizer, accumulate=Scripted(plan), **options) as watcher:
        for step, factor in enumerate(factors):
            parts = [batch_of(2, 10 * step + m, ignored=0.0) for m in range(2)]
            spoilt = float("nan") if step == bad else 1.0
            for part in parts:
                watcher.backward(loss_of(model, part) * spoilt)
                watcher.step()
            rates = [group["lr"] for group in by_hand.param_groups]
            if step != bad:
                sum(loss_of(twin, part) / 2 for part in parts).backward()
                for group, rate in zip(by_hand.param_groups, rates, strict=True):
                    group["lr"] = rate * factor
                by_hand.step()
                by_hand.zero_grad()
                for group, rate in zip(by_hand.param_groups, rates, strict=True):
                    group["lr"] = rate
            used.append(float(rates[0]) * factor)
            between.append(float(optimizer.param_groups[0]["lr"]))
            assert between[-1] == float(rates[0])
            for schedule in schedules:
                if schedule is not None:
                    schedule.step()
    recorded = list(watcher.history.steps()["lr"])
    return recorded, used, Trained(weights_of(model)), Trained(weights_of(twin))


def _tensor_lr(model: Any) -> list[torch.optim.Optimizer]:
    lr = torch.tensor(0.3, dtype=torch.float64)
    return [torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, foreach=False)]


def _no_schedule(optimizer: Any) -> None:
    return None


RATES: dict[str, Any] = {
    "none": _no_schedule,
    "lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5),
    "one_cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.5, total_steps=8),
}


@pytest.mark.filterwarnings("ignore:Detected call of")
@pytest.mark.parametrize("scheduler", RATES)
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "scaled"])
@pytest.mark.parametrize("bad", [None, 2])
def test_the_learning_rate_is_scaled_for_the_step_only(
    scheduler: str, scaled: bool, bad: int | None
) -> None:
    """The step uses rate times factor, the record says so, and a scheduler sees the rate alone."""
    recorded, used, found, expected = _changing_lr(sgd, RATES[scheduler], scaled, bad)
    keep = [s for s in range(6) if not (scaled and s == bad)]  # a scaler never calls that step
    if scaled and bad is not None:
        assert len(recorded) == 6
    assert [recorded[s] for s in keep] == pytest.approx([used[s] for s in keep], rel=1e-12)
    assert_equal(found, expected)


def test_a_learning_rate_that_is_a_tensor() -> None:
    """It is scaled like a number, and the very tensor is put back."""
    recorded, used, found, expected = _changing_lr(_tensor_lr, _no_schedule, scaled=False)
    assert recorded == pytest.approx(used, rel=1e-7)
    assert_equal(found, expected)
    model, [optimizer] = start(_tensor_lr, None)
    before = optimizer.param_groups[0]["lr"]
    with gradwatch.watch(model, optimizer, accumulate=Scripted([(1, 2.0)])) as watcher:
        watcher.backward(loss_of(model, batch_of(2, 0)))
        assert watcher.step() is True
    assert optimizer.param_groups[0]["lr"] is before
    assert before.item() == pytest.approx(0.3, rel=1e-12)


def test_the_learning_rate_is_put_back_after_an_error() -> None:
    """Where on_nonfinite="raise" ends a step, the rate is the user's again at once."""
    model, [optimizer] = start(sgd, None)
    policy = Scripted([(1, 8.0)])
    with gradwatch.watch(model, optimizer, accumulate=policy, on_nonfinite="raise") as watcher:
        watcher.backward(loss_of(model, batch_of(2, 0)) * float("nan"))
        with pytest.raises(gradwatch.NonFiniteGradientError):
            watcher.step()
        assert optimizer.param_groups[0]["lr"] == 0.3


def test_the_learning_rate_is_put_back_when_the_run_ends() -> None:
    """Where the optimizer itself fails, it is at the end of the run."""
    model, [optimizer] = start(sgd, None)
    with gradwatch.watch(model, optimizer, accumulate=Scripted([(1, 8.0)])):

        def closure() -> float:
            raise KeyError

        with pytest.raises(KeyError):
            optimizer.step(closure)
    assert optimizer.param_groups[0]["lr"] == 0.3


def _auto() -> gradwatch.AccumulateByNoiseScale:
    return gradwatch.AccumulateByNoiseScale(
        min=2, max=8, every=2, min_updates=4, hysteresis=1.1, scale_lr="sqrt"
    )


RESUMED: dict[str, Callable[[], Any]] = {
    "mapping": lambda: {0: 1, 8: 3, 14: 2},
    "function": lambda: lambda step: 1 + step % 3,
    "auto": _auto,
    "custom": lambda: Scripted([(1, 1.0)] * 8 + [(2, 2.0)] * 40),
}


def _train_on(
    watcher: Any, model: Any, stream: Iterator[Batch], steps: int, middle: int = 0
) -> None:
    """Train some steps, and some micro-batches of a further window."""
    done = 0
    while done < steps:
        part = next(stream)
        watcher.backward(loss_of(model, part), weight=count(part))
        done += watcher.step()
    for _ in range(middle):
        part = next(stream)
        watcher.backward(loss_of(model, part), weight=count(part))


@pytest.mark.parametrize("name", RESUMED)
@pytest.mark.parametrize("stop", [9, 60])  # the noise scale changes something at 59 and 61
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(name: str, stop: int) -> None:
    """Numbers, rates, weights and the noise scale after a checkpoint are those of one run; it is JSON."""
    whole, [optimizer] = start(sgd, None)
    with gradwatch.watch(whole, optimizer, accumulate=RESUMED[name]()) as one:
        _train_on(one, whole, _stream(), 64)
    model, [optimizer] = start(sgd, None)
    stream = _stream()
    with gradwatch.watch(model, optimizer, accumulate=RESUMED[name]()) as first:
        _train_on(first, model, stream, stop)
        state = json.loads(json.dumps(first.state_dict()))
    with gradwatch.watch(model, optimizer, accumulate=RESUMED[name]()) as second:
        second.load_state_dict(state)
        _train_on(second, model, stream, 64 - stop)
    assert_equal(Trained(weights_of(model)), Trained(weights_of(whole)))
    for column in ("micro_batches", "lr", "weight", "noise_scale"):
        both = [*first.history.steps()[column], *second.history.steps()[column]]
        assert both == pytest.approx(list(one.history.steps()[column]), nan_ok=True, rel=1e-12)
    if name == "auto":
        assert list(one.history.steps()["micro_batches"].unique()) == [2, 4, 8]
    assert second.accumulate == one.accumulate


@pytest.mark.parametrize("name", RESUMED)
def test_what_a_checkpoint_loses_is_told(name: str) -> None:
    """A state saved inside a window says what was in it: a warning and an event, and a new window."""
    model, [optimizer] = start(sgd, None)
    stream = _stream()
    with gradwatch.watch(model, optimizer, accumulate=RESUMED[name]()) as first:
        _train_on(first, model, stream, 10, middle=1)
        state = json.loads(json.dumps(first.state_dict()))
        wanted = first.accumulate
        lost = state["window"]
    assert lost["micro_batches"] == 1
    optimizer.zero_grad()
    with gradwatch.watch(model, optimizer, accumulate=RESUMED[name]()) as second:
        with pytest.warns(gradwatch.GradwatchWarning, match=r"1 micro-batch\(es\) of weight"):
            second.load_state_dict(state)
        [event] = [event for event in second.events if event.kind == "dropped"]
        assert (event.step, event.value) == (11, 1.0)
        _train_on(second, model, stream, 1)
    assert second.last.micro_batches == wanted
    assert second.last.step == 11


@pytest.mark.parametrize("name", RESUMED)
def test_a_state_between_windows_is_silent(name: str) -> None:
    """A state saved between windows brings no warning: pytest makes an error of any."""
    model, [optimizer] = start(sgd, None)
    with gradwatch.watch(model, optimizer, accumulate=RESUMED[name]()) as first:
        _train_on(first, model, _stream(), 10)
        state = first.state_dict()
    with gradwatch.watch(model, optimizer, accumulate=RESUMED[name]()) as second:
        second.load_state_dict(state)
        assert [event.kind for event in second.events] == []
