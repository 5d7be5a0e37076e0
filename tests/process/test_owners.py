"""Which model the parameters of an optimizer belong to: decided for many shapes of programs."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.optim.swa_utils import AveragedModel

from gradwatch.measure.parameters import ParameterTable
from gradwatch.process.modules import NotedModules
from gradwatch.process.owners import owners_of
from tests.support.launch import mesh_of_one


class Net(nn.Module):
    """A model like most."""

    def __init__(self, width=3):
        super().__init__()
        self.first = nn.Linear(width, width)
        self.last = nn.Linear(width, 1)

    def forward(self, x):
        return self.last(self.first(x))


class Encoder(Net):
    """Another class of the same shape."""


class Decoder(Net):
    """And a third one."""


class Holder(nn.Module):
    """Holds modules under the given names, and calls each of them."""

    def __init__(self, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return [part(x) for part in self.children()]


@pytest.fixture(scope="module", autouse=True)
def _nothing_is_frozen():
    """The tests freeze what was imported (conftest.py); programs seldom do."""
    gc.unfreeze()
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(params=["searched", "noted"])
def noted(request):
    """Nothing that was noted, or all that the test builds: the answers are the same."""
    if request.param == "searched":
        yield None
        return
    modules = NotedModules()
    modules.attach()
    yield modules
    modules.close()


def _sgd(*of):
    """An optimizer of the parameters of modules, and of tensors."""
    parameters = [
        tensor
        for one in of
        for tensor in (one.parameters() if isinstance(one, nn.Module) else [one])
    ]
    return torch.optim.SGD(parameters, lr=0.1)


def _names(owner):
    return list(ParameterTable.of(owner.model()).names)


def _named(module):
    return [name for name, _ in module.named_parameters()]


# -- one model -------------------------------------------------------------------------------------


def test_a_model_is_the_owner_of_its_parameters(noted):
    """Its names are those of named_parameters(), and other models have no part in it."""
    net, other = Net(), Net()
    optimizer = _sgd(net)
    (owner,) = owners_of([optimizer], noted)
    assert owner.model() is net
    assert owner.label == "Net"
    assert owner.optimizers == [optimizer]
    assert _names(owner) == _named(net)
    assert owners_of([_sgd(other)], noted)[0].model() is other


class ActorCritic(nn.Module):
    """Is never called itself."""

    def __init__(self):
        super().__init__()
        self.actor = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
        self.critic = nn.Sequential(nn.Linear(2, 1))


class Classifier(nn.Module):
    """The head is trained, the rest is frozen."""

    def __init__(self):
        super().__init__()
        self.backbone = Net().requires_grad_(False)
        self.head = nn.Linear(1, 1)

    def forward(self, x):
        return self.head(self.backbone(x))


class Tied(nn.Module):
    """Two of its modules share a weight."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(4, 2)
        self.out = nn.Linear(2, 4, bias=False)
        self.out.weight = self.embed.weight


class Training(nn.Module):
    """Like a LightningModule: is not called, and has more than the model."""

    def __init__(self):
        super().__init__()
        self.model = Net()
        self.teacher = Net()
        self.loss = nn.MSELoss()

    def training_step(self, batch):
        return self.loss(self.model(batch), self.teacher(batch))


class WithLoss(nn.Module):
    """Computes the loss of a model, and is what the loop calls."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).mean()


def _lora():
    net = Net().requires_grad_(False)
    net.first.down = nn.Linear(3, 1)
    net.first.up = nn.Linear(1, 3)
    return net, [net.first.down, net.first.up]


def _weight_normed():
    net = Net()
    parametrizations.weight_norm(net.first)
    return net, [net]


def _in_place_of_a_module():
    net = nn.Module()
    net.body = Net()
    return net, [net]


class Calls(Net):
    """Has a __call__ of its own, which runs the forward."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(1, 1))
        del self.first, self.last

    def __call__(self, x):
        return super().__call__(x)

    def forward(self, x):
        return self.inner(x)


class CallsAlone(nn.Module):
    """Has a __call__ instead of a forward, and holds more than one part."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(1, 1), nn.Linear(1, 1)

    def __call__(self, x):
        return self.two(self.one(x))


class CallsItsChild(nn.Module):
    """Has a __call__ instead of a forward, as in other libraries, around all that it holds."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, 1), nn.Tanh())

    def __call__(self, x):
        return self.layers(x)


def _of(module):
    return module, [module]


