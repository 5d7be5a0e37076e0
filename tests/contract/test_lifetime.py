"""The end of a watcher: at the exit of the interpreter, in forks, and after an error of the device."""

import gc
import os
import warnings
import weakref
from typing import Any

import pytest
import torch

import gradwatch
from gradwatch import lifetime
from gradwatch.step.pending import PendingStep
from gradwatch.testing import CapturingSink
from tests.support import processes

from .lives import Stop, model_and_optimizer, train

SCRIPT = """
import os, sys, threading, torch, gradwatch

class Told:
    def write(self, batch):
        print("write", [record.step for record in batch.steps], flush=True)

    def close(self):
        print("close", flush=True)

how, folder = sys.argv[1:]
model = torch.nn.Linear(2, 1)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
watcher = gradwatch.watch(model, optimizer, run_dir=folder, sinks=[Told()]).attach()
for _ in range(3):
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
if how == "exit":
    del model, optimizer, watcher
    sys.exit(3)
elif how == "error":
    raise KeyboardInterrupt
elif how == "closed":
    watcher.close()
elif how == "fork":
    child = os.fork()
    if not child:
        sys.exit(0)
    os.waitpid(child, 0)
"""


@pytest.mark.parametrize(
    "how",
    [
        "normal",
        pytest.param("exit", marks=pytest.mark.slow),
        pytest.param("error", marks=pytest.mark.slow),
        pytest.param("closed", marks=pytest.mark.slow),
        pytest.param(
            "fork",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork()"),
            ],
        ),
    ],
)
def test_what_nobody_closes_is_delivered_at_the_exit(how: str, tmp_path: Any) -> None:
    """However a script ends, sinks get what waits once, from its own process, and are closed once."""
    done = processes.run(how, tmp_path / "run", code=SCRIPT)
    assert done.stdout.splitlines() == ["write [1, 2, 3]", "close"], done.stderr
    assert done.returncode == {"exit": 3, "error": -2}.get(how, 0) or how == "error"
    assert "gradwatch" not in done.stderr
    assert list(gradwatch.load(tmp_path / "run").steps().index) == [1, 2, 3]


def test_a_watcher_is_not_kept_for_the_exit() -> None:
    """One that was never attached goes when the last name to it goes."""
    case, optimizer = model_and_optimizer()
    watcher = gradwatch.watch(case.model, optimizer)
    gone = weakref.ref(watcher)
    del watcher
    gc.collect()
    assert gone() is None


def test_a_dropped_watcher_still_watches() -> None:
    """attach() without a name to it is enough: the hooks keep it, and the exit finds it."""
    case, optimizer = model_and_optimizer()
    sink = CapturingSink()
    gradwatch.watch(case.model, optimizer, sinks=[sink]).attach()
    gc.collect()
    train(case, optimizer, 2)
    lifetime._close_all()
    assert [step.step for step in sink.steps] == [1, 2]
    assert sink.closed
    assert not any(p._post_accumulate_grad_hooks for p in case.model.parameters())


def _in_a_fork(act: Any) -> int:
    """Runs something in a fork of this process; returns its exit code."""
    child = os.fork()
    if not child:
        code = 1
        try:
            code = int(act() or 0)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork()")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("closes", [True, False])
def test_a_fork_leaves_the_sinks_to_its_parent(closes: bool) -> None:
    """A forked process neither delivers nor closes, and trains on with a warning; its history is right."""
    case, optimizer = model_and_optimizer()
    sink = CapturingSink()
    with gradwatch.watch(case.model, optimizer, sinks=[sink]) as watcher:
        train(case, optimizer, 2)

        def act() -> int:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                steps = list(watcher.history.steps().index)
                silent = not caught
                train(case, optimizer, 2)
                watcher.close() if closes else lifetime._close_all()
            right = "was forked from" in str(caught[0].message)
            right &= len(caught) == 1 and silent and steps == [1, 2]
            right &= list(watcher.history.steps().index) == [1, 2, 3, 4]
            return 0 if right and not sink.batches and not sink.closed else 2

        assert _in_a_fork(act) == 0
        train(case, optimizer, 1)
    assert [step.step for step in sink.steps] == [1, 2, 3]
    assert sink.closed


# -- errors at the end ---------------------------------------------------------------------------


