"""A replay leaves the training bit-identical to one without it, whatever the model does."""

import random
from collections import OrderedDict, defaultdict, deque
from enum import Enum
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

from gradwatch.replay.runs import run_calls
from gradwatch.replay.stand_ins import ReplayError
from gradwatch.replay.state import OWN_GENERATOR
from tests.replay.replayed import WAYS, Seen, disturbance, kept
from tests.support import zoo

ways = pytest.mark.parametrize("way", WAYS)


def _training(model, batch=None, *, context=None):
    """A squared loss on six numbers, with a fixed batch for each step."""

    def loss_of(step):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 6, generator=generator) if batch is None else batch(step)
        if context is None:
            return model(x).float().square().mean()
        with context():
            return model(x).float().square().mean()

    return model, loss_of


@ways
@pytest.mark.parametrize("name", zoo.MODELS)
def test_every_model_of_the_zoo(name, way):
    """Weights, buffers, optimizer, random states, attributes and gradients are those without it."""

    def make():
        case = zoo.make_case(name, dropout=0.2)
        return case.model, lambda step: case.loss(case.model, case.batch(step))

    assert disturbance(make, way) == []


def _gru():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.GRU(
                3, 4, num_layers=2, dropout=0.3, batch_first=True, bidirectional=True
            )

        def forward(self, x):
            return self.cell(x.unflatten(1, (2, 3)))[0].sum(1)

    return Net()


def _reparametrized(kind):
    layer = nn.Linear(6, 6)
    if kind == "weight_norm":
        return nn.Sequential(parametrizations.weight_norm(layer), nn.Tanh())
    if kind == "spectral_norm":
        return nn.Sequential(parametrizations.spectral_norm(layer), nn.Tanh())
    if kind == "orthogonal":
        return nn.Sequential(parametrizations.orthogonal(layer), nn.Tanh())
    if kind == "old_spectral_norm":
        return nn.Sequential(nn.utils.spectral_norm(layer), nn.Tanh())
    prune.l1_unstructured(layer, "weight", 0.3)
    return nn.Sequential(layer, nn.Tanh())


@ways
@pytest.mark.parametrize(
    "kind", ["weight_norm", "spectral_norm", "orthogonal", "old_spectral_norm", "prune"]
)
def test_weights_that_hooks_compute(kind, way):
    """What torch's own hooks and parametrizations write, such as vectors of a norm, stays."""
    make = lambda: _training(_reparametrized(kind))  # noqa: E731
    # A spectral norm begins where the forward before has left its vectors.
    assert disturbance(make, way, compares_gradients="spectral" not in kind) == []


@ways
def test_a_cached_parametrization(way):
    """A parametrization that is evaluated inside of its own cache."""
    make = lambda: _training(_reparametrized("weight_norm"), context=parametrize.cached)  # noqa: E731
    assert disturbance(make, way) == []


@ways
def test_a_bidirectional_gru(way):
    """The flat list of weights that torch's RNNs keep holds the stand-ins too."""
    assert disturbance(lambda: _training(_gru()), way) == []


class _Tally:
    def __init__(self):
        self.calls = 0
        self.sizes = []


class Counting(nn.Module):
    """Writes to everything that a module can have."""

    total = 0
    shared = []  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.calls = 0
        self.losses = []
        self.by_name = {"a": {"b": [0]}, "mean": torch.zeros(())}
        self.ordered = OrderedDict(x=1)
        self.by_size = defaultdict(list)
        self.names = set()
        self.newest = deque(maxlen=2)
        self.running = torch.zeros(3)
        self.array = np.zeros(3)
        self.pair = (torch.zeros(2), 1)
        self.tally = _Tally()
        self.register_buffer("seen", torch.zeros((), dtype=torch.long), persistent=False)

    def forward(self, x):
        y = self.layer(x)
        self.calls += 1
        Counting.total += 1
        Counting.shared.append(self.calls)
        self.losses.append(y.detach().mean())
        self.by_name["a"]["b"][0] += 1
        self.by_name["a"]["b"].append(len(x))
        self.by_name["mean"] += y.detach().mean()
        self.ordered[f"y{self.calls}"] = 1
        self.ordered.move_to_end("x")
        self.by_size[len(x)].append(1)
        self.names.add(self.calls)
        self.newest.append(self.calls)
        self.running.add_(y.detach().sum(0))
        self.array += y.detach().numpy().sum(0)
        self.pair[0].add_(1)
        self.tally.calls += 1
        self.tally.sizes.append(len(x))
        self.seen += 1
        self.made_late = y.detach()
        self.training = self.calls % 2 == 0
        return y


