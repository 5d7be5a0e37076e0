"""Whether the ranks train one model: what is told of loops in which they do not, and of no other."""

import gc
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import gradwatch
from tests.support import zoo
from tests.support.launch import on_ranks

RANKS, STEPS = 2, 24
HELD_STEPS = 56


def _data(step, part=0, same=False):
    seed = 1000 * step + 10 * part + (0 if same else dist.get_rank())
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(seed))


def _loss(model, step, part=0, same=False):
    return model(_data(step, part, same)).square().mean()


def _train(
    watched, optimizer, backward, steps=STEPS, after=None, stepped=None, agree=True, others=()
):
    """Train, and return what was told: kinds of events, texts of warnings, whether ranks agree.

    `stepped` steps in place of the optimizer; not `agree` if this must not be looked at; `others`
    are further optimizers, which `backward` steps.
    """
    watched_optimizer = [optimizer, *others] if others else optimizer
    optimizer = stepped or optimizer
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", gradwatch.GradwatchWarning)
        with gradwatch.watch(watched, watched_optimizer) as watcher:
            for step in range(steps):
                backward(step)
                optimizer.step()
                optimizer.zero_grad()
                if after is not None:
                    after(step)
    held = [parameter.detach() for group in optimizer.param_groups for parameter in group["params"]]
    mine = torch.cat([parameter.reshape(-1) for parameter in held])
    mean = mine.clone()
    dist.all_reduce(mean)
    return {
        "events": [(one.kind, one.step) for one in watcher.events],
        "warnings": [str(one.message) for one in caught],
        "agree": not agree or bool(torch.allclose(mine, mean / RANKS, atol=1e-6)),
        "local": int(watcher.history.steps()["grad_norm_local"].notna().sum()),
        "rows": len(watcher.history.steps()),
        "noise": watcher.noise_scale.updates,
        "findings": [one.kind for one in watcher.report().findings],
    }


def _new(**options):
    model = zoo.small()
    wrapper = DistributedDataParallel(model, **options)
    return model, wrapper, torch.optim.SGD(model.parameters(), lr=0.01)


# -- healthy loops ---------------------------------------------------------------------------------


def plain(**options):
    """The wrapper is watched and called."""
    _, wrapper, optimizer = _new(**options)
    return _train(wrapper, optimizer, lambda step: _loss(wrapper, step).backward())


def bucket_view():
    """Gradients are views of the buckets."""
    return plain(gradient_as_bucket_view=True)


def static_graph():
    """The first reduction of a static graph does not show."""
    return plain(static_graph=True)


def unused_parameters():
    """DDP looks for parameters that the loss does not reach."""
    return plain(find_unused_parameters=True)


def compiled_wrapper():
    """The wrapper is compiled."""
    _, wrapper, optimizer = _new()
    compiled = torch.compile(wrapper, backend="eager")
    return _train(compiled, optimizer, lambda step: _loss(compiled, step).backward())


def compiled_module():
    """A compiled module is wrapped."""
    wrapper = DistributedDataParallel(torch.compile(zoo.small(), backend="eager"))
    optimizer = torch.optim.SGD(wrapper.parameters(), lr=0.01)
    return _train(wrapper, optimizer, lambda step: _loss(wrapper, step).backward())


def bare_model_watched():
    """The bare model is watched and the wrapper is called."""
    model, wrapper, optimizer = _new()
    return _train(model, optimizer, lambda step: _loss(wrapper, step).backward())


def accumulated():
    """All micro-batches but the last run under no_sync()."""
    _, wrapper, optimizer = _new()

    def backward(step):
        with wrapper.no_sync():
            _loss(wrapper, step, 0).backward()
        _loss(wrapper, step, 1).backward()

    return _train(wrapper, optimizer, backward)


def inner_then_wrapper():
    """The last micro-batch reduces the sum, however the first ones were computed."""
    model, wrapper, optimizer = _new()

    def backward(step):
        _loss(model, step, 0).backward()
        _loss(wrapper, step, 1).backward()

    return _train(wrapper, optimizer, backward)


