"""Ranks of which one does not watch, stops watching or leaves out a step: nobody waits for it."""

import contextlib
import math
import warnings
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

import gradwatch
from gradwatch.hooks import exchange
from tests.support import float64, zoo
from tests.support.calls import CountCalls
from tests.support.launch import on_ranks

STEPS, AT = 5, 2
STATISTICS = {"statistics": ["norm", "max", "update_ratio"]}
HANG = 120.0  # seconds; a step takes milliseconds

pytestmark = pytest.mark.skipif(
    torch.__version__ < "2.9", reason="FSDP2 on CPUs needs torch 2.9 or newer"
)


# -- what a rank does -------------------------------------------------------------------------------


def _tensor_parallel():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    model, mesh = zoo.small(), init_device_mesh("cpu", (dist.get_world_size(),))
    return parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})


def _both():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    model = parallelize_module(zoo.small(), mesh["tensor"], plan)
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh["data"])
    return model


def _hybrid():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, mesh = zoo.small(), init_device_mesh("cpu", (2, 2), mesh_dim_names=("copy", "shard"))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    return model


def _loss(model, step):
    # The ranks of a model that is tensor parallel see the same data.
    seed = 100 * step
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
    return model(x).square().mean()


def _train(model, optimizer, do=lambda step, model: True):
    """Trains; `do(step, model)` comes before each step, and says whether it is taken."""
    norms = []
    for step in range(STEPS):
        _loss(model, step).backward()
        norms.append(float64.gradient_norm(model))
        if do(step, model):
            optimizer.step()
        optimizer.zero_grad()
    return norms


def _weights(model):
    with torch.no_grad():
        return [
            float(_whole(parameter).double().square().sum()) for parameter in model.parameters()
        ]


def _whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _run(make, do, watches=lambda: True, **options):
    """Trains as told by `do(watcher)`; returns what was recorded, warned and raised."""
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen = {"error": "", "norms": [], "recorded": [], "clipped": [], "events": [], "found": []}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        watcher = gradwatch.watch(model, optimizer, **options) if watches() else None
        try:
            if watcher is not None:
                watcher.attach()
        except RuntimeError as error:
            seen["error"], watcher = str(error), None
        with contextlib.ExitStack() as ending:
            if watcher is not None:
                ending.callback(watcher.close)
            seen["norms"] = _train(model, optimizer, do(watcher))
    if watcher is not None:
        steps = watcher.history.steps()
        seen["recorded"] = steps["grad_norm"].tolist()
        seen["clipped"] = steps["clipped"].isna().tolist()
        seen["events"] = [(one.step, one.kind, one.message) for one in watcher.events]
        rows = watcher.history.parameters()
        if "max" in rows:
            known = rows[["max", "update_ratio"]].notna().any(axis=1)
            seen["sampled"] = sorted(set(rows["step"][known]))
        seen["found"] = [one.kind for one in watcher.report()]
    told = [one for one in caught if issubclass(one.category, gradwatch.GradwatchWarning)]
    seen["told"] = [str(one.message) for one in told]
    seen["weights"] = _weights(model)
    return seen


def _nothing(watcher):
    return lambda step, model: True


def _last():
    return dist.get_rank() == dist.get_world_size() - 1


def _closes(watcher):
    def do(step, model):
        if step == AT and _last():
            watcher.close()
        return True

    return do


