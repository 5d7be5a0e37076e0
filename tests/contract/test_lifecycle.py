"""Attaching and detaching; copies and files of a watched model; state that a new run goes on from."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch

import gradwatch
from gradwatch.testing import CapturingSink
from tests.support import float64, zoo
from tests.support.state import identical, snapshot

from .lives import (
    Stop,
    hooks,
    model_and_optimizer,
    train,
)


def _normal(case: zoo.Case, optimizer: torch.optim.Optimizer) -> None:
    train(case, optimizer)


def _raises(error: type[BaseException]) -> Callable[[zoo.Case, torch.optim.Optimizer], None]:
    def body(case: zoo.Case, optimizer: torch.optim.Optimizer) -> None:
        train(case, optimizer, 2)
        case.loss(case.model, case.batch(0)).backward()
        raise error

    return body


def _raises_in_backward(case: zoo.Case, optimizer: torch.optim.Optimizer) -> None:
    train(case, optimizer, 1)
    case.model[2].weight.register_hook(_stop)
    case.loss(case.model, case.batch(0)).backward()


def _raises_in_a_closure(case: zoo.Case, optimizer: torch.optim.Optimizer) -> None:
    train(case, optimizer, 1)
    optimizer.step(_stop)


def _raises_at_once(case: zoo.Case, optimizer: torch.optim.Optimizer) -> None:
    raise Stop


def _raises_nonfinite(case: zoo.Case, optimizer: torch.optim.Optimizer) -> None:
    train(case, optimizer, 1)
    (case.loss(case.model, case.batch(0)) * float("nan")).backward()
    optimizer.step()


def _stop(*_: Any) -> None:
    raise Stop


ENDINGS: dict[str, tuple[Callable[..., None], type[BaseException] | None]] = {
    "normal": (_normal, None),
    "nothing": (lambda case, optimizer: None, None),
    "exception": (_raises(Stop), Stop),
    "keyboard_interrupt": (_raises(KeyboardInterrupt), KeyboardInterrupt),
    "system_exit": (_raises(SystemExit), SystemExit),
    "in_backward": (_raises_in_backward, Stop),
    "in_closure": (_raises_in_a_closure, Stop),
    "at_once": (_raises_at_once, Stop),
    "nonfinite": (_raises_nonfinite, gradwatch.NonFiniteGradientError),
}


@pytest.mark.parametrize("found", [False, True], ids=["named", "found"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_nothing_of_ours_is_left(ending: str, found: bool) -> None:
    """However the block ends, parameters, modules, optimizers and torch's global tables are as before."""
    body, error = ENDINGS[ending]
    case, optimizer = model_and_optimizer()
    before = hooks(case.model, optimizer)
    watching = gradwatch.watch(
        case.model, None if found else optimizer, on_nonfinite="raise", clip=1.0
    )
    if error is None:
        with watching:
            body(case, optimizer)
    else:
        with pytest.raises(error), watching:
            body(case, optimizer)
    case.model[2].weight._backward_hooks = None  # the test's own
    assert hooks(case.model, optimizer) == before


def test_the_users_hooks_stay() -> None:
    """Hooks that the user hung before or inside the block are still there after it, in their order."""
    case, optimizer = model_and_optimizer()
    weight = case.model[0].weight
    log: list[str] = []
    weight.register_post_accumulate_grad_hook(lambda _: log.append("before"))
    optimizer.register_step_post_hook(lambda *_: log.append("step"))
    with gradwatch.watch(case.model, optimizer):
        weight.register_post_accumulate_grad_hook(lambda _: log.append("inside"))
    train(case, optimizer, 1)
    assert log == ["before", "inside", "step"]


@pytest.mark.parametrize("held", [True, False])
def test_watch_alone_tells_at_the_first_backward(held: bool) -> None:
    """watch() without entering the block warns once, also if its result is dropped."""
    case, optimizer = model_and_optimizer()
    before = hooks(case.model, optimizer)
    watcher = gradwatch.watch(case.model, optimizer, clip=1.0)
    if not held:
        del watcher
    with pytest.warns(gradwatch.GradwatchWarning, match="before the watcher was entered") as told:
        train(case, optimizer, 3)
    assert len(told) == 1
    assert hooks(case.model, optimizer) == before
    if held:
        assert [event.kind for event in watcher.events] == ["mistake"]


def test_entering_removes_what_waits_for_the_first_backward() -> None:
    """That of a watcher that was made before for the same model, too."""
    case, optimizer = model_and_optimizer()
    before = hooks(case.model, optimizer)
    gradwatch.watch(case.model, optimizer)
    with gradwatch.watch(case.model, optimizer):
        train(case, optimizer, 1)
    train(case, optimizer, 1)
    assert hooks(case.model, optimizer) == before


def test_history_is_readable_after_the_block() -> None:
    """history, events, last and overhead answer after the end, and training on records nothing."""
    case, optimizer = model_and_optimizer()
    with gradwatch.watch(case.model, optimizer) as watcher:
        train(case, optimizer, 3)
    train(case, optimizer, 2)
    assert list(watcher.history.steps().index) == [1, 2, 3]
    assert watcher.last.step == 3
    assert watcher.events == []
    assert watcher.overhead.seconds > 0
    assert 0 < watcher.overhead.share < 1