def averaged_by_hand():
    """The loop runs everything under no_sync() and averages the gradients itself."""
    _, wrapper, optimizer = _new()

    def backward(step):
        with wrapper.no_sync():
            _loss(wrapper, step).backward()
        for parameter in wrapper.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= RANKS

    return _train(wrapper, optimizer, backward, steps=HELD_STEPS)


def averaged_in_the_module():
    """The loop calls the module inside and averages the gradients itself."""
    model, wrapper, optimizer = _new()

    def backward(step):
        _loss(model, step).backward()
        flat = torch.cat([parameter.grad.reshape(-1) for parameter in model.parameters()])
        dist.all_reduce(flat)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        start = 0
        for parameter in model.parameters():
            end = start + parameter.numel()
            parameter.grad.copy_(flat[start:end].view_as(parameter) / RANKS)
            start = end

    return _train(wrapper, optimizer, backward)


def local_sgd():
    """The weights are averaged every 16 steps, in place of gradients."""
    _, wrapper, optimizer = _new()

    def backward(step):
        with wrapper.no_sync():
            _loss(wrapper, step).backward()

    def after(step):
        if step % 16 == 15:
            for parameter in wrapper.parameters():
                dist.all_reduce(parameter.data)
                parameter.data /= RANKS

    return _train(wrapper, optimizer, backward, steps=64, after=after)


def no_wrapper():
    """There is no wrapper: the loop averages the gradients itself."""
    model = zoo.small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def backward(step):
        _loss(model, step).backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
            parameter.grad /= RANKS

    return _train(model, optimizer, backward)


def evaluated_inside():
    """Evaluation calls the module inside the wrapper, without gradients."""
    model, wrapper, optimizer = _new()

    def after(step):
        with torch.no_grad():
            _loss(model, step)

    return _train(wrapper, optimizer, lambda step: _loss(wrapper, step).backward(), after=after)


def penalty_of_the_weights():
    """A loss of the weights alone has the same gradient on all ranks."""
    model, wrapper, optimizer = _new()

    def backward(step):
        _loss(wrapper, step).backward()
        sum(parameter.square().sum() for parameter in model.parameters()).mul(1e-3).backward()

    return _train(wrapper, optimizer, backward)


def penalty_of_its_own_step():
    """Every other step is on a loss of the weights alone."""
    model, wrapper, optimizer = _new()

    def backward(step):
        if step % 2:
            sum(parameter.square().sum() for parameter in model.parameters()).mul(1e-3).backward()
        else:
            _loss(wrapper, step).backward()

    return _train(wrapper, optimizer, backward)


def adversaries():
    """The generator's loss goes through the module inside the critic's wrapper."""
    generator = DistributedDataParallel(nn.Linear(4, 4))
    critic = DistributedDataParallel(zoo.small())
    both = nn.ModuleList([generator, critic])
    optimizer = torch.optim.SGD(generator.parameters(), lr=0.01)
    other = torch.optim.SGD(critic.parameters(), lr=0.01)

    def backward(step):
        other.zero_grad()
        critic(generator(_data(step)).detach()).mean().backward()
        other.step()
        critic.module(generator(_data(step, 1))).square().mean().backward()

    return _train(both, optimizer, backward, others=[other])


def checkpointed(reentrant=True):
    """Reentrant checkpointing runs backwards inside the backward."""

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.rest = nn.Linear(4, 4), zoo.small()

        def forward(self, x):
            return checkpoint(self.rest, self.first(x), use_reentrant=reentrant)

    wrapper = DistributedDataParallel(Checkpointed())
    optimizer = torch.optim.SGD(wrapper.parameters(), lr=0.01)
    return _train(wrapper, optimizer, lambda step: _loss(wrapper, step).backward())


