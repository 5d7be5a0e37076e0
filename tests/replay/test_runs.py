"""What a run tells the observer: names, gradients, notes; and that it runs what the training ran."""

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gradwatch
from gradwatch.hooks.context import ForwardContext
from gradwatch.replay.runs import run_calls, run_closure
from gradwatch.replay.search import explain_run
from gradwatch.replay.stand_ins import ReplayError
from tests.replay.replayed import Seen, kept
from tests.support import zoo
from tests.support.state import differences, pieces

X = torch.linspace(-1, 1, 32).reshape(8, 4)


def _named(seen):
    return [name for name, _ in seen.inputs]


def _gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def _assert_same_gradients(model, seen):
    assert list(differences(pieces(_gradients(model)), pieces(seen.gradients))) == []


# -- names -----------------------------------------------------------------------------------------


def test_modules_parameters_and_buffers_have_the_names_of_the_model():
    """They are those of named_modules(), named_parameters() and named_buffers()."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with kept(model) as calls:
        model(X).sum().backward()
    seen = Seen()
    run_calls(model, calls)(seen)
    assert seen.modules == dict(model.named_modules())
    assert list(seen.parameters) == [name for name, _ in model.named_parameters()]
    assert list(seen.buffers) == [name for name, _ in model.named_buffers()]
    assert list(seen.gradients) == list(seen.parameters)
    assert set(seen.callers) == {("loop.py", 7)}
    assert not any(seen.parameters[name] is one for name, one in model.named_parameters())


@dataclass
class Pair:
    left: Tensor
    right: Any


class Batch:
    """As torch_geometric's: attributes, and a method to move them."""

    def __init__(self, **tensors):
        vars(self).update(tensors)

    def to(self, device):
        return self


class Slotted:
    __slots__ = ("image",)


Named = namedtuple("Named", ["first", "second"])


class Takes(nn.Module):
    """Adds up all tensors that it is given."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, batch, *rest, scale=None, **more):
        total = sum(_tensors((batch, rest, scale, more)))
        return self.layer(total)


def _tensors(value):
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for one in value.values() for t in _tensors(one)]
    if isinstance(value, (list, tuple)):
        return [t for one in value for t in _tensors(one)]
    if isinstance(value, Slotted):
        return [value.image]
    return _tensors(vars(value)) if hasattr(value, "__dict__") else []


def _slotted():
    batch = Slotted()
    batch.image = X.clone()
    return batch


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (((X,), {}), ["batch"]),
        (((X, X + 1, X + 2), {}), ["batch", "rest[0]", "rest[1]"]),
        (((X,), {"scale": X + 1, "other": X + 2}), ["batch", "scale", "other"]),
        ((({"image": X, "n": 3, "more": [X + 1]},), {}), ["batch['image']", "batch['more'][0]"]),
        (((Pair(X, {"b": X + 1}),), {}), ["batch.left", "batch.right['b']"]),
        (((Batch(x=X, name="a", y=(X + 1,)),), {}), ["batch.x", "batch.y[0]"]),
        (((Named(X, X + 1),), {}), ["batch.first", "batch.second"]),
        (((_slotted(),), {}), ["batch.image"]),
        (((X, X), {"scale": X}), ["batch"]),
    ],
)
def test_the_names_of_inputs(given, names):
    """They are what the forward calls them, with keys, indices and attributes; each once."""
    args, kwargs = given
    model = Takes()
    with kept(model) as calls:
        model(*args, **kwargs).square().sum().backward()
    seen = Seen()
    assert run_calls(model, calls)(seen) == []
    assert _named(seen) == names
    assert all(one.data_ptr() != X.data_ptr() for _, one in seen.inputs)
    _assert_same_gradients(model, seen)


def test_inputs_without_a_signature():
    """Where the signature does not tell, an input is called by its position."""

    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)
            self.forward = map_of(self.layer)

    class map_of:
        __signature__ = "none"

        def __init__(self, layer):
            self.layer = layer

        def __call__(self, *given):
            return self.layer(given[0] + given[1])

    model = Bare()
    with kept(model) as calls:
        model(X, X + 1).sum().backward()
    seen = Seen()
    run_calls(model, calls)(seen)
    assert _named(seen) == ["args[0]", "args[1]"]


def test_an_input_keeps_its_kind():
    """A copy requires a gradient as the original does, and is a leaf only if that is one."""
    weight = torch.ones(4, requires_grad=True)
    inputs = (X, X.clone().requires_grad_(), X * weight)
    model = Takes()
    with kept(model) as calls:
        model(*inputs).sum().backward(retain_graph=True)
    before = [one.grad for one in inputs[:2]], weight.grad.clone()
    seen = Seen()
    run_calls(model, calls)(seen)
    flags = [(one.requires_grad, one.is_leaf) for _, one in seen.inputs]
    assert flags == [(False, True), (True, True), (True, False)]
    assert inputs[1].grad is before[0][1]
    assert torch.equal(weight.grad, before[1])


def test_a_computed_input_may_be_written_to():
    """A forward that changes its input in place can do so if that was computed, as in training."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x):
            return self.layer(x.mul_(2))

    model, weight = Net(), torch.ones(4, requires_grad=True)
    with kept(model) as calls:
        model(X * weight).sum().backward()
    assert run_calls(model, calls)(Seen()) != []  # it says that the values are others