ONE_MODEL = {
    "sequential": lambda: _of(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))),
    "one layer": lambda: _of(nn.Linear(2, 2)),
    "without forward": lambda: _of(ActorCritic()),
    "parts are frozen": lambda: _of(Classifier()),
    "the head alone": lambda: (m := Classifier(), [m.head]),
    "one group of the optimizer is a part": lambda: (m := Net(), [m.last, m.first]),
    "tied weights": lambda: _of(Tied()),
    "a framework's module around it": lambda: (m := Training(), [m.model]),
    "a module with the loss around it": lambda: (m := WithLoss(Net()), [m.model]),
    "adapters inside of a frozen model": _lora,
    "parametrized": _weight_normed,
    "a bare nn.Module": _in_place_of_a_module,
    "an own __call__ that runs forward": lambda: _of(Calls()),
    "an own __call__ that is the forward": lambda: _of(CallsItsChild()),
    "an own __call__ around several parts": lambda: _of(CallsAlone()),
    "an ensemble": lambda: (m := Holder(a=Net(), b=Net()), [m.b]),
    "a bare container of parts": lambda: _of(nn.ModuleDict({"g": Net(), "d": Net()})),
    "parameters alone": lambda: _of(nn.ParameterList([torch.zeros(2), torch.ones(1)])),
    "a deep copy": lambda: _of(copy.deepcopy(Net())),
    "unpickled": lambda: _of(pickle.loads(pickle.dumps(Net()))),
}


@pytest.mark.parametrize("shape", ONE_MODEL)
def test_the_outermost_module_is_the_model(shape, noted):
    """Whatever part of it is trained, the names are those of the whole."""
    model, trained = ONE_MODEL[shape]()
    (owner,) = owners_of([_sgd(*trained)], noted)
    assert owner.model() is model
    assert _names(owner) == _named(model)
    assert owner.label == type(model).__name__


# -- what is around a model, and is not the model --------------------------------------------------


class Facade(nn.Module):
    """Offers training and prediction: its __call__ predicts, and runs no forward."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def __call__(self, source):
        return self.predict(source)

    def predict(self, source):
        return self.model(source)


class Predictor(nn.Module):
    """Calls the model, but not to train it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def __call__(self, x):
        with torch.no_grad():
            return self.model(x)


class CalledAverage(nn.Module):
    """A mean of the weights with a __call__ of its own."""

    def __init__(self, model):
        super().__init__()
        self.online = model
        self.mean = copy.deepcopy(model).requires_grad_(False)

    def __call__(self, x):
        return self.mean(x)