def uneven():
    """One rank has more batches, within join()."""
    _, wrapper, optimizer = _new()
    seen = {}

    def run():
        steps = STEPS + 4 * dist.get_rank()
        with wrapper.join():
            seen.update(_watch_only(wrapper, optimizer, steps))

    run()
    return seen


def _watch_only(wrapper, optimizer, steps):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", gradwatch.GradwatchWarning)
        with gradwatch.watch(wrapper, optimizer) as watcher:
            for step in range(steps):
                _loss(wrapper, step).backward()
                optimizer.step()
                optimizer.zero_grad()
    return {
        "events": [(one.kind, one.step) for one in watcher.events],
        "warnings": [str(one.message) for one in caught],
        "agree": True,
    }


def managed():
    """A managed loop holds micro-batches back, and reduces a short window afterwards."""
    _, wrapper, optimizer = _new()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", gradwatch.GradwatchWarning)
        with gradwatch.watch(wrapper, optimizer, accumulate=3) as watcher:
            for step in range(STEPS):
                watcher.backward(_loss(wrapper, step, same=True))
                watcher.step(last=step % 3 == 1 or step == STEPS - 1)
    return {
        "events": [(one.kind, one.step) for one in watcher.events],
        "warnings": [str(one.message) for one in caught],
        "agree": True,
    }


def wrapped_again():
    """The model is wrapped anew in the middle of the run."""
    model, wrapper, optimizer = _new()
    wrappers = [wrapper]

    def backward(step):
        if step == 14:
            wrappers[0] = DistributedDataParallel(model)
        _loss(wrappers[0], step).backward()

    return _train(wrapper, optimizer, backward)


def wrapped_after_thawing():
    """Frozen layers are thawed, and the model is wrapped anew."""
    model = zoo.small()
    model[0].requires_grad_(False)
    wrappers = [DistributedDataParallel(model)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def backward(step):
        if step == 6:
            model[0].requires_grad_(True)
            wrappers[0] = DistributedDataParallel(model)
        _loss(wrappers[0], step).backward()

    return _train(model, optimizer, backward)


def penalty_in_bucket_views():
    """A loss of the weights alone comes last, in bucket views: this rank's own norm is unknown."""
    model, wrapper, optimizer = _new(gradient_as_bucket_view=True)

    def backward(step):
        _loss(wrapper, step).backward()
        sum(parameter.square().sum() for parameter in model.parameters()).mul(1e-3).backward()

    return _train(wrapper, optimizer, backward)


def prepared_by_hand():
    """As Lightning does: one forward, and the reducer is prepared before each backward."""
    model, wrapper, optimizer = _new()

    def backward(step):
        wrapper.reducer.prepare_for_backward([])
        _loss(model, step).backward()

    return _train(wrapper, optimizer, backward)


def two_optimizers():
    """Two optimizers share the parameters of one wrapper."""
    model, wrapper, optimizer = _new()
    first = torch.optim.SGD(model[0].parameters(), lr=0.01)
    rest = torch.optim.AdamW(model[2].parameters(), lr=0.01)

    def backward(step):
        optimizer.zero_grad()
        _loss(wrapper, step).backward()

    class Both:
        param_groups = optimizer.param_groups

        def step(self):
            first.step()
            rest.step()

        def zero_grad(self):
            optimizer.zero_grad()

    with_both = Both()
    return _train(wrapper, [first, rest], backward, stepped=with_both)


def closures():
    """LBFGS runs backwards inside its step."""
    model = zoo.small()
    wrapper = DistributedDataParallel(model)
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=2)

    class Closed:
        param_groups = optimizer.param_groups
        count = 0

        def step(self):
            self.count += 1

            def closure():
                optimizer.zero_grad()
                loss = _loss(wrapper, self.count)
                loss.backward()
                return loss

            optimizer.step(closure)

        def zero_grad(self):
            optimizer.zero_grad()

    return _train(wrapper, optimizer, lambda step: None, stepped=Closed(), agree=False)