def _unreadable(monkeypatch: pytest.MonkeyPatch, steps: tuple[int, ...], error: type) -> None:
    """Reading the numbers of these steps fails, as after an error of the device."""
    whole = PendingStep._make_entry

    def read(pending: PendingStep) -> Any:
        if pending.step in steps:
            raise error("CUDA error: an illegal memory access was encountered")
        return whole(pending)

    monkeypatch.setattr(PendingStep, "_make_entry", read)


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("lost", [(1,), (2, 3), (1, 2, 3, 4, 5)])
def test_numbers_that_cannot_be_read_at_the_end(
    monkeypatch: pytest.MonkeyPatch, clip: float | None, lost: tuple[int, ...]
) -> None:
    """The end delivers the other steps, closes every sink and then tells; a second close is nothing."""
    case, optimizer = model_and_optimizer()
    sinks = [CapturingSink(), CapturingSink()]
    watcher = gradwatch.watch(case.model, optimizer, sinks=sinks, clip=clip).attach()
    train(case, optimizer, 5)
    _unreadable(monkeypatch, lost, RuntimeError)
    with pytest.warns(
        gradwatch.GradwatchWarning, match=f"{len(lost)} steps could not be read.*CUDA"
    ):
        watcher.close()
    watcher.close()
    kept = [step for step in range(1, 6) if step not in lost]
    assert list(watcher.history.steps().index) == kept
    for sink in sinks:
        assert [step.step for step in sink.steps] == kept
        assert sink.closed


def test_held_backwards_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same where no optimizer ever stepped."""
    x, sink = torch.ones(3, requires_grad=True), CapturingSink()
    watcher = gradwatch.watch({"x": x}, sinks=[sink]).attach()
    for _ in range(4):
        x.sum().backward()
    _unreadable(monkeypatch, (2,), RuntimeError)
    with pytest.warns(gradwatch.GradwatchWarning, match="1 steps could not be read"):
        watcher.close()
    assert [step.step for step in sink.steps] == [1, 3, 4]
    assert sink.closed


def test_a_step_that_cannot_be_read_hides_no_later_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who reads during the run gets the error once, and then the steps behind it."""
    case, optimizer = model_and_optimizer()
    watcher = gradwatch.watch(case.model, optimizer).attach()
    train(case, optimizer, 3)
    _unreadable(monkeypatch, (2,), RuntimeError)
    with pytest.raises(RuntimeError, match="CUDA"):
        watcher.history.steps()
    assert list(watcher.history.steps().index) == [1, 3]
    with pytest.warns(gradwatch.GradwatchWarning, match="could not be read"):
        watcher.close()


def test_an_interrupt_while_reading_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl+C while the end waits for the device gets through; the sinks are closed."""
    case, optimizer = model_and_optimizer()
    sink = CapturingSink()
    watcher = gradwatch.watch(case.model, optimizer, sinks=[sink]).attach()
    train(case, optimizer, 3)
    _unreadable(monkeypatch, (2,), KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        watcher.close()
    assert [step.step for step in sink.steps] == [1]
    assert sink.closed
    monkeypatch.undo()
    assert list(watcher.history.steps().index) == [1, 2, 3]


@pytest.mark.parametrize("acts", [False, True])
@pytest.mark.parametrize("part", ["detach", "end"])
def test_whatever_fails_at_the_end_the_sinks_are_closed(
    monkeypatch: pytest.MonkeyPatch, part: str, acts: bool
) -> None:
    """An error of gradwatch's own is a warning, or is raised where it acts, after all is delivered."""
    case, optimizer = model_and_optimizer()
    sink = CapturingSink()
    watcher = gradwatch.watch(
        case.model, optimizer, sinks=[sink], clip=1.0 if acts else None
    ).attach()
    train(case, optimizer, 2)
    whole = getattr(watcher._registry, part)

    def fail() -> None:
        whole()
        raise RuntimeError("out of memory")

    monkeypatch.setattr(watcher._registry, part, fail)
    expected = (
        pytest.raises(RuntimeError, match="out of memory")
        if acts
        else pytest.warns(gradwatch.GradwatchWarning, match="could not end.*out of memory")
    )
    with expected:
        watcher.close()
    assert [step.step for step in sink.steps] == [1, 2]
    assert sink.closed
    watcher.close()


def test_the_loops_own_error_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ends the block is the loop's exception, also if the numbers cannot be read after it."""
    case, optimizer = model_and_optimizer()
    sink = CapturingSink()
    with (  # noqa: PT012, PT031
        pytest.warns(gradwatch.GradwatchWarning, match="could not be read"),
        pytest.raises(Stop),
        gradwatch.watch(case.model, optimizer, sinks=[sink]),
    ):
        train(case, optimizer, 2)
        _unreadable(monkeypatch, (1, 2), RuntimeError)
        raise Stop
    assert sink.closed
