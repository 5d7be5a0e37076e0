"""Copies of a watcher and of a history, pickled or deep-copied, hold the record and watch nothing."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn

import gradwatch
from gradwatch.testing import CapturingSink
from tests.support import zoo
from tests.support.state import identical, snapshot

from .lives import hooks, model_and_optimizer, train


def _through_torch(thing: Any) -> Any:
    file = io.BytesIO()
    torch.save(thing, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS: dict[str, Callable[[Any], Any]] = {
    **{f"pickle{n}": lambda one, n=n: pickle.loads(pickle.dumps(one, n)) for n in (2, 5)},
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "torch": _through_torch,
    "twice": lambda one: copy.deepcopy(pickle.loads(pickle.dumps(one))),
}

every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def _same(one: Any, other: Any) -> None:
    """What two watchers tell is the same, to the bit."""
    for table in ("steps", "parameters", "events"):
        pd.testing.assert_frame_equal(
            getattr(one.history, table)(), getattr(other.history, table)(), check_exact=True
        )
    assert one.history.layout == other.history.layout
    # As text, where a NaN equals itself.
    assert str(one.events) == str(other.events)
    assert str(one.last) == str(other.last)
    assert str(one.noise_scale) == str(other.noise_scale)
    assert one.postfix() == other.postfix()
    assert one.accumulate == other.accumulate
    assert one.micro_batch_size == other.micro_batch_size
    assert str(one.report()) == str(other.report())


def _run(optimizer_is: str, steps: int = 4) -> tuple[zoo.Case, Any, gradwatch.Watcher]:
    case, optimizer = model_and_optimizer("AdamW")
    watcher = gradwatch.watch(
        case.model,
        optimizer if optimizer_is == "named" else None,
        statistics=("norm", "max"),
        on_nonfinite="skip" if optimizer_is == "named" else "record",
        sinks=[CapturingSink()],
    ).attach()
    for index in range(steps):
        loss = case.loss(case.model, case.batch(index))
        (loss * float("nan") if index == 2 else loss).backward()
        if optimizer_is != "held":
            optimizer.step()
        optimizer.zero_grad()
    return case, optimizer, watcher


@every_way
@pytest.mark.parametrize("closed", [False, True], ids=["attached", "closed"])
@pytest.mark.parametrize("optimizer_is", ["named", "found", "held"])
def test_a_copy_tells_what_the_watcher_tells(
    way: Callable[[Any], Any], closed: bool, optimizer_is: str
) -> None:
    """Frames, events, last, noise scale, report, progress bar: of a live watcher and of a closed one."""
    _, _, watcher = _run(optimizer_is)
    if closed:
        watcher.close()
    other = way(watcher)
    assert isinstance(other, gradwatch.Watcher)
    _same(watcher, other)
    if closed:
        assert other.overhead == watcher.overhead
        assert other.state_dict() == watcher.state_dict()
    assert 0 < other.overhead.share <= 1
    watcher.close()


@every_way
def test_a_copy_watches_nothing(way: Callable[[Any], Any]) -> None:
    """Every call that needs a model says so in one sentence; close() and flush() do nothing."""
    case, optimizer, watcher = _run("named")
    other = way(watcher)
    watcher.close()
    batch = (torch.ones(2, 2), torch.ones(2))
    for call in (
        other.attach,
        other.__enter__,
        lambda: other.backward(torch.ones((), requires_grad=True)),
        other.step,
        lambda: other.micro_batches(batch, 1),
        lambda: other.run_batch(lambda _: None, batch),
        lambda: other.load_state_dict(other.state_dict()),
        lambda: other.leave_windows(False),
    ):
        with pytest.raises(RuntimeError, match="This watcher is a copy") as caught:
            call()
        assert "watch(model, optimizer)" in str(caught.value)
    other.close()
    other.flush()
    train(case, optimizer, 1)
    assert len(other.history) == 4
    assert not hasattr(other, "unheard_of")


def test_copying_leaves_the_watcher_watching() -> None:
    """A copy in the middle of a run delivers nothing, decides nothing and changes no bit of the training."""
    tables, weights = [], []
    for copies in (False, True):
        case, optimizer = model_and_optimizer("AdamW")
        sink = CapturingSink()
        with gradwatch.watch(case.model, sinks=[sink]) as watcher:
            for index in range(6):
                case.loss(case.model, case.batch(index)).backward()
                if copies:
                    for way in WAYS.values():
                        way(watcher)
                    copy.deepcopy(case.model)
                assert not sink.batches
                if index != 1:  # two backwards before the first step are held
                    optimizer.step()
                    optimizer.zero_grad()
        tables.append(watcher.history.steps().drop(columns="time_s"))
        weights.append(snapshot(case.model))
        assert [step.step for step in sink.steps] == list(tables[-1].index)
        assert sink.closed
    pd.testing.assert_frame_equal(*tables, check_exact=True)
    assert identical(*weights)


def test_an_object_that_holds_its_watcher_is_copied() -> None:
    """A module with its attached watcher in it: the copy has a record of its own, and no hook."""

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.case = zoo.mlp()
            self.model = self.case.model

    holder = Holder()
    optimizer = torch.optim.SGD(holder.model.parameters(), 0.1)
    bare = hooks(holder.model)[4:]
    with gradwatch.watch(holder, optimizer) as watcher:
        holder.watcher, holder.history = watcher, watcher.history
        train(holder.case, optimizer, 2)
        twins = [copy.deepcopy(holder.model), *(way(holder.watcher) for way in WAYS.values())]
        other = copy.deepcopy(holder)
        train(holder.case, optimizer, 1)
    assert hooks(other.model)[4:] == hooks(twins[0])[4:] == bare
    assert len(other.watcher.history) == len(other.history) == 2
    assert len(watcher.history) == len(holder.history) == 3


def test_a_copy_goes_on_counting_through_its_state() -> None:
    """The state_dict() of a copy is one that a new watcher continues from."""
    case, optimizer, watcher = _run("named")
    other = copy.deepcopy(watcher)
    watcher.close()
    with gradwatch.watch(case.model, optimizer) as again:
        again.load_state_dict(other.state_dict())
        train(case, optimizer, 1)
    assert list(again.history.steps().index) == [5]


def test_a_copy_of_a_watcher_that_was_never_entered() -> None:
    """It is as empty, and its report says the same."""
    case, optimizer = model_and_optimizer()
    watcher = gradwatch.watch(case.model, optimizer)
    other = pickle.loads(pickle.dumps(watcher))
    assert "never entered" in str(other.report())
    assert other.last is None
    with pytest.warns(gradwatch.GradwatchWarning, match="never entered"):
        assert "never entered" in str(watcher.report())


@every_way
def test_a_copied_history_holds_what_was_in_memory(way: Callable[[Any], Any]) -> None:
    """The newest buffer_size steps and all events; only a shallow copy is still live."""
    case, optimizer = model_and_optimizer()
    with gradwatch.watch(case.model, optimizer, buffer_size=4) as watcher:
        train(case, optimizer, 7)
        other = way(watcher.history)
        pd.testing.assert_frame_equal(other.steps(), watcher.history.steps())
        pd.testing.assert_frame_equal(other.parameters(), watcher.history.parameters())
        train(case, optimizer, 1)
    live = way is copy.copy
    assert list(other.steps().index) == ([5, 6, 7, 8] if live else [4, 5, 6, 7])
    assert other.names == watcher.history.names


@every_way
def test_a_copied_history_of_a_folder_reads_the_folder(
    way: Callable[[Any], Any], tmp_path: Any
) -> None:
    """It holds the path, and so sees what is written later."""
    case, optimizer = model_and_optimizer()
    with gradwatch.watch(case.model, optimizer, run_dir=tmp_path) as watcher:
        train(case, optimizer, 2)
        watcher.flush()
        other = way(gradwatch.load(tmp_path))
        assert len(other) == 2
        train(case, optimizer, 1)
    assert len(other) == 3
    assert len(pickle.dumps(other)) < 2_000


def test_a_pickle_names_only_gradwatch() -> None:
    """No room of the house is in it, so that it loads after the next move."""
    _, _, watcher = _run("named")
    watcher.close()
    for thing in (watcher, watcher.history):
        assert b"gradwatch." not in pickle.dumps(thing)