@ways
def test_plain_attributes(way):
    """Counters, containers, arrays, objects and class attributes are as they were."""
    Counting.total, Counting.shared = 0, []
    made = []

    def make():
        Counting.total, Counting.shared = 0, []
        made.append(None)
        return _training(Counting())

    assert disturbance(make, way, lambda: (Counting.total, list(Counting.shared))) == []
    assert Counting.total == 3


class Drawing(nn.Module):
    """Draws from every kind of random generator."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.own = torch.Generator().manual_seed(3)
        self.own_numpy = np.random.default_rng(3)
        self.own_python = random.Random(3)

    def forward(self, x):
        noise = torch.randn(x.shape) + random.gauss(0, 1) + float(np.random.randn())
        own = torch.randn(x.shape, generator=self.own) + self.own_python.random()
        return self.layer(x + noise + own + float(self.own_numpy.normal()))


@ways
def test_random_generators(way):
    """Every generator goes on as if nothing had been drawn, also one of the model's own."""
    random.seed(4)
    state = random.getstate()

    def make():
        random.setstate(state)
        return _training(Drawing())

    # The state of its own generators at the forward is not known, so the gradients are others.
    ends = lambda: ()  # noqa: E731
    assert disturbance(make, way, ends, compares_gradients=False) == []


@ways
def test_the_same_random_numbers_are_drawn(way):
    """Dropout and noise are those of the training, from torch, Python and NumPy."""

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x):
            noise = random.gauss(0, 1) + float(np.random.randn()) + random.random()
            return nn.functional.dropout(self.layer(x + noise), 0.4)

    def make():
        random.seed(4)
        return _training(Noisy())

    assert disturbance(make, way) == []


OUTSIDE: list[float] = []
COUNT = 0


def _append_global(module, args, output):
    global COUNT  # noqa: PLW0603
    COUNT += 1
    OUTSIDE.append(float(output.detach().sum()))


class _Recorder:
    def __init__(self):
        self.means = {}
        self.calls = 0

    def see(self, module, args, output):
        self.calls += 1
        self.means.setdefault("all", []).append(float(output.detach().mean()))

    def __call__(self, module, args, output):
        self.calls += 1


@ways
def test_what_hooks_write(way):
    """Lists in closures, globals, defaults, partial arguments and objects get back what they held."""
    ends = {}

    def make():
        global COUNT  # noqa: PLW0603
        COUNT = 0
        OUTSIDE.clear()
        model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
        inside, given, count, moving = [], [], 0, torch.zeros(3)
        recorder, caller = _Recorder(), _Recorder()

        def closes(module, args, output, log=[]):  # noqa: B006
            nonlocal count
            count += 1
            inside.append(float(output.detach().sum()))
            log.append(count)
            moving.add_(output.detach().mean(0))
            ends["log"] = log
            ends["values"] = (count, moving)

        def gives(log, module, args, output):
            log.append(1)

        def before(module, args):
            return (args[0] * 2,)

        def incoming(module, grad_input, grad_output):
            inside.append(float(grad_output[0].sum()))

        model[2].register_forward_hook(closes)
        model[2].register_forward_hook(partial(gives, given))
        model[0].register_forward_hook(recorder.see)
        model[0].register_forward_hook(caller)
        model[0].register_forward_pre_hook(before)
        model[2].register_full_backward_hook(incoming)
        model.register_forward_hook(_append_global)
        closes_count = closes.__closure__
        ends.update(
            inside=inside, given=given, recorder=recorder, caller=caller, cells=closes_count
        )
        return _training(model)

    def extra():
        cells = [c.cell_contents for c in ends["cells"] if isinstance(c.cell_contents, int)]
        recorded = ends["recorder"].means, ends["recorder"].calls, ends["caller"].calls
        return list(OUTSIDE), COUNT, ends["inside"], ends["given"], cells, recorded, ends["log"]

    assert disturbance(make, way, extra) == []
    assert COUNT == 3