# -- the backward ----------------------------------------------------------------------------------


def test_several_forwards_before_one_backward():
    """A siamese network runs both forwards, and one backward for both."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    with kept(model) as calls:
        (model(X) - model(X + 1)).square().sum().backward()
    assert len(calls) == 2
    seen = Seen()
    assert run_calls(model, calls)(seen) == []
    assert seen.begun == 1
    assert len(seen.outputs) == 2
    _assert_same_gradients(model, seen)


class WithLoss(nn.Module):
    """Returns logits and a loss of them, as many models do."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x):
        logits = self.layer(x)
        return {"logits": logits, "again": logits, "loss": logits.square().mean(), "n": len(x)}


@pytest.mark.parametrize("outside", [0.0, 0.5])
def test_outputs_that_come_of_each_other(outside):
    """What a loss gives to logits is not given twice; what came from outside is."""
    model = WithLoss()
    with kept(model) as calls:
        output = model(X)
        loss = output["loss"] + (outside * output["logits"].sum() if outside else 0)
        loss.backward()
    seen = Seen()
    assert run_calls(model, calls)(seen) == []
    starts = [None if one is None else float(one.sum()) for one in seen.starts]
    assert starts == [8.0, 8.0, 1.0] if outside else [None, None, 1.0]
    for name, gradient in _gradients(model).items():
        torch.testing.assert_close(seen.gradients[name], gradient)