class Criterion(nn.modules.loss._Loss):
    """A loss that looks at the weights of the model."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, output):
        return output.mean() + sum(p.norm() for p in self.model.parameters())


class Average(nn.Module):
    """A mean of the weights, with the model itself beside it."""

    def __init__(self, model):
        super().__init__()
        self.online = model
        self.mean = copy.deepcopy(model).requires_grad_(False)

    def forward(self, x):
        return self.mean(x)


class PassesOn(nn.Module):
    """Holds the model twice, once in a wrapper to be called."""

    def __init__(self, model):
        super().__init__()
        self.called = torch.compile(model, backend="eager")
        self.original = model

    def forward(self, x):
        return self.called(x)


AROUND = {
    "an object that trains": Facade,
    "an object that predicts": Predictor,
    "a loss": Criterion,
    "a mean that is called": CalledAverage,
    "a moving average": Average,
    "a wrapper with two names": PassesOn,
    "a list": lambda model: nn.ModuleList([model]),
    "a dict": lambda model: nn.ModuleDict({"model": model, "other": Net()}),
    "torch's average": AveragedModel,
}


@pytest.mark.parametrize("what", AROUND)
def test_what_is_around_a_model_is_not_the_model(what, noted):
    """Names do not begin with what it calls the model."""
    model = Net()
    around = AROUND[what](model)
    (owner,) = owners_of([_sgd(model)], noted)
    assert owner.label == "Net"
    assert _names(owner) == _named(model)
    del around


def test_a_pair_of_networks_that_are_called_is_no_average(noted):
    """Teacher and student, online and target network: the module around them is the model."""
    pair = Holder(online=Net(), target=Net().requires_grad_(False))
    (owner,) = owners_of([_sgd(pair.online)], noted)
    assert owner.model() is pair


def test_several_modules_around_a_model_leave_it_to_itself(noted):
    """None of two that hold it is in the other: the names are those of the model."""
    student = Net()
    around = [Holder(student=student, teacher=Net()), Holder(module=student, head=Net())]
    (owner,) = owners_of([_sgd(student)], noted)
    assert owner.model() is student
    del around


def test_a_wrapper_of_torch_adds_nothing_to_names(noted):
    """The names are those of the module inside, and so is the label."""
    model = Net()
    compiled = torch.compile(model, backend="eager")
    parallel = nn.DataParallel(compiled)
    for optimizer in (_sgd(model), _sgd(parallel)):
        (owner,) = owners_of([optimizer], noted)
        assert owner.model() is parallel
        assert owner.label == "Net"
        assert _names(owner) == _named(model)


def test_a_wrapper_that_is_dropped_leaves_the_model(noted):
    """A compiled module that nobody kept may have been the outermost when it was looked for."""
    model = Net()
    wrapper = nn.DataParallel(model)
    (owner,) = owners_of([_sgd(model)], noted)
    del wrapper
    gc.collect()
    assert owner.model() is model


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_scripted_model_has_the_label_of_its_source(noted):
    """It shares the parameters of its source; one that was loaded has none."""
    scripted, file = torch.jit.script(source := Net()), io.BytesIO()
    (owner,) = owners_of([_sgd(scripted)], noted)
    assert owner.model() is source
    torch.jit.save(scripted, file)
    file.seek(0)
    loaded = torch.jit.load(file)
    optimizer = _sgd(loaded)
    (owner,) = owners_of([optimizer], noted)
    assert owner.model() is loaded
    assert owner.label == "Net"
    assert _names(owner) == _named(loaded)


@pytest.mark.skipif(torch.__version__ < "2.9", reason="FSDP2 on CPUs needs torch 2.9 or newer")
@pytest.mark.parametrize("gathered", [False, True])
def test_fsdp_gathers_other_tensors_than_the_optimizer_holds(gathered, noted):
    """After a forward the outermost module holds the gathered ones: it is the owner all the same."""
    from torch.distributed.fsdp import fully_shard

    with mesh_of_one() as mesh:
        model = Net()
        fully_shard(model.first, mesh=mesh)
        fully_shard(model, mesh=mesh)
        optimizer = _sgd(model)
        if gathered:
            model(torch.ones(2, 3))
            assert {id(p) for p in model.parameters()} != set(map(id, _held(optimizer)))
        (owner,) = owners_of([optimizer], noted)
        assert owner.model() is model
        assert owner.label == "Net"
        assert _names(owner) == _named(model)


def _held(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


# -- several optimizers ----------------------------------------------------------------------------


def test_two_models_have_two_owners(noted):
    """Generator and discriminator, each with its optimizer, in the order of the optimizers."""
    generator, discriminator = Encoder(), Decoder()
    optimizers = [_sgd(discriminator), _sgd(generator)]
    first, second = owners_of(optimizers, noted)
    assert (first.model(), second.model()) == (discriminator, generator)
    assert (first.optimizers, second.optimizers) == ([optimizers[0]], [optimizers[1]])


def test_optimizers_of_one_model_share_its_owner(noted):
    """Also if one of them has all that the other one has."""
    gan = Holder(generator=Net(), discriminator=Net())
    optimizers = [_sgd(gan.generator), _sgd(gan.discriminator), _sgd(gan)]
    (owner,) = owners_of(optimizers, noted)
    assert owner.model() is gan
    assert owner.optimizers == optimizers


def test_models_that_share_trained_parameters_have_one_owner(noted):
    """A tensor can be watched only once."""
    actor, critic = Encoder(), Decoder()
    critic.first = actor.first
    optimizers = [_sgd(actor.last), _sgd(critic)]
    (owner,) = owners_of(optimizers, noted)
    assert owner.optimizers == optimizers
    assert _names(owner)[:2] == ["encoder.first.weight", "encoder.first.bias"]
    assert owner.label == "Encoder-Decoder"


def test_models_that_share_what_is_frozen_have_two_owners(noted):
    """Nobody trains what they share."""
    backbone = Net().requires_grad_(False)
    models = [Holder(backbone=backbone, head=nn.Linear(1, 1)) for _ in range(2)]
    owners = owners_of([_sgd(one.head) for one in models], noted)
    assert [owner.model() for owner in owners] == models


def test_the_same_optimizer_twice_counts_once(noted):
    """And one without parameters has no owner."""
    optimizer = _sgd(net := Net())
    (owner,) = owners_of([optimizer, torch.optim.SGD([{"params": []}]), optimizer], noted)
    assert owner.model() is net
    assert owner.optimizers == [optimizer]


def test_a_copied_optimizer_belongs_to_the_copied_model(noted):
    """Copies escape the constructor of either."""
    pair = Net(), None
    pair = pair[0], _sgd(pair[0])
    model, optimizer = copy.deepcopy(pair)
    (owner,) = owners_of([optimizer], noted)
    assert owner.model() is model
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    model, optimizer = torch.load(file, weights_only=False)
    (owner,) = owners_of([optimizer], noted)
    assert owner.model() is model


class SAM(torch.optim.Optimizer):
    """Steps the optimizer inside of it."""

    def __init__(self, parameters, runs_hooks=True):
        inner = torch.optim.SGD(parameters, lr=0.1)
        if runs_hooks:
            super().__init__(inner.param_groups, {})
        self.base_optimizer = inner
        self.param_groups = inner.param_groups

    def step(self, closure=None):
        self.base_optimizer.step(closure)


def test_the_outer_one_of_two_optimizers_is_the_one_to_watch(noted):
    """In whatever order they are given."""
    outer = SAM(list((net := Net()).parameters()))
    for given in ([outer, outer.base_optimizer], [outer.base_optimizer, outer]):
        (owner,) = owners_of(given, noted)
        assert owner.model() is net
        assert owner.optimizers == [outer]


def test_a_wrapper_without_step_hooks_stands_for_what_is_in_it(noted):
    """As in watch(model, wrapper)."""
    outer = SAM(list((net := Net()).parameters()), runs_hooks=False)
    (owner,) = owners_of([outer], noted)
    assert owner.model() is net
    assert owner.optimizers == [outer.base_optimizer]


# -- several models in one optimizer, and parameters in none ---------------------------------------


def test_several_models_in_one_optimizer_have_names_with_prefixes(noted):
    """In the order in which the optimizer has them; two of one class are numbered."""
    encoder, decoder = Encoder(), Decoder()
    (owner,) = owners_of([_sgd(decoder, encoder)], noted)
    assert owner.label == "Decoder-Encoder"
    assert _names(owner) == [f"decoder.{name}" for name in _named(decoder)] + [
        f"encoder.{name}" for name in _named(encoder)
    ]
    pair = [Net(), Net()]
    (owner,) = owners_of([_sgd(*pair)], noted)
    assert owner.label == "Net"
    assert _names(owner) == [f"net_{i}.{name}" for i in (1, 2) for name in _named(pair[0])]


def test_a_parameter_that_no_module_holds_is_named_by_its_place(noted):
    """After its group and position; the names of the model stay as they are."""
    net, scale = Net(), torch.ones(2, requires_grad=True)
    bias = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": net.parameters()}, {"params": [scale, bias]}], lr=0.1)
    (owner,) = owners_of([optimizer], noted)
    assert owner.label == "Net"
    assert _names(owner) == [*_named(net), "param_groups[1][0]", "param_groups[1][1]"]
    assert ParameterTable.of(owner.model()).tensors[-2] is scale


def test_parameters_without_a_module_have_an_owner(noted):
    """Its label is the class of the optimizer; plain leaf tensors are parameters as well."""
    tensors = [torch.ones(2, requires_grad=True), nn.Parameter(torch.zeros(1))]
    (owner,) = owners_of([torch.optim.Adam(tensors)], noted)
    assert owner.label == "Adam"
    assert _names(owner) == ["param_groups[0][0]", "param_groups[0][1]"]


def test_parameters_of_two_optimizers_have_different_names(noted):
    """The second one's have a number."""
    net = Net()
    a, b = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    optimizers = [_sgd(a, net), _sgd(b, net.last)]
    (owner,) = owners_of(optimizers, noted)
    assert _names(owner) == [*_named(net), "param_groups[0][0]", "param_groups[0][0]#2"]