def test_close_twice_is_fine() -> None:
    """close() inside the block and after it changes nothing more."""
    case, optimizer = model_and_optimizer()
    sink = CapturingSink()
    with gradwatch.watch(case.model, optimizer, sinks=[sink]) as watcher:
        train(case, optimizer, 2)
        watcher.close()
        train(case, optimizer, 2)
    watcher.close()
    assert [step.step for step in sink.steps] == [1, 2]
    assert not any(p._post_accumulate_grad_hooks for p in case.model.parameters())


@pytest.mark.parametrize("how", ["same", "mapping", "part", "found"])
def test_watching_twice_is_an_error(how: str) -> None:
    """A second watcher on a watched model, in whatever way it is named, is refused; the first goes on."""
    case, optimizer = model_and_optimizer()
    targets: dict[str, Any] = {
        "same": (case.model, optimizer),
        "mapping": (dict(case.model.named_parameters()), optimizer),
        "part": (case.model[2],),
        "found": (case.model,),
    }
    with gradwatch.watch(case.model, optimizer) as watcher:
        train(case, optimizer, 1)
        with pytest.raises(RuntimeError, match="watch"), gradwatch.watch(*targets[how]):
            pass
        train(case, optimizer, 2)
    assert list(watcher.history.steps().index) == [1, 2, 3]


def test_two_watchers_made_first_and_entered_then() -> None:
    """Two watchers made before either is entered: the second one's entry is refused."""
    case, optimizer = model_and_optimizer()
    one, other = (gradwatch.watch(case.model, optimizer) for _ in range(2))
    with one:
        with pytest.raises(RuntimeError, match="watch"), other:
            pass
        train(case, optimizer, 1)
    assert list(one.history.steps().index) == [1]


def test_watching_again_after_the_end() -> None:
    """After the block the model can be watched anew, and counts from 1."""
    case, optimizer = model_and_optimizer()
    for _ in range(2):
        with gradwatch.watch(case.model, optimizer) as watcher:
            train(case, optimizer, 2)
        assert list(watcher.history.steps().index) == [1, 2]


def test_entering_one_watcher_twice_is_an_error() -> None:
    """A watcher is of one run."""
    case, optimizer = model_and_optimizer()
    watching = gradwatch.watch(case.model, optimizer)
    with watching:
        pass
    with pytest.raises(RuntimeError), watching:
        pass
    assert not any(p._post_accumulate_grad_hooks for p in case.model.parameters())


def test_two_models_at_once() -> None:
    """Watchers of different models live beside each other and keep their records apart."""
    (one, of_one), (other, of_other) = model_and_optimizer(), model_and_optimizer("Adam")
    with gradwatch.watch(one.model, of_one) as first, gradwatch.watch(other.model) as second:
        train(one, of_one, 2)
        train(other, of_other, 3)
    assert set(first.history.steps()["optimizer"]) == {"SGD"}
    assert len(first.history.steps()) == 2
    assert set(second.history.steps()["optimizer"]) == {"Adam"}
    assert len(second.history.steps()) == 3


@pytest.mark.parametrize("found", [False, True], ids=["named", "found"])
@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_deepcopy_of_a_watched_model_and_optimizer(kind: str, found: bool) -> None:
    """A deep copy made inside the block carries no hook, records nothing and trains by itself."""
    case, optimizer = model_and_optimizer(kind)
    bare = hooks(case.model, optimizer)[6:]
    with gradwatch.watch(case.model, None if found else optimizer, clip=0.1) as watcher:
        train(case, optimizer, 1)
        model, by = copy.deepcopy((case.model, optimizer))
        assert hooks(model, by)[6:] == bare
        assert identical(snapshot(model), snapshot(case.model))
        train(zoo.Case(model, case.batch, case.loss), by, 2)
        train(case, optimizer, 1)
    assert list(watcher.history.steps().index) == [1, 2]
    assert [row.micro_batches for row in watcher.history.steps().itertuples()] == [1, 1]


def test_deepcopy_in_the_middle_of_a_window() -> None:
    """A copy made between backward and step, gradients included, is independent of the watched one."""
    case, optimizer = model_and_optimizer()
    with gradwatch.watch(case.model, optimizer) as watcher:
        case.loss(case.model, case.batch(0)).backward()
        model = copy.deepcopy(case.model)
        model.zero_grad()
        case.loss(model, case.batch(1)).backward()
        norms = float64.gradient_norms(dict(case.model.named_parameters()))
        optimizer.step()
    row = watcher.history.steps().loc[1]
    assert row["grad_norm"] == pytest.approx(float64.total(norms), rel=1e-5)
    assert row["micro_batches"] == 1