@ways
def test_global_hooks(way):
    """Hooks that torch calls for every module run, and what they write is put back."""
    sizes = []
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, output: sizes.append(type(module).__name__)
    )
    try:

        def make():
            sizes.clear()
            return _training(nn.Linear(6, 3))

        assert disturbance(make, way, lambda: sizes) == []
    finally:
        handle.remove()
    assert sizes == ["Linear"] * 3


@ways
def test_hooks_of_parameters_are_not_called(way):
    """Tensor hooks and post-accumulate hooks of the user see the training only."""
    seen = []

    def make():
        seen.clear()
        layer = nn.Linear(6, 3)
        layer.weight.register_hook(lambda gradient: seen.append(1))
        layer.bias.register_post_accumulate_grad_hook(lambda parameter: seen.append(2))
        return _training(layer)

    assert disturbance(make, way, lambda: seen) == []
    assert sorted(seen) == [1, 1, 1, 2, 2, 2]


class Writing(nn.Module):
    """Normalizes its weights in place in each forward, and clips its buffer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.register_buffer("scale", torch.ones(3))

    def forward(self, x):
        with torch.no_grad():
            self.layer.weight.div_(self.layer.weight.norm(dim=1, keepdim=True))
            self.scale = self.scale * 0.9
        return self.layer(x) * self.scale


@ways
def test_weights_that_the_forward_writes(way):
    """A forward that writes to parameters writes to the stand-ins, and replaces no buffer."""
    assert disturbance(lambda: _training(Writing()), way, compares_gradients=False) == []


class InPlace(nn.Module):
    """Changes its input in place."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x):
        x += 1
        return self.layer(x.mul_(2))


@ways
def test_an_input_that_is_changed_in_place(way):
    """The batch of the loop is as it was after the forward of the training."""
    batches = [torch.randn(4, 6) for _ in range(3)]
    start = [one.clone() for one in batches]

    def make():
        for one, then in zip(batches, start, strict=True):
            one.copy_(then)
        return _training(InPlace(), lambda step: batches[step])

    assert disturbance(make, way, lambda: batches, compares_gradients=False) == []


class Penalized(nn.Module):
    """Differentiates in its forward (a gradient penalty)."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x):
        x = x.detach().requires_grad_()
        y = self.layers(x)
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return y + slope.norm(dim=1, keepdim=True)


class _Cubed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradient


class WithFunction(nn.Module):
    """Has a custom autograd Function in it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x):
        return _Cubed.apply(self.layer(x))


class Stateful(nn.Module):
    """Carries a hidden state from batch to batch, with its graph cut off."""

    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(6, 3)
        self.hidden = None

    def forward(self, x):
        hidden = torch.zeros(len(x), 3) if self.hidden is None else self.hidden.detach()
        self.hidden = self.cell(x, hidden)
        return self.hidden