def left_local_by_a_hook():
    """A communication hook may leave this rank's gradients as they are."""
    _, wrapper, optimizer = _new()

    def hook(state, bucket):
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    wrapper.register_comm_hook(None, hook)
    return _train(wrapper, optimizer, lambda step: _loss(wrapper, step).backward(), agree=False)


def equal_norms_by_chance():
    """A gradient that is the same for all data gives equal norms, in fewer steps than ten."""
    _, wrapper, optimizer = _new()

    def backward(step):
        _loss(wrapper, step, same=step % 10 != 9).backward()

    return _train(wrapper, optimizer, backward)


HEALTHY = [
    plain,
    bucket_view,
    static_graph,
    unused_parameters,
    bare_model_watched,
    accumulated,
    inner_then_wrapper,
    averaged_by_hand,
    averaged_in_the_module,
    local_sgd,
    no_wrapper,
    evaluated_inside,
    penalty_of_the_weights,
    penalty_of_its_own_step,
    adversaries,
    checkpointed,
    uneven,
    managed,
    wrapped_again,
    wrapped_after_thawing,
    penalty_in_bucket_views,
    prepared_by_hand,
    two_optimizers,
    closures,
    left_local_by_a_hook,
    equal_norms_by_chance,
]


# -- sick loops ------------------------------------------------------------------------------------


def inside(**options):
    """The module inside the wrapper is called."""
    model, wrapper, optimizer = _new(**options)
    return _train(wrapper, optimizer, lambda step: _loss(model, step).backward())


def inside_bucket_view():
    """The same with gradients that are views of buckets."""
    return inside(gradient_as_bucket_view=True)


def inside_static():
    """The same with a static graph."""
    return inside(static_graph=True)


def inside_and_clipped():
    """The same with a clip by torch."""
    model, wrapper, optimizer = _new()

    def backward(step):
        _loss(model, step).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1 if step % 2 else 1e6)

    return _train(wrapper, optimizer, backward)


def bare_model_called():
    """The bare model is watched and called, beside its wrapper."""
    model, _wrapper, optimizer = _new()
    return _train(model, optimizer, lambda step: _loss(model, step).backward())


def wrapped_later_and_not_called():
    """The model is watched, then wrapped, and the bare model is called."""
    model = zoo.small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    wrappers = []

    def backward(step):
        if not wrappers:
            wrappers.append(DistributedDataParallel(model))
        _loss(model, step).backward()

    return _train(model, optimizer, backward)


def inside_with_a_scaler():
    """The module inside the wrapper is called, and the loss is scaled."""
    model, wrapper, optimizer = _new()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    class Scaled:
        param_groups = optimizer.param_groups

        def step(self):
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()

        def zero_grad(self):
            optimizer.zero_grad()

    return _train(
        wrapper,
        optimizer,
        lambda step: scaler.scale(_loss(model, step)).backward(),
        stepped=Scaled(),
    )


def inside_from_some_step_on():
    """The loop goes on with the module inside the wrapper."""
    model, wrapper, optimizer = _new()
    return _train(
        wrapper, optimizer, lambda step: _loss(model if step > 3 else wrapper, step).backward()
    )


def inside_with_evaluation():
    """The wrapper is called for evaluation only."""
    model, wrapper, optimizer = _new()

    def after(step):
        with torch.no_grad():
            _loss(wrapper, step)

    return _train(wrapper, optimizer, lambda step: _loss(model, step).backward(), after=after)


def inside_with_the_same_data():
    """The module inside the wrapper is called, with the same data."""
    model, wrapper, optimizer = _new()
    return _train(wrapper, optimizer, lambda step: _loss(model, step, same=True).backward())


def never_synced(steps=HELD_STEPS):
    """Every backward runs under no_sync()."""
    _, wrapper, optimizer = _new()

    def backward(step):
        with wrapper.no_sync():
            _loss(wrapper, step).backward()

    return _train(wrapper, optimizer, backward, steps=steps)