def test_a_nan_of_the_loss_is_no_gradient_from_outside():
    """If the loss inside of the model makes NaN, none of it is in what the backward starts from."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x):
            logits = self.layer(x)
            return logits, (logits * 0).sqrt().sum()

    model = Net()
    with kept(model) as calls:
        model(X)[1].backward()
    assert bool(model.layer.weight.grad.isnan().any())
    seen = Seen()
    run_calls(model, calls)(seen)
    assert seen.starts[0] is None
    assert seen.starts[1].item() == 1
    assert bool(seen.gradients["layer.weight"].isnan().any())


def test_outputs_without_a_gradient():
    """Where no gradient has arrived, only the forward runs, and a note says so."""
    model = zoo.small()
    with kept(model) as calls:
        model(X)
    seen = Seen()
    (note,) = run_calls(model, calls)(seen)
    assert "only its forward was run" in note
    assert seen.begun == 1
    assert seen.starts == [None]
    assert set(seen.gradients.values()) == {None}


def test_outputs_of_another_shape():
    """If the replay returns other shapes, there is no backward, and a note says so."""
    model = zoo.small()
    with kept(model) as calls:
        model(X).sum().backward()
    calls[0].gradients[0][0] = torch.ones(3)
    seen = Seen()
    (note,) = run_calls(model, calls)(seen)
    assert "other shapes" in note
    assert set(seen.gradients.values()) == {None}


def test_an_input_that_has_changed_since():
    """A batch that the loop overwrites after the forward is named."""
    model, x = Takes(), X.clone()
    with kept(model) as calls:
        model({"image": x, "other": X}).sum().backward()
    assert run_calls(model, calls)(Seen()) == []
    x.zero_()
    (note,) = run_calls(model, calls)(Seen())
    assert note.startswith("batch['image'] was changed in place after the forward")


def test_a_run_can_be_repeated():
    """Each time it runs exactly alike."""
    case = zoo.make_case("cnn", dropout=0.5)
    with kept(case.model) as calls:
        case.loss(case.model, case.batch(0)).backward()
    run = run_calls(case.model, calls)
    first, second = Seen(), Seen()
    assert run(first) == run(second)
    assert first.calls == second.calls
    assert list(differences(pieces(first.gradients), pieces(second.gradients))) == []


# -- closures --------------------------------------------------------------------------------------


def test_a_closure_with_a_scale():
    """The backward of the loss starts from the scale."""
    model = zoo.small()
    loss_of = lambda: model(X).square().mean()  # noqa: E731
    loss_of().backward()
    seen = Seen()
    assert run_closure(model, loss_of, scale=4.0)(seen) == []
    assert [float(one) for one in seen.starts] == [4.0]
    assert [one.shape for one in seen.outputs] == [torch.Size([])]
    for name, gradient in _gradients(model).items():
        assert torch.equal(seen.gradients[name], gradient * 4)


def test_the_variables_of_a_closure_are_inputs():
    """What the closure calls its tensors is how they are named."""
    model, batch, target = zoo.small(), {"image": X, "length": 3}, torch.zeros(8, 1)
    seen = Seen()
    run_closure(model, lambda: (model(batch["image"]) - target).square().mean())(seen)
    assert sorted(_named(seen)) == ["batch['image']", "target"]


def test_the_random_numbers_of_a_closure():
    """A closure runs in the context that it is given."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    context = ForwardContext.now()
    loss_of = lambda: model(X).square().sum()  # noqa: E731
    loss_of().backward()
    seen = Seen()
    run_closure(model, loss_of, context=context)(seen)
    _assert_same_gradients(model, seen)


def _backward_of_a_scaled_loss(model, loss):
    (loss * 8).backward()
    return loss


def _returns_a_number(model, loss):
    loss.backward()
    return loss.item()


def _returns_it_detached(model, loss):
    loss.backward()
    return loss.detach()


def _through_the_function(model, loss):
    torch.autograd.backward([loss])
    return loss


_BACKWARD = torch.autograd.backward


def _through_a_name_of_its_own(model, loss):
    _BACKWARD(loss)
    return loss


@pytest.mark.parametrize(
    "end",
    [
        _backward_of_a_scaled_loss,
        _returns_a_number,
        _returns_it_detached,
        _through_the_function,
        _through_a_name_of_its_own,
    ],
)
def test_a_closure_that_runs_its_backward(end):
    """The gradients are taken as the closure has made them, and it has no second backward."""
    model = zoo.small()
    closure = lambda: end(model, model(X).square().mean())  # noqa: E731
    closure()
    kept_gradients = {name: one.clone() for name, one in _gradients(model).items()}
    seen = Seen()
    run_closure(model, closure)(seen)
    assert seen.begun == 1
    assert list(differences(pieces(kept_gradients), pieces(seen.gradients))) == []
    assert list(differences(pieces(kept_gradients), pieces(_gradients(model)))) == []


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_closure_that_resets_gradients(set_to_none):
    """The gradients of the training are the very same tensors afterwards."""
    model = zoo.small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(X).sum().backward()
    before = [(one.grad, one.grad.clone(), one.grad._version) for one in model.parameters()]

    def closure():
        optimizer.zero_grad(set_to_none=set_to_none)
        return model(X).square().mean()

    run_closure(model, closure)(Seen())
    for parameter, (gradient, values, version) in zip(model.parameters(), before, strict=True):
        assert parameter.grad is gradient
        assert torch.equal(gradient, values)
        assert gradient._version == version


def test_a_mapping_of_tensors():
    """Where the model is a mapping, the closure's tensors are replaced by name."""
    w = torch.ones(4, requires_grad=True)
    loss_of = lambda: (X * w).square().sum()  # noqa: E731
    loss_of().backward()
    gradient = w.grad.clone()
    seen = Seen()
    run_closure({"w": w}, loss_of)(seen)
    assert torch.equal(seen.gradients["w"], gradient)
    assert torch.equal(w.grad, gradient)


