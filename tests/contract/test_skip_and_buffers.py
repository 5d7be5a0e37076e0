"""A skipped step leaves no trace in buffers; where one keeps a NaN, it is told, and only there."""

import contextlib
import copy
import math

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch.hooks.buffers import ModelBuffers
from gradwatch.hooks.holding import ModelReference
from gradwatch.testing import late_readings
from tests.support.state import identical

BATCHES = 6


class Codebook(nn.Module):
    """A moving mean that is written past the version counter, as vector quantizers do."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("count", torch.zeros((), dtype=torch.long), persistent=False)

    def forward(self, x):
        if self.training:
            self.mean.data.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
            self.count += 1
        return x + self.mean


class Replaced(nn.Module):
    """A buffer that each forward replaces, one that it registers late, and one that was None."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("cache", None)

    def forward(self, x):
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
            self.cache = x.detach().sum()
        return x + self.mean


class Late(nn.Module):
    """Registers its buffer in its first forward."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += self.training
        if self.calls == 1:
            self.register_buffer("mean", torch.zeros(4))
        if self.training:
            self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return x


class Rotation(nn.Module):
    """A complex buffer, an expanded one, a sparse one, and a mask with minus infinity."""

    def __init__(self):
        super().__init__()
        self.register_buffer("phase", torch.ones(4, dtype=torch.complex64))
        self.register_buffer("position", torch.zeros(1).expand(4))
        self.register_buffer("links", torch.eye(2).to_sparse())
        self.register_buffer("mask", torch.full((4,), -math.inf))

    def forward(self, x):
        if self.training:
            self.phase.mul_(0.5 + x.detach().mean())
        return x * self.phase.abs().clamp(max=1.0)


class Shared(nn.Module):
    """One buffer that two modules hold."""

    def __init__(self):
        super().__init__()
        self.one, self.two = Codebook(), Codebook()
        self.two.mean = self.one.mean

    def forward(self, x):
        return self.two(self.one(x))


def _large():
    """A buffer above the size that is copied in every window."""
    norm = nn.BatchNorm1d(4)
    norm.register_buffer("big", torch.zeros(2**19))

    def change(module, args, out):
        module.big.add_(float(module.training) * out.detach().mean())

    norm.register_forward_hook(change)
    return norm


KINDS = {
    "BatchNorm": lambda: nn.BatchNorm1d(4),
    "codebook": Codebook,
    "replaced": Replaced,
    "late": Late,
    "rotation": Rotation,
    "shared": Shared,
    "spectral norm": lambda: torch.nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)),
    "large": _large,
}


def _model(kind):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), KINDS[kind](), nn.Linear(4, 2))


def _batch(index):
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(index))


def _plain(model, optimizer, watcher, x):
    model(x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def _closure(model, optimizer, watcher, x):
    def closure():
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)


def _micro_batches(model, optimizer, watcher, x):
    for part in x.chunk(2):
        (model(part).square().mean() / 2).backward()
    optimizer.step()
    optimizer.zero_grad()


def _two_forwards(model, optimizer, watcher, x):
    (model(x).square().mean() + model(-x.nan_to_num()).square().mean()).backward()
    optimizer.step()
    optimizer.zero_grad()


def _managed(model, optimizer, watcher, x):
    for part in x.chunk(2):
        watcher.backward(model(part).square().mean())
        watcher.step()


def _run_batch(model, optimizer, watcher, x):
    watcher.run_batch(lambda part: model(part).square().mean(), x)
    watcher.step()


def _by_layers(model, optimizer, watcher, x):
    for layer in model:
        x = layer(x)
    x.square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def _evaluates(model, optimizer, watcher, x):
    _plain(model, optimizer, watcher, x)
    model.eval()
    model(_batch(99)).sum()
    model.train()


LOOPS = {
    "plain": _plain,
    "closure": _closure,
    "micro-batches": _micro_batches,
    "two forwards": _two_forwards,
    "managed": _managed,
    "run_batch": _run_batch,
    "layer by layer": _by_layers,
    "evaluates": _evaluates,
}


SLOW = pytest.mark.slow


def _state(model, optimizer):
    buffers = {n: b for n, b in model.named_buffers() if b.layout is torch.strided}
    return copy.deepcopy((dict(model.named_parameters()), buffers, optimizer.state_dict()))


def _train(kind, loop, poisoned, *, steps=range(BATCHES), named=True, fused=False, **options):
    model = _model(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    options = {"on_nonfinite": "skip", **options}
    if loop == "managed":
        options["accumulate"] = 2
    with gradwatch.watch(model, optimizer if named else None, **options) as watcher:
        for step in steps:
            x = _batch(step)
            if step == poisoned:
                x[1, 2] = math.nan
            LOOPS[loop](model, optimizer, watcher, x)
    return _state(model, optimizer), watcher


@pytest.mark.parametrize("poisoned", [pytest.param(0, marks=SLOW), 3, pytest.param(4, marks=SLOW)])
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_skipped_batch_was_never_seen(kind, loop, poisoned):
    """Weights, state and buffers are bit for bit those of a run without the batch."""
    if kind == "late" and poisoned == 0:
        pytest.skip("there is nothing to go back to before the forward that registers it")
    state, watcher = _train(kind, loop, poisoned)
    rest = [step for step in range(BATCHES) if step != poisoned]
    expected, _ = _train(kind, loop, None, steps=rest)
    assert identical(state, expected)
    assert watcher.history.steps()["outcome"].iloc[poisoned] == "skipped_nonfinite"
    assert {event.kind for event in watcher.events} == {"nan", "skipped"}


@pytest.mark.parametrize("poisoned", [0, 3])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("late", [False, True], ids=["at hand", "late"])
@pytest.mark.parametrize("named", [False, True], ids=["found", "named"])
@pytest.mark.parametrize("kind", ["BatchNorm", "codebook", "replaced"])
def test_on_a_device_as_well(kind, named, late, fused, poisoned):
    """The same where only the device knows the norm, with and without a fused optimizer."""
    if kind == "replaced" and late and fused:
        pytest.skip("None becomes a tensor, which the host would have to decide")
    with late_readings() if late else contextlib.nullcontext():
        state, _ = _train(kind, "plain", poisoned, named=named, fused=fused)
        rest = [step for step in range(BATCHES) if step != poisoned]
        expected, _ = _train(kind, "plain", None, steps=rest, named=named, fused=fused)
    assert identical(state, expected)


@pytest.mark.parametrize("given", [False, True], ids=["scaler found", "scaler given"])
@pytest.mark.parametrize("fused", [False, True])
def test_with_a_scaler(fused, given):
    """A step that the GradScaler leaves out leaves no trace either."""
    results = []
    for poisoned, steps in ((3, range(BATCHES)), (None, [0, 1, 2, 4, 5])):
        model = _model("BatchNorm")
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        options = {"scaler": scaler} if given else {}
        with gradwatch.watch(model, optimizer, on_nonfinite="skip", **options) as watcher:
            for step in steps:
                x = _batch(step)
                if step == poisoned:
                    x[1, 2] = math.nan
                scaler.scale(model(x).square().mean()).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
        results.append(_state(model, optimizer))
        assert (watcher.history.steps()["outcome"] != "applied").sum() == (poisoned is not None)
    assert identical(*results)


def test_a_finite_outlier_that_is_skipped():
    """skip_spikes puts buffers back as well."""
    results = []
    for spike, steps in ((40, range(45)), (None, [*range(40), *range(41, 45)])):
        model = _model("BatchNorm")
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        with gradwatch.watch(model, optimizer, skip_spikes=6.0) as watcher:
            for step in steps:
                loss = model(_batch(step)).square().mean()
                (loss * (1e4 if step == spike else 1.0)).backward()
                optimizer.step()
                optimizer.zero_grad()
        outcomes = list(watcher.history.steps()["outcome"])
        assert outcomes.count("skipped_policy") == (spike is not None)
        results.append(_state(model, optimizer))
    assert identical(*results)


def test_two_optimizers_in_turns():
    """A skip of one leaves what the batches of the other have done to the buffers."""

    def train(bad):
        torch.manual_seed(0)
        nets = nn.ModuleDict({"g": _model("BatchNorm"), "d": _model("BatchNorm")})
        nets["d"][0] = nn.Linear(2, 4)
        optimizers = [torch.optim.SGD(nets[name].parameters(), lr=0.1) for name in ("d", "g")]
        with gradwatch.watch(nets, optimizers, on_nonfinite="skip") as watcher:
            for turn in range(12):
                if turn == 6 and bad is None:
                    continue
                x = _batch(turn)
                if turn == bad:
                    x[0] = math.nan
                made = nets["g"](x)
                nets["d"](made if turn % 2 else made.detach()).square().mean().backward()
                optimizers[turn % 2].step()
                nets.zero_grad()
        return copy.deepcopy(nets.state_dict()), watcher

    state, watcher = train(6)
    assert (watcher.history.steps()["outcome"] == "skipped_nonfinite").sum() == 1
    assert identical(state, train(None)[0])


def test_what_the_loop_writes_between_two_steps_stays():
    """Buffers that the loop changes after a step are not those of the step before."""
    model = _model("BatchNorm")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.watch(model, optimizer, on_nonfinite="skip"):
        for step in range(4):
            x = _batch(step)
            if step == 3:
                x[0] = math.nan
                model[1].running_mean.fill_(7.0)
            _plain(model, optimizer, None, x)
    assert model[1].running_mean.eq(7.0).all()


def _assert_as_if_left_out(prepare):
    """Train with a poisoned batch and without it; `prepare` returns a model, and what the loop calls."""
    results = []
    for poisoned, steps in ((3, range(BATCHES)), (None, [0, 1, 2, 4, 5])):
        model, called = prepare()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with gradwatch.watch(model, optimizer, on_nonfinite="skip"):
            for step in steps:
                x = _batch(step)
                if step == poisoned:
                    x[1, 2] = math.nan
                _plain(called, optimizer, None, x)
        results.append(_state(model, optimizer))
    assert identical(*results)


def test_a_compiled_model():
    """The hook leaves nothing in the graph, and the end of a step takes its place."""

    def prepare():
        torch.compiler.reset()
        model = _model("BatchNorm")
        return model, torch.compile(model, backend="eager", fullgraph=True)

    _assert_as_if_left_out(prepare)


@pytest.mark.parametrize("kind", ["BatchNorm", "codebook", "replaced"])
@pytest.mark.parametrize("late", [False, True], ids=["at hand", "late"])
def test_a_recorded_nan_that_stays_in_buffers_is_told_once(kind, late):
    """An event, a warning and a finding name the buffers and the step."""
    with (
        late_readings() if late else contextlib.nullcontext(),
        pytest.warns(gradwatch.GradwatchWarning, match="of the model after step 4"),
    ):
        _, watcher = _train(kind, "plain", 3, on_nonfinite="record")
    [event] = [event for event in watcher.events if event.kind == "poisoned"]
    assert event.step == 4
    assert "1." in event.message
    assert watcher.report().kinds.count("poisoned") == 1


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel, torch.compile])
def test_a_buffer_has_the_name_that_the_user_knows(wrap):
    """Names lose what wrappers of torch add, and nothing else: users have a module "_orig_mod" too."""
    inner = nn.ModuleDict({"_orig_mod": nn.BatchNorm1d(4)})
    buffers = ModelBuffers(ModelReference(wrap(inner)))
    with torch.no_grad():
        buffers.attach(False, contextlib.nullcontext(), lambda: False, lambda: False)
        inner["_orig_mod"].running_mean.fill_(math.nan)
    assert buffers.look().poisoned() == ["_orig_mod.running_mean"]


def test_a_mask_of_minus_infinity_is_no_poison():
    """What was not finite from the start is not named, and neither is what stays finite."""
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    model[1].register_buffer("mask", torch.full((4, 4), -math.inf).triu(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.watch(model, optimizer) as watcher:
        for step in range(4):
            (model(_batch(step)).sum() * (math.nan if step == 2 else 1.0)).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert {event.kind for event in watcher.events} == {"nan"}


def test_buffers_beyond_the_limit_are_told(monkeypatch):
    """What is too large to be copied stays as the skipped step has left it, and is named."""
    monkeypatch.setattr("gradwatch.hooks.buffers.MOST_BYTES", 2**20)
    with pytest.warns(gradwatch.GradwatchWarning, match=r"had changed 1 buffer \(1\.big\)"):
        _, watcher = _train("large", "plain", 3)
    assert [event.kind for event in watcher.events].count("poisoned") == 1


def test_a_copy_of_the_model_has_no_hook_of_ours():
    """deepcopy() inside the loop works, and the copy's forwards do nothing here."""
    model = _model("BatchNorm")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.watch(model, optimizer, on_nonfinite="skip"):
        _plain(model, optimizer, None, _batch(0))
        twin = copy.deepcopy(model)
        assert torch.equal(twin(_batch(1)), model(_batch(1)))
    assert not model._forward_pre_hooks


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
def test_a_scripted_model():
    """A scripted module has no dict of buffers: they are read and put back as its attributes."""

    def prepare():
        model = torch.jit.script(_model("BatchNorm"))
        return model, model

    _assert_as_if_left_out(prepare)