class Unregistered(nn.Module):
    """Has a layer that torch does not know of."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.hidden_layers = [nn.BatchNorm1d(6)]

    def forward(self, x):
        return self.layer(self.hidden_layers[0](x))


@ways
@pytest.mark.parametrize("model", [Penalized, WithFunction, Unregistered])
def test_further_models(model, way):
    """Double backward, custom Functions and layers in a plain list."""
    assert disturbance(lambda: _training(model()), way) == []


@ways
def test_a_hidden_state(way):
    """A state with a graph is the same tensor again."""
    assert disturbance(lambda: _training(Stateful()), way, compares_gradients=False) == []


def test_the_gradients_of_a_layer_in_a_plain_list():
    """Its parameters, of which no watcher knows, keep their gradients."""
    from gradwatch.replay.runs import run_closure
    from tests.replay.replayed import Seen

    model = Unregistered()
    loss = lambda: model(torch.randn(4, 6)).square().sum()  # noqa: E731
    loss().backward()
    norm = model.hidden_layers[0]
    before = norm.weight.grad.clone(), norm.running_mean.clone()
    run_closure(model, loss)(Seen())
    assert torch.equal(norm.weight.grad, before[0])
    assert torch.equal(norm.running_mean, before[1])


@ways
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_of_a_batch_norm_with_dropout(reentrant, way):
    """The forward that a checkpoint runs in the backward writes to the stand-ins as well."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter = nn.Linear(6, 6)
            self.block = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.3))

        def forward(self, x):
            return checkpoint(self.block, self.enter(x), use_reentrant=reentrant)

    assert disturbance(lambda: _training(Net()), way) == []


@ways
@pytest.mark.parametrize("inside", [False, True])
def test_autocast(inside, way):
    """A forward under autocast runs again under autocast, be it of the model's or of the loop's."""
    context = partial(torch.autocast, "cpu", torch.bfloat16)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x):
            if not inside:
                return self.first(self.last(self.first(x)))
            with context():
                return self.first(self.last(self.first(x)))

    make = lambda: _training(Net(), context=None if inside else context)  # noqa: E731
    assert disturbance(make, way) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of the compiler itself
@ways
@pytest.mark.parametrize("how", ["wrapper", "method", "part", "function"])
def test_compiled_models(how, way):
    """A compiled model runs uncompiled, and compiles nothing anew afterwards."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    def make():
        torch._dynamo.reset()
        compiled.clear()
        model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
        if how == "wrapper":
            return _training(torch.compile(model, backend=backend))
        if how == "method":
            model.compile(backend=backend)
        if how == "part":
            model[0] = torch.compile(model[0], backend=backend)
        if how == "function":
            inner = torch.compile(lambda x: x.sin(), backend=backend)
            model[1].forward = inner
        return _training(model)

    assert disturbance(make, way, lambda: len(compiled)) == []


class Mode(Enum):
    """Has a value that could be copied."""

    FAST = ["fast"]  # noqa: RUF012


class Cache:
    """What some models are given to keep keys in; it counts."""

    def __init__(self):
        self.length = 0
        self.keys = []
        self.mode = Mode.FAST


@ways
def test_an_argument_that_the_forward_writes_to(way):
    """An object, a list and a dict among the arguments are as the training has left them."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x, cache, log, named):
            cache.length += 1
            cache.keys.append(x.detach())
            assert cache.mode is Mode.FAST
            log.append(1)
            named[len(named)] = 1
            return self.layer(x)

    ends = []

    def make():
        ends[:] = [Cache(), [], {}]
        model, x = Net(), torch.randn(8, 6)
        return model, lambda step: model(x + step, *ends).square().mean()

    def extra():
        cache, log, named = ends
        return cache.length, cache.keys, log, named

    assert disturbance(make, way, extra) == []


class Stubborn(dict):
    """Cannot be cleared, nor written to as a dict is."""

    def clear(self):
        raise TypeError("no")

    def __setitem__(self, key, value):
        raise TypeError("no")