def never_synced_in_a_short_run():
    """The same in a run of few steps."""
    return never_synced(12)


def thawed():
    """A layer is thawed after the model was wrapped."""
    model = zoo.small()
    model[0].requires_grad_(False)
    wrapper = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def backward(step):
        model[0].requires_grad_(step >= 3)
        _loss(wrapper, step).backward()

    return _train(wrapper, optimizer, backward)


def managed_inside():
    """A managed loop calls the module inside the wrapper."""
    model, wrapper, optimizer = _new()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", gradwatch.GradwatchWarning)
        with gradwatch.watch(wrapper, optimizer) as watcher:
            for step in range(STEPS):
                watcher.backward(_loss(model, step))
                watcher.step()
    return {
        "events": [(one.kind, one.step) for one in watcher.events],
        "warnings": [str(one.message) for one in caught],
        "agree": False,
    }


SICK = {
    inside: "ddp.module(x)",
    inside_bucket_view: "ddp.module(x)",
    inside_static: "ddp.module(x)",
    inside_and_clipped: "ddp.module(x)",
    bare_model_called: "ddp.module(x)",
    inside_from_some_step_on: "ddp.module(x)",
    inside_with_a_scaler: "ddp.module(x)",
    inside_with_evaluation: "ddp.module(x)",
    managed_inside: "ddp.module(x)",
    never_synced: "no_sync()",
    never_synced_in_a_short_run: "no_sync()",
    thawed: "after thawing",
}


# -- other loops -----------------------------------------------------------------------------------


def wrapped_later():
    """The model is watched, then wrapped, and the wrapper is called."""
    model = zoo.small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    wrappers = []

    def backward(step):
        if not wrappers:
            wrappers.append(DistributedDataParallel(model))
        _loss(wrappers[0], step).backward()

    return _train(model, optimizer, backward)


def wrapped_later_in_a_managed_loop():
    """The same, and gradwatch runs the steps."""
    model = zoo.small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", gradwatch.GradwatchWarning)
        with gradwatch.watch(model, optimizer, accumulate=2) as watcher:
            wrapper = DistributedDataParallel(model)
            for step in range(STEPS):
                watcher.backward(_loss(wrapper, step))
                watcher.step()
    return {
        "events": [(one.kind, one.step) for one in watcher.events],
        "warnings": [str(one.message) for one in caught],
    }


def same_data(**options):
    """All ranks draw the same batches."""
    _, wrapper, optimizer = _new(**options)
    return _train(
        wrapper, optimizer, lambda step: _loss(wrapper, step, same=True).backward(), steps=40
    )


def same_data_in_bucket_views():
    """The same with gradients that are views of buckets."""
    return same_data(gradient_as_bucket_view=True)


def nothing_to_learn():
    """All gradients are zero."""
    _, wrapper, optimizer = _new()
    return _train(wrapper, optimizer, lambda step: _loss(wrapper, step).mul(0).backward())


OTHERS = [
    wrapped_later,
    wrapped_later_and_not_called,
    wrapped_later_in_a_managed_loop,
    inside_with_the_same_data,
    same_data,
    same_data_in_bucket_views,
    nothing_to_learn,
]


def _all():
    seen = {}
    for loop in (*HEALTHY, *SICK, *OTHERS):
        torch.manual_seed(0)
        seen[loop.__name__] = loop()
        gc.collect()  # a wrapper of an earlier loop
    return seen


def _compiled():
    return [compiled_wrapper(), compiled_module()]


def _same_data_of_three():
    return same_data()


@pytest.fixture(scope="module")
def ranks():
    """What each rank was told in each loop."""
    return on_ranks(_all, RANKS)


@pytest.mark.parametrize("loop", HEALTHY, ids=lambda loop: loop.__name__)
def test_nothing_is_told_of_a_healthy_loop(ranks, loop):
    """Ranks that train one model together hear nothing."""
    for seen in ranks:
        assert seen[loop.__name__]["agree"]
        assert seen[loop.__name__]["warnings"] == []
        assert seen[loop.__name__]["events"] == []