def test_parameters_that_the_model_has_replaced_are_nobodys(noted):
    """The optimizer was built before: what it still holds of the model keeps its name."""
    net = Net()
    optimizer = _sgd(net)
    net.last = nn.Linear(3, 1)
    (owner,) = owners_of([optimizer], noted)
    assert _names(owner) == [*_named(net), "param_groups[0][2]", "param_groups[0][3]"]


def test_our_own_container_is_no_owner(noted):
    """It may be alive when the next optimizer is built."""
    encoder, decoder, loose = Encoder(), Decoder(), torch.ones(1, requires_grad=True)
    (owner,) = owners_of([_sgd(encoder, decoder, loose)], noted)
    container = owner.model()
    (again,) = owners_of([_sgd(encoder, decoder, loose)], noted)
    assert again.model() is not container
    assert _names(again) == _names(owner)
    assert owners_of([_sgd(encoder)], noted)[0].model() is encoder


# -- lifetime --------------------------------------------------------------------------------------


@pytest.fixture
def _no_collection():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("_no_collection")
def test_an_owner_keeps_nothing_alive(noted):
    """What the program drops is gone at once, without the collector."""
    net, loose = Net(), torch.ones(1, requires_grad=True)
    single, several = _sgd(net), _sgd(Encoder(), loose)
    encoder = owners_of([several], noted)
    (one,) = owners_of([single], noted)
    assert encoder[0].label == "SGD"  # nobody has kept the encoder
    gone = [weakref.ref(x) for x in (net, net.first.weight, loose, single, several)]
    del net, loose, single, several
    assert [ref() for ref in gone] == [None] * len(gone)
    assert one.model() is None
    assert one.optimizers == []
    assert encoder[0].model() is None