class _Odd(torch.Tensor):
    """A gradient that no norm can be taken of."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if "norm" in getattr(function, "__name__", ""):
            raise ValueError("no norm")
        return super().__torch_function__(function, types, args, kwargs or {})


def _fails(watcher):
    def do(step, model):
        if step == AT and _last():
            window = watcher._registry.followed[0].window
            window.first_nonfinite = "no such thing"
        return True

    return do


def _leaves_out(watcher):
    return lambda step, model: not (step == AT and _last())


def _raises(make):
    """The loop of one rank ends in the with block; it goes on without watching."""
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watcher = gradwatch.watch(model, optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with contextlib.suppress(OSError), watcher:
            for step in range(STEPS):
                if step == AT and _last():
                    raise OSError("of the loop")
                _loss(model, step).backward()
                optimizer.step()
                optimizer.zero_grad()
        for step in range(AT, STEPS) if _last() else ():
            _loss(model, step).backward()
            optimizer.step()
            optimizer.zero_grad()
    told = [one for one in caught if issubclass(one.category, gradwatch.GradwatchWarning)]
    return {
        "recorded": watcher.history.steps()["grad_norm"].tolist(),
        "told": [str(one.message) for one in told],
    }


def _comes_late(watcher):
    """One rank is so late that it is not waited for, but the step is the same."""

    def do(step, model):
        if step == AT and _last():
            # It waits for what the others do next, which is to give this step up.
            store = dist.distributed_c10d._get_default_store()
            store.wait(["given up"])
        return True

    return do


def _tells(self, sent, give_up=exchange.Exchange._miss):
    dist.distributed_c10d._get_default_store().set("given up", "")
    give_up(self, sent)


def _counted(make):
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    counts = []
    with warnings.catch_warnings(), gradwatch.watch(model, optimizer):
        warnings.simplefilter("ignore")  # torch's own, about views
        for step in range(3):
            _loss(model, step).backward()
            with CountCalls() as counter:
                optimizer.step()
            counts.append(counter.sent["allreduce"])
            optimizer.zero_grad()
    return counts


def _acting():
    """A rank closes a watcher that clips: the others are told with an error before the step."""
    torch.manual_seed(0)
    model = zoo.small_sharded()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watcher, error = gradwatch.watch(model, optimizer, clip=1.0), ""
    with watcher:
        for step in range(AT + 1):
            _loss(model, step).backward()
            if step == AT and _last():
                watcher.close()
            before = _local(model)
            try:
                optimizer.step()
            except RuntimeError as raised:
                error, moved = str(raised), not torch.equal(before, _local(model))
            else:
                moved = not torch.equal(before, _local(model))
            optimizer.zero_grad()
    return {"error": error, "moved": moved}


def _local(model):
    return torch.cat([p.detach().to_local().reshape(-1) for p in model.parameters()])


def _ddp():
    """Only rank 0 watches a wrapper: nothing is sent for it, and nothing is asked of the store."""
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(zoo.small())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watcher = gradwatch.watch(model, optimizer) if dist.get_rank() == 0 else None
    counts, norms = [], []
    with watcher or contextlib.nullcontext(), CountCalls() as counter:
        for step in range(STEPS):
            _loss(model, step).backward()
            norms.append(float64.gradient_norm(model))
            optimizer.step()
            optimizer.zero_grad()
            counts.append(sum(counter.sent.values()))
    recorded = [] if watcher is None else watcher.history.steps()["grad_norm"].tolist()
    return {"sent": counts, "recorded": recorded, "norms": norms, "rounds": len(exchange._rounds)}


SHORT = {"START_WAIT_S": 3.0, "STEP_WAIT_S": 1.0, "LAST_WORD_S": 0.05}


def _everything(makes):
    """All scenes, one after the other, in one group."""
    seen = {"ddp": _ddp()}
    with mock.patch.multiple(exchange, **SHORT):
        for name in makes:
            make = {"fsdp": zoo.small_sharded, "tensor": _tensor_parallel, "both": _both}[name]
            seen[name] = {
                "unwatched": _run(make, _nothing, lambda: False),
                "watched": _run(
                    make, _nothing, statistics=["norm", "max", "update_ratio"], every=2
                ),
                "missing": _run(make, _nothing, lambda: not _last()),
                "options": _run(
                    make, _nothing, statistics=["norm", "max"] if _last() else ["norm"]
                ),
                "closes": _run(make, _closes, **STATISTICS),
                "fails": _run(make, _fails),
                "leaves out": _run(make, _leaves_out),
                "sampled": _run(make, _leaves_out, **STATISTICS),
                "raises": _raises(make),
                "counted": _counted(make),
            }
        with mock.patch.object(exchange.Exchange, "_miss", _tells):
            seen["late"] = _run(zoo.small_sharded, _comes_late)
        seen["acting"] = _acting()
    return seen


# -- what is true of it -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two():
    """What each of two ranks saw."""
    return on_ranks(_everything, 2, timeout=HANG, makes=["fsdp", "tensor"])


MAKES = pytest.mark.parametrize("make", ["fsdp", "tensor"])


@MAKES
def test_all_ranks_watch(two, make):
    """All norms are those of whole gradients, and nothing is told."""
    for seen in two:
        watched = seen[make]["watched"]
        assert watched["recorded"] == pytest.approx(watched["norms"], rel=1e-5)
        assert (watched["told"], watched["events"], watched["error"]) == ([], [], "")
        assert not any(watched["clipped"])
        assert watched["weights"] == seen[make]["unwatched"]["weights"]


@MAKES
def test_a_rank_that_does_not_watch_is_refused(two, make):
    """One sentence before the first step; unwatched the training goes through."""
    first, last = (seen[make]["missing"] for seen in two)
    assert "rank 1 did not begin to watch within 3 s of rank 0" in first["error"]
    assert last["error"] == ""
    assert first["told"] == []  # nor that the watcher was never entered
    assert first["weights"] == last["weights"] == two[0][make]["unwatched"]["weights"]


@MAKES
def test_other_options_are_refused(two, make):
    """All ranks are told which option differs, in the same words."""
    (error, same) = (seen[make]["options"]["error"] for seen in two)
    assert error == same
    assert "has statistics=['norm', 'max'] where rank" in error or (
        "has statistics=['norm'] where rank" in error
    )
    for seen in two:
        assert seen[make]["options"]["weights"] == seen[make]["unwatched"]["weights"]


@MAKES
@pytest.mark.parametrize(
    ("scene", "why"),
    [
        ("closes", "its watcher was closed"),
        ("fails", "Error"),
        ("raises", "its watcher was closed"),
    ],
)
def test_a_rank_stops_watching(two, make, scene, why):
    """The other goes on, with the norms until then and none from then on, and says so once."""
    first, last = (seen[make][scene] for seen in two)
    whole = two[0][make]["watched"]["norms"]
    assert first["recorded"][:AT] == pytest.approx(whole[:AT], rel=1e-5)
    assert len(first["recorded"]) == STEPS
    assert all(map(math.isnan, first["recorded"][AT:]))
    (told,) = first["told"]
    assert f"Rank 1 has stopped watching ({why}" in told.replace("(AttributeError", "(Error")
    assert f"not known from step {AT + 1} on" in told
    assert last["recorded"] == pytest.approx(whole[:AT], rel=1e-5)
    if scene != "raises":
        assert first["clipped"] == [False] * AT + [True] * (STEPS - AT)
        assert first["found"].count("mistake") == 1
        assert "nonfinite" not in "".join(first["found"])
        assert first["weights"] == last["weights"] == two[0][make]["unwatched"]["weights"]
    assert len(last["told"]) == (scene == "fails")
    assert all("The training goes on untouched." in text for text in first["told"] + last["told"])


@MAKES
def test_a_rank_leaves_out_a_step(two, make):
    """The step that only the other took has no norm; in the next one the ranks meet again."""
    for rank, seen in enumerate(two):
        left = seen[make]["leaves out"]
        assert left["told"] == []
        told = [(kind, message[:28]) for _, kind, message in left["events"] if kind == "changed"]
        assert ("changed", "Rank 1 has left out a step()") in told
        expected = list(left["norms"])
        if rank == 0:
            assert math.isnan(left["recorded"].pop(AT))
        else:
            expected[AT + 1] = left["recorded"][AT]  # what was left out may be part of the next
        del expected[AT]
        assert left["recorded"] == pytest.approx(expected, rel=1e-5)


@MAKES
def test_statistics_end_where_the_ranks_count_different_steps(two, make):
    """A step is due by its number, so what is due in some steps cannot be exchanged any more."""
    for scene in ("closes", "sampled"):
        for seen in two:
            assert seen[make][scene]["sampled"] == list(range(1, AT + 1))
            assert seen[make][scene]["recorded"][:AT] == pytest.approx(
                seen[make][scene]["norms"][:AT], rel=1e-5
            )


def test_a_rank_that_is_only_late_costs_one_row(two):
    """The step that was not waited for has no norm; all others have theirs, and no one is warned."""
    first, last = (seen["late"] for seen in two)
    assert first["told"] == last["told"] == []
    assert [math.isnan(norm) for norm in first["recorded"]] == [step == AT for step in range(STEPS)]
    assert last["recorded"] == pytest.approx(last["norms"], rel=1e-5)
    assert [kind for _, kind, _ in first["events"]] == ["changed"]


def test_a_clip_without_the_other_rank_is_an_error(two):
    """To go on without it would silently be another training."""
    first, last = (seen["acting"] for seen in two)
    assert "Rank 1 has stopped watching" in first["error"]
    assert "clip= cannot be done without" in first["error"]
    assert not first["moved"]
    assert (last["error"], last["moved"]) == ("", True)


@MAKES
def test_a_healthy_step_sends_one_all_reduce(two, make):
    """What settles who watches is sent before the first step, and not by a collective."""
    assert [seen[make]["counted"] for seen in two] == [[1, 1, 1]] * 2


def test_a_wrapper_that_only_rank_0_watches(two):
    """It is right, sends what it sends unwatched, and asks nothing of the other rank."""
    first, last = (seen["ddp"] for seen in two)
    assert first["sent"] == last["sent"]
    assert first["recorded"] == pytest.approx(first["norms"], rel=1e-5)
    assert first["rounds"] == 0


@pytest.mark.slow
def test_four_ranks():
    """On four ranks, in one group and in two at once, the same is true of the last of them."""
    four = on_ranks(_everything, 4, timeout=2 * HANG, makes=["fsdp", "both"])
    for make in ("fsdp", "both"):
        for rank, seen in enumerate(four[:3]):
            assert seen[make]["watched"]["recorded"] == pytest.approx(
                seen[make]["watched"]["norms"], rel=1e-5
            )
            assert (
                f"rank 3 did not begin to watch within 3 s of rank {rank}"
                in (seen[make]["missing"]["error"])
            )
            for scene in ("closes", "fails", "raises"):
                assert all(map(math.isnan, seen[make][scene]["recorded"][AT:]))
                assert seen[make][scene]["recorded"][:AT] == pytest.approx(
                    seen[make]["watched"]["norms"][:AT], rel=1e-5
                )
                (told,) = seen[make][scene]["told"]
                assert told.startswith("gradwatch: Rank 3 has stopped watching")
            left, whole = seen[make]["leaves out"], seen[make]["leaves out"]["norms"]
            assert left["recorded"][:AT] == pytest.approx(whole[:AT], rel=1e-5)
            assert math.isnan(left["recorded"][AT])
            assert left["recorded"][AT + 1 :] == pytest.approx(whole[AT + 1 :], rel=1e-5)
            assert left["told"] == []
            assert seen[make]["counted"] == [1] * 3


def _copies():
    with mock.patch.multiple(exchange, **SHORT):
        return {
            "closes": _run(_hybrid, _closes),
            "missing": _run(_hybrid, _nothing, lambda: not _last()),
        }


@pytest.mark.slow
def test_ranks_with_copies_of_the_shards():
    """Only those that share parts with a rank miss it, but all copies must be watched at first."""
    four = on_ranks(_copies, 4, timeout=HANG)
    for rank, seen in enumerate(four[:3]):
        closes = seen["closes"]
        known = AT if rank == 2 else STEPS
        assert closes["recorded"][:known] == pytest.approx(closes["norms"][:known], rel=1e-5)
        assert all(map(math.isnan, closes["recorded"][known:]))
        assert len(closes["told"]) == (rank == 2)
        assert (
            f"rank 3 did not begin to watch within 3 s of rank {rank}" in seen["missing"]["error"]
        )