@pytest.mark.parametrize("loop", SICK, ids=lambda loop: loop.__name__)
def test_gradients_that_nobody_averages_are_told_once(ranks, loop):
    """Each rank names the loop in which the replicas drift apart, and what to change."""
    for seen in ranks:
        told = seen[loop.__name__]
        assert not told["agree"]
        assert [kind for kind, _ in told["events"]] == ["mistake"]
        (warning,) = told["warnings"]
        assert "Nobody has averaged the gradients of" in warning
        assert SICK[loop] in warning


def test_it_is_told_in_the_second_step(ranks):
    """A single step may be a dry run; the second one is none."""
    assert ranks[0]["inside"]["events"] == [("mistake", 2)]
    assert ranks[1]["bare_model_called"]["events"] == [("mistake", 2)]


def test_a_model_that_was_wrapped_later_has_all_its_numbers(ranks):
    """From the second step on this rank's own norms and the noise scale are there."""
    for seen in ranks:
        told = seen["wrapped_later"]
        assert told["events"] == [("changed", 1)]
        assert told["warnings"] == []
        assert told["local"] == told["noise"] == STEPS - 1


def test_a_managed_loop_is_told_to_watch_the_wrapper(ranks):
    """Without the wrapper gradwatch holds no micro-batch back, and knows of one rank."""
    told = ranks[0]["wrapped_later_in_a_managed_loop"]
    assert told["events"] == [("changed", 1)]
    assert "watch the wrapper" in told["warnings"][0]


def test_a_wrapper_that_is_made_later_and_not_called_is_told(ranks):
    """The model was wrapped after watch(), and the bare model trained."""
    for seen in ranks:
        told = seen["wrapped_later_and_not_called"]
        assert [kind for kind, _ in told["events"]] == ["changed", "mistake"]
        assert len(told["warnings"]) == 1


def test_a_bare_model_has_this_ranks_norms(ranks):
    """Watching the bare model gives the numbers of watching its wrapper."""
    assert ranks[0]["bare_model_watched"]["local"] == STEPS
    assert ranks[0]["bare_model_watched"]["noise"] == ranks[0]["plain"]["noise"] == STEPS


@pytest.mark.parametrize("loop", [same_data, same_data_in_bucket_views], ids=lambda x: x.__name__)
def test_ranks_with_the_same_data_are_told_once(ranks, loop):
    """The mean over the ranks is each rank's own gradient: they do the same work."""
    for seen in ranks:
        told = seen[loop.__name__]
        assert [kind for kind, _ in told["events"]] == ["mistake"]
        (warning,) = told["warnings"]
        assert "The ranks see the same data" in warning
        assert "same_data" in told["findings"]
        assert "batch_large" not in told["findings"]


def test_gradients_that_are_not_averaged_are_no_sign_of_the_same_data(ranks):
    """Without a reduction both norms are equal, and the missing reduction is told."""
    (warning,) = ranks[0]["inside_with_the_same_data"]["warnings"]
    assert "ddp.module(x)" in warning


def test_gradients_of_zero_are_no_sign_of_the_same_data(ranks):
    """Zeros are equal on all ranks."""
    assert ranks[0]["nothing_to_learn"]["warnings"] == []


@pytest.mark.slow
def test_a_wrapper_may_be_compiled_or_wrap_what_is():
    """torch.compile() of the wrapper, or of the module in it, changes nothing."""
    for seen in on_ranks(_compiled, RANKS):
        for told in seen:
            assert told["agree"]
            assert (told["warnings"], told["events"]) == ([], [])


@pytest.mark.slow
def test_the_mean_of_three_equal_gradients_may_be_rounded():
    """The mean over three ranks differs from each of them in the last bit."""
    for told in on_ranks(_same_data_of_three, 3):
        assert [kind for kind, _ in told["events"]] == ["mistake"]
