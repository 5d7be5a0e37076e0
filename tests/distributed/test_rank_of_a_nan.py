"""Which rank a NaN came from: the one whose own gradient was bad, else none is named."""

import contextlib
import math
import warnings

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import gradwatch
from gradwatch.testing import CapturingSink, late_readings
from tests.support import zoo
from tests.support.calls import CountCalls
from tests.support.launch import on_ranks

RANKS, STEPS, CULPRIT, BAD = 2, 6, 1, 4  # steps count from 1

pytestmark = pytest.mark.filterwarnings("ignore")


def _loss(model, step, bad=False):
    seed = 10 * step + dist.get_rank()
    loss = model(torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))).square().mean()
    return loss * math.nan if bad else loss


def _plain(model, step):
    _loss(model, step, step == BAD and dist.get_rank() == CULPRIT).backward()


def _held(model, step):
    """The NaN is made in a micro-batch that does not communicate."""
    with model.no_sync():
        _plain(model, step)
    _loss(model, step).backward()


def _each_reduced(model, step):
    """The NaN is reduced in the first of two micro-batches, and the second adds to it."""
    _plain(model, step)
    _loss(model, step).backward()


def _scaled(model, step):
    """The loss is sound, and its scale overflows on one rank."""
    scale = 1e38 if step == BAD and dist.get_rank() == CULPRIT else 1.0
    (_loss(model, step) * scale * scale).backward()


def _backward_held(model, step):
    """Only the backward is under no_sync(), which the wrapper asks for in the forward: it reduces."""
    loss = _loss(model, step, step == BAD and dist.get_rank() == CULPRIT)
    with model.no_sync():
        loss.backward()


WAYS = {"plain": _plain, "held": _held, "each_reduced": _each_reduced, "scaled": _scaled}


def _rank_of_nan(way, late, run_dir=None, **settings):
    model = DistributedDataParallel(zoo.small(), **settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    sink = CapturingSink()
    watcher = gradwatch.watch(model, optimizer, on_nonfinite="skip", sinks=[sink], run_dir=run_dir)
    with late_readings(1) if late else contextlib.nullcontext(), watcher, CountCalls() as counter:
        for step in range(1, STEPS + 1):
            optimizer.zero_grad()
            WAYS[way](model, step)
            optimizer.step()
    events = watcher.history.events().to_dict("records")
    titles = [one.title for one in watcher.history.report().findings if one.kind == "nan"]
    return {
        "events": [(one["kind"], one["step"], one["rank"]) for one in events],
        "messages": [one["message"] for one in events if one["kind"] == "nan"],
        "written": [(one.kind, one.rank) for one in sink.events],
        "titles": titles,
        "sent": dict(counter.sent),
    }


def _raised():
    """What the error of `on_nonfinite="raise"` says on each rank."""
    model = DistributedDataParallel(zoo.small())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    try:
        with gradwatch.watch(model, optimizer, on_nonfinite="raise"):
            _plain(model, BAD)
            optimizer.step()
    except gradwatch.NonFiniteGradientError as error:
        return str(error)
    return ""


def _all(folder):
    """Everything that is read below, from one launch."""
    warnings.simplefilter("ignore")
    _rank_of_nan("plain", False, run_dir=folder)
    seen = {(way, late): _rank_of_nan(way, late) for way in WAYS for late in (False, True)}
    for name in ("gradient_as_bucket_view", "static_graph", "find_unused_parameters"):
        seen[name, False] = _rank_of_nan("plain", False, **{name: True})
    WAYS["backward held"] = _backward_held
    return {"seen": seen, "raised": _raised(), "held": _rank_of_nan("backward held", False)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The run folder of one of the runs."""
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def ranks(folder):
    """What each rank saw."""
    return on_ranks(_all, RANKS, folder=str(folder))


def test_only_the_rank_that_made_it_names_itself(ranks):
    """Whatever the wrapper's settings, with the numbers at hand and late; the other says -1."""
    assert len(ranks[0]["seen"]) == 11
    for rank, of_rank in enumerate(ranks):
        for (way, late), seen in of_rank["seen"].items():
            named = rank if rank == CULPRIT else -1
            expected = [("nan", BAD, named), ("skipped", BAD, named)]
            assert seen["events"] == expected, (way, late)


def test_the_message_says_that_it_came_with_the_reduction(ranks):
    """On the rank whose own gradient was finite, and on no other."""
    for rank, of_rank in enumerate(ranks):
        for seen in of_rank["seen"].values():
            (message,) = seen["messages"]
            assert ("this rank's own gradient was finite" in message) == (rank != CULPRIT)


def test_sinks_get_no_wrong_rank(ranks):
    """The first rank writes, and it was not the culprit."""
    for seen in ranks[0]["seen"].values():
        assert {rank for _, rank in seen["written"]} == {-1}


def test_the_report_names_the_rank_or_says_that_it_is_not_known(ranks):
    """The finding says so in its title."""
    for rank, words in enumerate((", rank not known", ", rank 1")):
        for seen in ranks[rank]["seen"].values():
            assert all(words in title for title in seen["titles"]), seen["titles"]


def test_the_error_says_whose_it_was(ranks):
    """on_nonfinite="raise" stops all ranks, and says on which the gradient was finite."""
    own = ["this rank's own gradient was finite" in of_rank["raised"] for of_rank in ranks]
    assert own == [True, False]


def test_a_rank_that_cannot_know_names_none(ranks):
    """Where the reduction was not announced, nobody has seen what the gradients were before it."""
    for of_rank in ranks:
        assert of_rank["held"]["events"] == [("nan", BAD, -1), ("skipped", BAD, -1)]
        assert "Which rank it came from is not known." in of_rank["held"]["messages"][0]


def test_nothing_is_sent_for_it(ranks):
    """Neither while all is well nor afterwards: DDP's own collectives are all there are."""
    for of_rank in ranks:
        assert not any(seen["sent"].get("allgather") for seen in of_rank["seen"].values())


def test_the_run_folder_names_the_rank(ranks, folder):
    """Each rank notes its own beside it, so that a reader can say more than the first rank saw."""
    history = gradwatch.load(folder)
    events = history.events()
    assert events["rank"].tolist() == [CULPRIT, CULPRIT]
    assert "It came from rank 1." in events["message"][0]
    assert [one.title for one in history.report().findings if ", rank 1" in one.title]