@pytest.mark.parametrize("value", [None, 1.0, torch.ones(())])
def test_a_closure_that_returns_no_loss(value):
    """It is told what is missing."""
    with pytest.raises(ReplayError, match="must return the loss"):
        run_closure(zoo.small(), lambda: value)(Seen())


# -- what the forward has left ---------------------------------------------------------------------


class Centered(nn.Module):
    """Subtracts a running mean, which a NaN in the batch would poison."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.register_buffer("mean", torch.ones(4))
        self.newest = torch.zeros(4)

    def forward(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        self.newest = x.detach()[0] / self.mean
        return self.layer((x - self.mean).sqrt())


class WithMeans(Seen):
    """Notes what the buffer holds when it is named."""

    def name_buffer(self, tensor, name):
        self.buffers[name] = tensor.clone()


def test_buffers_hold_what_they_held_before_the_forward():
    """A watcher's copies of the buffers are used, also where the forward has replaced the buffer."""
    model = Centered()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.watch(model, optimizer, on_nonfinite="skip") as watcher:
        with kept(model) as calls:
            model(X + float("nan")).sum().backward()
        before = watcher._run.hooks.buffers.before_window()
        seen = WithMeans()
        assert run_calls(model, calls, before)(seen) == []
        assert seen.buffers["mean"].tolist() == [1, 1, 1, 1]
        assert bool(model.mean.isnan().all())
    with gradwatch.watch(model, optimizer) as watcher:
        assert watcher._run.hooks.buffers.before_window() == {}


def test_a_buffer_that_is_nan_since_the_forward():
    """Where nothing was copied it is run as it is, and what it held before is said not to be known."""
    model = Centered()
    with kept(model) as calls:
        model(X + float("nan")).sum().backward()
    seen = WithMeans()
    assert run_calls(model, calls)(seen) == []
    assert bool(seen.buffers["mean"].isnan().all())
    assert seen.doubtful == {"mean", "newest"}
    found = explain_run(run_calls(model, calls))
    assert found.origin == "not_found"
    assert found.notes[0].startswith("mean, which the forward writes to, is bad by now.")


def test_an_input_that_the_model_keeps():
    """A batch that the model has put into an attribute is still the batch that it was given."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x):
            self.x = x
            return self.layer(self.x)

    model, x = Net(), X + float("nan")
    with kept(model) as calls:
        model(x).sum().backward()
    for run in (run_calls(model, calls), run_closure(model, lambda: model(x).sum(), buffers={})):
        seen = Seen()
        run(seen)
        assert _named(seen) == ["x"]
        assert bool(seen.gradients["layer.weight"].isnan().all())


def test_the_weights_of_a_cached_parametrization():
    """A replay inside of cached() computes its weights from the stand-ins."""
    model = nn.utils.parametrizations.weight_norm(nn.Linear(4, 2))
    with nn.utils.parametrize.cached():
        loss = model(X).sum()
        seen = Seen()
        run_closure(model, lambda: model(X).sum())(seen)
        assert model.parametrizations.weight.original0.grad is None
        loss.backward()  # its graph is still there
    _assert_same_gradients(model, seen)


def test_hooks_on_a_wrapper():
    """What a hook on a wrapper makes of the output is part of the computation."""
    inner = nn.Linear(4, 2)
    model = nn.DataParallel(inner)
    model.register_forward_hook(lambda module, args, output: output * 3)
    with kept(model) as calls:
        model(X).sum().backward()
    seen = Seen()
    run_calls(model, calls)(seen)
    assert list(seen.gradients) == ["weight", "bias"]
    assert torch.equal(seen.gradients["weight"], inner.weight.grad)


def test_results_of_torch_as_arguments():
    """A forward may be given what torch.max() returns, or a packed sequence."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 2)
            self.cell = nn.LSTM(4, 2)

        def forward(self, largest, packed):
            return self.layer(largest.values), self.cell(packed)[0].data

    model = Net()
    packed = nn.utils.rnn.pack_sequence([X[:3], X[:2]])
    with kept(model) as calls:
        left, right = model(X.max(1), packed)
        (left.sum() + right.sum()).backward()
    seen = Seen()
    run_calls(model, calls)(seen)
    assert _named(seen)[:2] == ["largest[0]", "largest[1]"]
    assert "packed.data" in _named(seen)
    _assert_same_gradients(model, seen)