@ways
def test_containers_of_classes_of_their_own(way):
    """They are put back without their own methods."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 3)
            self.values = Stubborn(a=torch.zeros(1), b=1)

        def forward(self, x):
            dict.__setitem__(self.values, f"step {len(self.values)}", 1)
            self.values["a"].add_(1)
            return self.layer(x)

    assert disturbance(lambda: _training(Net()), way) == []


class Sampler:
    """Draws from a generator that it holds."""

    def __init__(self, generator):
        self.generator = generator

    def __call__(self):
        """Return a number."""
        return _drawn(self.generator)


def _drawn(generator):
    if isinstance(generator, torch.Generator):
        return torch.rand((), generator=generator).item()
    return float(generator.random())


GENERATORS = {
    "torch": lambda: torch.Generator().manual_seed(1),
    "numpy": lambda: np.random.default_rng(1),
    "old numpy": lambda: np.random.RandomState(1),
    "python": lambda: random.Random(1),
}
FORMS = {
    "argument": (lambda one: one, _drawn),
    "dict": (lambda one: {"of": [one]}, lambda given: _drawn(given["of"][0])),
    "object": (lambda one: Cache(), lambda given: _drawn(given.mode)),
    "function": (lambda one: lambda: _drawn(one), lambda given: given()),
    "callable object": (Sampler, lambda given: given()),
    "method": (lambda one: Sampler(one).__call__, lambda given: given()),
}


class Noised(nn.Module):
    """Is given what it draws from."""

    def __init__(self, draw):
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.draw = draw

    def forward(self, x, source):
        return self.layer(x) * self.draw(source)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", GENERATORS)
def test_a_generator_among_the_arguments(kind, form):
    """It goes on as if the replay had not drawn, and the replay says that it may draw others."""
    wrapped, draw = FORMS[form]
    ends = []

    def make():
        generator = GENERATORS[kind]()
        ends[:] = [generator]
        source = wrapped(generator)
        if form == "object":
            source.mode = generator
        model, x = Noised(draw), torch.randn(8, 6)
        return model, lambda step: model(x, source=source).square().mean()

    for way in WAYS:
        drawn = disturbance(make, way, lambda: _drawn(ends[0]), compares_gradients=False)
        assert drawn == []
    model, loss_of = make()
    with kept(model) as calls:
        loss_of(0).backward()
    assert run_calls(model, calls)(Seen()) == [OWN_GENERATOR]


@pytest.mark.parametrize(
    "generator",
    [torch.default_generator, np.random.mtrand._rand, random.getstate.__self__],
    ids=["torch", "numpy", "python"],
)
def test_a_global_generator_as_an_argument(generator):
    """Of it the state at the forward is known."""
    model, x = Noised(_drawn), torch.randn(8, 6)
    with kept(model) as calls:
        model(x, generator).square().mean().backward()
    seen = Seen()
    assert run_calls(model, calls)(seen) == []
    assert torch.equal(seen.gradients["layer.weight"], model.layer.weight.grad)


@ways
def test_what_else_an_argument_leads_to(way):
    """A module, a function that counts and one that writes to a tensor are as they were."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 3)

        def forward(self, x, norm, tick):
            return self.layer(norm(x)) + tick()

    ends = []

    def make():
        norm, counts, total = nn.BatchNorm1d(6), [], torch.zeros(())

        def tick():
            counts.append(1)
            return total.add_(1.0).item()

        ends[:] = [norm, counts, total]
        model, x = Net(), torch.randn(8, 6)
        return model, lambda step: model(x, norm, tick).square().mean()

    def extra():
        norm, counts, total = ends
        return norm.state_dict(), norm.weight.grad, counts, total

    assert disturbance(make, way, extra, compares_gradients=False) == []


ITERATORS = {
    "list": lambda: iter([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]),
    "enumerate": lambda: enumerate("abcdefg"),
    "generator": lambda: (i for i in range(9)),
}


class Taking(nn.Module):
    """Takes an item from what it is given."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x, items):
        next(items["of"])
        return self.layer(x)


@pytest.mark.parametrize("kind", ITERATORS)
def test_an_iterator_among_the_arguments(kind):
    """It is not moved on: a copy is, or nothing is run again."""
    model, items = Taking(), ITERATORS[kind]()
    with kept(model) as calls:
        model(torch.randn(8, 6), {"of": items}).square().mean().backward()
    run = run_calls(model, calls)
    if kind == "generator":
        with pytest.raises(ReplayError, match="cannot be put back"):
            run(Seen())
    else:
        (note,) = run(Seen())
        assert "of which the replay has taken the next ones" in note
    expected = ITERATORS[kind]()
    next(expected)
    assert next(items) == next(expected)