@pytest.mark.parametrize("found", [False, True], ids=["named", "found"])
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "state_dicts"])
def test_saving_a_watched_model_and_optimizer(whole: bool, found: bool) -> None:
    """torch.save inside the block works, and what torch.load returns carries no hook and nothing of gradwatch."""
    case, optimizer = model_and_optimizer("AdamW")
    bare = hooks(case.model, optimizer)[6:]
    file = io.BytesIO()
    with gradwatch.watch(case.model, None if found else optimizer, clip=0.1) as watcher:
        train(case, optimizer, 2)
        both = (case.model, optimizer)
        torch.save(both if whole else [one.state_dict() for one in both], file)
        train(case, optimizer, 1)
    assert b"gradwatch" not in file.getvalue()
    file.seek(0)
    loaded = torch.load(file, weights_only=not whole)
    if whole:
        model, by = loaded
        assert hooks(model, by)[6:] == bare
        by.step()
    assert list(watcher.history.steps().index) == [1, 2, 3]


def test_loading_an_optimizer_state_inside_the_block() -> None:
    """optimizer.load_state_dict and model.load_state_dict inside the block keep the record going."""
    case, optimizer = model_and_optimizer("AdamW")
    with gradwatch.watch(case.model, optimizer, clip=0.1) as watcher:
        train(case, optimizer, 1)
        state = copy.deepcopy((case.model.state_dict(), optimizer.state_dict()))
        train(case, optimizer, 1)
        case.model.load_state_dict(state[0])
        optimizer.load_state_dict(state[1])
        train(case, optimizer, 1)
    steps = watcher.history.steps()
    assert list(steps.index) == [1, 2, 3]
    assert (steps["grad_norm"] > 0).all()


@pytest.mark.parametrize("when", ["before_entering", "inside"])
@pytest.mark.parametrize("found", [False, True], ids=["named", "found"])
def test_state_goes_on_counting(found: bool, when: str) -> None:
    """A new watcher that loads the old one's state, through a weights_only file, goes on at the next step."""
    case, optimizer = model_and_optimizer()
    with gradwatch.watch(case.model, None if found else optimizer, clip=1.0) as watcher:
        train(case, optimizer, 3)
    file = io.BytesIO()
    torch.save(watcher.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = gradwatch.watch(case.model, None if found else optimizer, clip=1.0)
    if when == "before_entering":
        other.load_state_dict(state)
    with other:
        if when == "inside":
            other.load_state_dict(state)
        train(case, optimizer, 2)
    assert list(other.history.steps().index) == [4, 5]
    assert other.state_dict().keys() == state.keys()


def test_state_of_two_optimizers() -> None:
    """Each optimizer goes on at its own count."""
    case = zoo.mlp()
    first = torch.optim.SGD(case.model[0].parameters(), lr=0.1)
    second = torch.optim.SGD(case.model[2].parameters(), lr=0.1)

    def run(counts: tuple[int, int], state: dict[str, Any] | None = None) -> gradwatch.Watcher:
        with gradwatch.watch(case.model, [first, second]) as watcher:
            if state:
                watcher.load_state_dict(state)
            for optimizer, count in zip((first, second), counts, strict=True):
                train(case, optimizer, count)
        return watcher

    steps = run((1, 1), run((2, 5)).state_dict()).history.steps()
    assert list(steps.index) == [3, 6]


def test_state_without_any_optimizer() -> None:
    """Backwards that are steps go on counting too."""
    x = torch.tensor(2.0, requires_grad=True)
    with gradwatch.watch({"x": x}) as watcher:
        (x * 2).backward()
        (x * 2).backward()
    with gradwatch.watch({"x": x}) as other:
        other.load_state_dict(watcher.state_dict())
        (x * 2).backward()
    assert list(other.history.steps().index) == [3]


@pytest.mark.parametrize("state", [{}, {"version": 999}, "text", None], ids=str)
def test_a_foreign_state_is_refused(state: Any) -> None:
    """load_state_dict says that this is no state of a watcher."""
    case, optimizer = model_and_optimizer()
    watcher = gradwatch.watch(case.model, optimizer)
    with pytest.raises((ValueError, TypeError), match="load_state_dict"):
        watcher.load_state_dict(state)


def test_a_run_resumed_in_the_middle_equals_a_run_in_one_piece() -> None:
    """Numbers, norms and weights of 3 + 2 resumed steps are those of 5."""
    tables, weights = [], []
    for cut in (5, 3):
        case, optimizer = model_and_optimizer("AdamW")
        rows, state = [], None
        for start, end in ((0, cut), (cut, 5)):
            with gradwatch.watch(case.model, optimizer, clip=0.2) as watcher:
                if state:
                    watcher.load_state_dict(state)
                for index in range(start, end):
                    case.loss(case.model, case.batch(index)).backward()
                    optimizer.step()
                    optimizer.zero_grad()
            state = watcher.state_dict()
            steps = watcher.history.steps()
            rows += list(zip(steps.index, steps["grad_norm"], steps["clip_coef"], strict=True))
        tables.append(rows)
        weights.append(snapshot(case.model))
    assert tables[0] == tables[1]
    assert identical(*weights)