@pytest.mark.usefixtures("_no_collection")
def test_a_container_lives_as_long_as_its_caller_holds_it(noted):
    """It is made anew at each call, of what still exists."""
    encoder, decoder = Encoder(), Decoder()
    (owner,) = owners_of([_sgd(encoder, decoder)], noted)
    names = _named(decoder)
    del encoder
    assert _names(owner) == [f"decoder.{name}" for name in names]
    del decoder
    assert owner.model() is None


# -- how modules are found -------------------------------------------------------------------------


def test_what_gc_freeze_has_set_aside_is_found():
    """The collector does not list it; it is reached from the variables of this function."""
    net = Holder(model=Net())
    optimizer = _sgd(net)
    gone = weakref.ref(net.model.last)
    gc.collect()
    gc.freeze()
    try:
        (owner,) = owners_of([optimizer])
        assert owner.model() is net
        del net, optimizer
        assert gone() is None  # and no snapshot of the variables keeps it
    finally:
        gc.unfreeze()


def test_locals_that_the_program_holds_stay():
    """A function may have kept what locals() returned."""
    kept = locals()
    net = Net()
    optimizer = _sgd(net)
    kept["own"] = 1
    gc.freeze()
    try:
        owners_of([optimizer])
    finally:
        gc.unfreeze()
    assert kept["own"] == 1


def test_what_was_built_before_is_found_around_what_was_noted():
    """An adapter that is put into a copied model is not the model."""
    base = copy.deepcopy(Net())
    noted = NotedModules()
    noted.attach()
    try:
        base.first.adapter = nn.Sequential(nn.Linear(3, 3))
        (owner,) = owners_of([_sgd(base.first.adapter)], noted)
        assert owner.model() is base
        assert not noted.knows(base.first)
        assert noted.knows(base.first.adapter)
    finally:
        noted.close()


def test_all_objects_are_looked_at_only_where_the_noted_do_not_tell(monkeypatch):
    """What was built under watch_all, and whole, needs no search."""
    searches = []
    monkeypatch.setattr("gradwatch.process.owners.all_modules", lambda: searches.append(1) or [])
    noted = NotedModules()
    noted.attach()
    try:
        net = Holder(a=Net(), b=nn.DataParallel(Net()))
        assert owners_of([_sgd(net.a), _sgd(net.b)], noted)[0].model() is net
        assert not searches
        owners_of([_sgd(torch.ones(1, requires_grad=True))], noted)
        assert len(searches) == 1
    finally:
        noted.close()


def test_noted_modules_are_held_weakly_and_forgotten():
    """They live as long as the program holds them; after close() nothing is noted."""
    noted = NotedModules()
    noted.attach()
    net = Net()
    assert noted.modules()
    gc.collect()
    gc.disable()
    try:
        del net
        assert noted.modules() == []
    finally:
        gc.enable()
    noted.close()
    later = Net()
    assert noted.modules() == []
    del later


def test_a_module_may_define_equality_and_be_unhashable(noted):
    """It is known by its identity."""

    class Equal(Net):
        def __eq__(self, other):
            raise RuntimeError

        __hash__ = None

    net = Equal()
    parameters = [*net.first.parameters(), *net.last.parameters()]
    (owner,) = owners_of([torch.optim.SGD(parameters)], noted)
    assert owner.model() is net


def test_a_label_can_be_the_name_of_a_folder(noted):
    """Classes may have any name."""
    kind = type("Net[int]/../x", (Net,), {})
    (owner,) = owners_of([_sgd(net := kind())], noted)
    assert owner.label == "Net_int_.._x"
    del net


def test_a_parametrized_root_keeps_its_name(noted):
    """torch derives a class for it."""

    class Symmetric(nn.Module):
        def forward(self, x):
            return x + x.T

    net = nn.Linear(2, 2)
    parametrize.register_parametrization(net, "weight", Symmetric())
    (owner,) = owners_of([_sgd(net)], noted)
    assert owner.label == "Linear"
    assert _names(owner) == _named(net)
