"""check_gradients on functions and modules that are right, wrong, random, kinked and broken."""

import copy
import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import gradwatch
from gradwatch.gradcheck.check import WrongGradientError, check_gradients
from gradwatch.gradcheck.function import map_tensors


class Cube(torch.autograd.Function):
    """x³ with a backward that is right."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradient


class WrongSquare(torch.autograd.Function):
    """x² whose backward forgets the 2."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0]


class Off(torch.autograd.Function):
    """2x whose backward is off by a share at one place."""

    @staticmethod
    def forward(ctx, x, share, place):
        ctx.share, ctx.place = share, place
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        wrong = (gradient * 2).clone()
        wrong.view(-1)[ctx.place] *= 1 + ctx.share
        return wrong, None, None


class GuideReLU(torch.autograd.Function):
    """The custom ReLU of the guide, with a mask in float32."""

    @staticmethod
    def forward(ctx, x):
        mask = (x > 0).float()
        ctx.save_for_backward(mask)
        return x * mask

    @staticmethod
    def backward(ctx, gradient):
        (mask,) = ctx.saved_tensors
        return gradient * mask


class Act(nn.Module):
    def forward(self, x):
        return WrongSquare.apply(x)


class Block(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.a, self.act, self.norm = nn.Linear(4, 5), act, nn.BatchNorm1d(5)
        self.drop, self.b = nn.Dropout(0.3), nn.Linear(5, 2)

    def forward(self, x):
        return self.b(self.drop(torch.relu(self.norm(self.act(self.a(x))))))


class Net(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.block, self.head = Block(act), nn.Linear(2, 3)

    def forward(self, x):
        return {"y": self.head(self.block(x))}


def _x(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# -- what is right -----------------------------------------------------------------------------------


RIGHT = {
    "polynomial": (lambda x: x**2 + 3 * x + 1, torch.tensor(2.0)),
    "determinant": (torch.det, _x(3, 3)),
    "custom cube": (Cube.apply, _x(4)),
    "relu of the guide": (GuideReLU.apply, torch.tensor([-1.0, 0.5, 1.0])),
    "several arguments": (lambda x, y: x**2 + y**2 + x * y, (torch.tensor(2.0), torch.tensor(3.0))),
    "keywords": (lambda *, a, b: a @ b, {"a": _x(2, 3), "b": _x(3, 2)}),
    "nested": (lambda pair, extra: pair[0] * pair[1] + extra["z"], ((_x(3), _x(3)), {"z": _x(3)})),
    "in place": (lambda x: x.mul_(2).exp_(), _x(4)),
    "complex": (lambda z: (z * z.conj()).real + z.imag, _x(3, dtype=torch.complex64)),
    "complex output": (torch.fft.fft, _x(5)),
    "eigenvalues": (lambda x: torch.linalg.eigvalsh(x + x.T), _x(3, 3)),
    "masked logits": (
        lambda x: x.masked_fill(torch.eye(3, dtype=torch.bool), -torch.inf),
        _x(3, 3),
    ),
    "random": (lambda x: x * torch.rand_like(x) + random.random() * np.random.rand(), _x(4)),
    "second order": (
        lambda x: torch.autograd.grad((x**3).sum(), x, create_graph=True)[0],
        _x(3),
    ),
    "saturated loss": (lambda x: F.cross_entropy(x, torch.arange(4)), 5 * torch.eye(4)),
    "large values": (lambda x: 1e6 + (x / 255).square().mean(), 255 * _x(20).abs()),
    "checkpoint": (lambda x: checkpoint(torch.tanh, x, use_reentrant=False), _x(3)),
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_function(name):
    """A function with a right gradient passes, and no place of it is called a kink."""
    function, inputs = RIGHT[name]
    check = check_gradients(function, inputs)
    assert check.ok
    assert not check.not_differentiable
    assert not check.untraceable
    assert bool(check)
    check.raise_if_wrong()


MODULES = {
    "linear in half": (nn.Linear(3, 2).half(), _x(2, 3).half()),
    "lstm": (nn.LSTM(3, 4, 2, dropout=0.2, batch_first=True), _x(2, 5, 3)),
    "transformer": (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), _x(2, 5, 8)),
    "weight norm": (nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), _x(2, 3)),
    "embedding": (nn.Embedding(5, 3), torch.tensor([1, 2, 1])),
    "sparse embedding": (nn.Embedding(5, 3, sparse=True), torch.tensor([1, 2, 1])),
    "loss": (nn.CrossEntropyLoss(), (_x(4, 3), torch.tensor([0, 1, 2, 0]))),
    "everything": (Net(nn.Tanh()), _x(6, 4)),
    "convolution": (
        nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(inplace=True), nn.MaxPool2d(2)
        ),
        _x(3, 1, 6, 6),
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_right_module(name):
    """Modules of torch pass with parameters and inputs, in training mode and in any dtype."""
    module, inputs = MODULES[name]
    check = check_gradients(module, inputs, samples=3)
    assert check.ok
    assert not check.not_differentiable
    named = {name for name, _ in module.named_parameters()}
    assert named <= set(check.checked)


def test_old_weight_norm():
    """A hook of torch that belongs to the function stays: weight_norm of the old kind."""
    with pytest.warns(FutureWarning):
        module = nn.utils.weight_norm(nn.Linear(3, 2))
    module(_x(2, 3))  # leaves a tensor with a graph among the attributes
    check = check_gradients(module, _x(2, 3))
    assert check.ok
    assert not check.untraceable
    assert set(check.checked) == {"inputs", "bias", "weight_g", "weight_v"}


def test_dataclass_outputs():
    """Outputs in a dataclass count."""

    @dataclass
    class Out:
        loss: torch.Tensor
        step: int

    check = check_gradients(lambda x: Out(WrongSquare.apply(x).sum(), 3), _x(3))
    assert [failure.kind for failure in check.failures] == ["wrong"]


# -- what is wrong -----------------------------------------------------------------------------------


def test_wrong_function_is_named():
    """A wrong custom Function is named, with the numbers of one entry of its Jacobian."""
    check = check_gradients(WrongSquare.apply, torch.tensor([1.0, 3.0]))
    (failure,) = check.failures
    assert (failure.name, failure.kind, failure.index) == ("inputs", "wrong", (1,))
    assert (failure.function, failure.module, failure.output) == ("WrongSquare", "", "output[1]")
    assert failure.analytic == 3.0
    assert failure.numeric == pytest.approx(6.0)
    assert failure.relative_error == pytest.approx(0.5)
    effort = f"({check.evaluations} evaluations in float64)"
    assert str(check).splitlines() == [
        f"Gradients of WrongSquare.apply: WRONG for 1 of 1 tensor {effort}.",
        "  Look at the autograd Function WrongSquare in WrongSquare.apply.",
        "  inputs[1]: analytic 3, numeric 6, relative error 0.5, for output[1]",
    ]


def test_only_the_wrong_input_is_named():
    """Of two inputs the one whose gradient is wrong is named."""

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a, b):
            ctx.save_for_backward(a, b)
            return a * b

        @staticmethod
        def backward(ctx, gradient):
            _, b = ctx.saved_tensors
            return gradient * b, gradient * b

    check = check_gradients(Product.apply, (_x(3), _x(3, seed=1)))
    assert [failure.name for failure in check.failures] == ["inputs[1]"]


def test_wrong_function_in_a_submodule():
    """In a module the submodule and the Function are found; what lies behind them is right."""
    check = check_gradients(Net(Act()), _x(6, 4))
    assert {failure.name for failure in check.failures} == {
        "inputs",
        "block.a.weight",
        "block.a.bias",
    }
    assert {(f.module, f.function) for f in check.failures} == {("block.act", "WrongSquare")}
    assert check.culprits == ("block.act (Act): the autograd Function WrongSquare",)
    with pytest.raises(WrongGradientError, match=r"block\.act") as caught:
        check.raise_if_wrong()
    assert caught.value.check is check


def test_two_wrong_submodules():
    """Two culprits are found, and each tensor is given the first one behind it."""
    model = nn.Sequential(nn.Linear(3, 3), Act(), nn.Linear(3, 3), Act(), nn.Linear(3, 1))
    check = check_gradients(model, _x(4, 3))
    blamed = {failure.name: failure.module for failure in check.failures}
    assert blamed == {"inputs": "1", "0.weight": "1", "0.bias": "1", "2.weight": "3", "2.bias": "3"}
    assert len(check.culprits) == 2


def test_fault_in_the_outermost_forward():
    """Where no part is wrong by itself, the Function in the whole is named."""

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 3)

        def forward(self, x):
            return WrongSquare.apply(self.a(x)).sum()

    check = check_gradients(Whole(), _x(4, 3))
    assert check.culprits == ("the autograd Function WrongSquare in Whole",)
    assert {failure.module for failure in check.failures} == {""}


def test_method_of_a_module():
    """A method of a module is checked with the module's parameters, the module left as it is."""

    class Trained(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(3, 1)

        def training_step(self, x, y):
            return {"loss": F.mse_loss(self.a(x), y.detach()), "n": len(x)}

    model = Trained()
    check = check_gradients(model.training_step, (_x(4, 3), _x(4, 1)))
    assert set(check.checked) == {"inputs[0]", "inputs[1]", "a.weight", "a.bias"}
    assert [(f.name, f.kind) for f in check.failures] == [("inputs[1]", "detached")]
    check = check_gradients(model.training_step, (_x(4, 3).requires_grad_(), _x(4, 1)))
    assert check.ok
    assert "inputs[1]" not in check.checked
    assert model.a.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("function", "kind", "analytic", "numeric"),
    [
        (lambda x: x.detach() ** 2, "detached", 0.0, 6.0),
        (lambda x: x * 0 + x.detach() ** 2, "detached", 0.0, 6.0),
        (lambda x: x * x.detach(), "wrong", 3.0, 6.0),
        (lambda x: x + (x.round() - x).detach(), "flat", 1.0, 0.0),
    ],
)
def test_kinds(function, kind, analytic, numeric):
    """Broken, half broken and straight-through graphs are told from each other."""
    check = check_gradients(function, torch.tensor([3.0]))
    (failure,) = check.failures
    assert failure.kind == kind
    assert failure.analytic == pytest.approx(analytic)
    assert failure.numeric == pytest.approx(numeric)


def test_no_grad_block_in_a_module():
    """A layer under no_grad is found: what comes before it has no gradient but moves the output."""

    class Cut(nn.Module):
        def forward(self, x):
            with torch.no_grad():
                return x * 2

    check = check_gradients(nn.Sequential(nn.Linear(3, 3), Cut(), nn.Linear(3, 1)), _x(2, 3))
    assert {(f.name, f.kind) for f in check.failures} == {
        ("inputs", "detached"),
        ("0.weight", "detached"),
        ("0.bias", "detached"),
    }
    assert {failure.module for failure in check.failures} == {"1"}
    assert "no gradient arrives" in str(check)


@pytest.mark.parametrize(
    "function",
    [lambda x: torch.sqrt(x**2).sum(), lambda x: torch.where(x > 0, torch.sqrt(x), 0 * x)],
)
def test_nan_gradient_of_a_finite_function(function):
    """A gradient of NaN is a failure even at a kink: a training would meet it."""
    (failure,) = check_gradients(function, torch.zeros(2)).failures
    assert failure.kind == "not finite"
    assert "the gradient is not finite" in str(failure)


@settings(max_examples=60, deadline=None)
@given(
    share=st.sampled_from([-2.0, -1.0, -0.01, 0.002, 0.1, 3.0, 1e6]),
    size=st.integers(1, 3000),
    data=st.data(),
)
def test_one_wrong_element(share, size, data):
    """One wrong element among thousands is found and located, if it stands out of the rest."""
    place = data.draw(st.integers(0, size - 1))
    check = check_gradients(
        lambda x: Off.apply(x, share, place),
        _x(size),
        samples=4,
        seed=data.draw(st.integers(0, 99)),
    )
    # Along a line an element is seen against the sum of all, which is about the root of their number.
    # One that stands out ten times as much as it must is missed once in some 20,000 draws of 4 lines.
    if size <= 4 or abs(share) > 0.1 * size**0.5:
        (failure,) = check.failures
        assert failure.index == (place,)
        assert failure.numeric == pytest.approx(2.0)
        assert failure.analytic == pytest.approx(2 * (1 + share), abs=1e-9)
    elif check.failures:
        assert check.failures[0].index == (place,)


@settings(max_examples=25, deadline=None)
@given(factor=st.sampled_from([0.5, 0.99, 1.01, -1.0, 100.0]), layer=st.integers(0, 3))
def test_wrong_layer_is_found(factor, layer):
    """Wherever a gradient is scaled in a stack, that place is named."""

    class Scaled(nn.Module):
        def forward(self, x):
            return x * factor + (x * (1 - factor)).detach()

    torch.manual_seed(0)
    parts = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(4)]
    parts[layer].append(Scaled())
    check = check_gradients(nn.Sequential(*parts), _x(3, 4), samples=0)
    assert {failure.module for failure in check.failures} == {f"{layer}.2"}


# -- kinks, dead ends --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "inputs", "kinks"),
    [
        (torch.relu, torch.tensor([0.0, 3.0, -1.0]), 1),
        (torch.abs, torch.zeros(3), 0),
        (lambda x: x.max(), torch.ones(4), 1),
        (lambda x: F.max_pool2d(x, 2), torch.zeros(1, 1, 4, 4), 1),
        (lambda x: x.floor() + x, torch.tensor([2.0]), 1),
        (torch.relu, torch.full((4,), 1e-7), 0),
        (torch.relu, torch.full((4,), -3e-7), 0),
        (
            lambda x: F.binary_cross_entropy(x, x.new_tensor([0.0, 1.0])),
            torch.tensor([0.0, 1.0]),
            1,
        ),
    ],
)
def test_kinks(function, inputs, kinks):
    """A kink, a tie, a jump and the edge of a domain are no fault; one nearby is not even met."""
    check = check_gradients(function, inputs)
    assert check.ok
    assert len(check.not_differentiable) == kinks
    assert ("not an error" in str(check)) == bool(kinks)


def test_wrong_besides_a_kink():
    """A wrong gradient is found next to a kink in the same tensor."""
    check = check_gradients(
        lambda x: torch.relu(x[:2]).sum() + WrongSquare.apply(x[2:]).sum(),
        torch.tensor([0.0, 0.0, 3.0]),
    )
    assert [failure.index for failure in check.failures] == [(2,)]


def test_custom_relu_that_is_wrong_on_one_side():
    """A ReLU with a wrong slope is wrong at 0 too, where a right one has a kink."""

    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.clamp(min=0)

        @staticmethod
        def backward(ctx, gradient):
            return gradient * torch.where(ctx.saved_tensors[0] > 0, 0.5, 0.0)

    assert not check_gradients(Wrong.apply, torch.zeros(3)).ok


def test_tensors_without_influence():
    """Unused and dead tensors are named as unchecked, not as right or wrong."""

    class Partly(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x, y):
            return self.used(x) + 0 * y

    check = check_gradients(Partly(), (_x(2, 3), _x(2, 2)))
    assert check.ok
    assert check.untraceable == ("inputs[1]", "unused.weight", "unused.bias")
    assert "so not checked: inputs[1], unused.weight, unused.bias" in str(check)


def test_frozen_and_integer_tensors_are_left_alone():
    """Frozen parameters and integer inputs are not varied."""
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 1))
    model[0].requires_grad_(False)
    check = check_gradients(model, torch.tensor([0, 3]))
    assert check.checked == ("1.weight", "1.bias")


def test_tied_weights():
    """Tied weights are one tensor, with the gradient of both places."""
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False))
    model[2].weight = model[0].weight
    check = check_gradients(model, _x(2, 3))
    assert check.ok
    assert check.checked == ("inputs", "0.weight")


# -- what gradcheck tests besides --------------------------------------------------------------------


def test_backward_that_ignores_what_it_is_given():
    """A backward that is right for a loss alone is found by gradcheck's rules."""

    class Sum(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return (x**2).sum()

        @staticmethod
        def backward(ctx, gradient):
            return 2 * ctx.saved_tensors[0]

    (failure,) = check_gradients(Sum.apply, _x(3)).failures
    assert (failure.kind, failure.function) == ("contract", "Sum")
    assert "not multiplied by grad_output" in str(failure)


def test_backward_that_needs_every_gradient():
    """A backward that fails where one output has no gradient is found."""

    class Two(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a, b):
            ctx.set_materialize_grads(False)
            return a * 2, b * 3

        @staticmethod
        def backward(ctx, first, second):
            return first * 2, second * 3

    (failure,) = check_gradients(Two.apply, (_x(3), _x(3))).failures
    assert failure.kind == "contract"
    assert "leaves out the gradient of an output" in failure.message


def test_forward_mode():
    """With forward_ad=True a wrong jvp is found."""

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            return gradient * 2

        @staticmethod
        def jvp(ctx, tangent):
            return tangent * 3

    assert check_gradients(Twice.apply, _x(3)).ok
    assert not check_gradients(Twice.apply, _x(3), forward_ad=True).ok
    assert check_gradients(nn.Linear(3, 2), _x(2, 3), forward_ad=True).ok


# -- what stays as it is -----------------------------------------------------------------------------


def test_nothing_is_touched():
    """Values, .grad, buffers, flags, hooks, inputs and random states are as before."""
    model = Net(Act())
    model.head.eval()
    x = _x(6, 4).requires_grad_()
    model(x)["y"].sum().backward()
    calls = []
    model.head.register_forward_hook(lambda *_: calls.append("forward"))
    model.head.register_full_backward_hook(lambda *_: calls.append("backward"))
    model.head.weight.register_hook(lambda gradient: calls.append("tensor"))
    model.head.weight.register_post_accumulate_grad_hook(lambda p: calls.append("arrived"))
    state, grad = copy.deepcopy(model.state_dict()), model.head.weight.grad.clone()
    inputs, before = x.detach().clone(), (torch.get_rng_state(), random.getstate())
    numpy_before = np.random.get_state()[1].tolist()
    check_gradients(model, x)
    check_gradients(lambda x: x.mul_(2), x)
    assert calls == []
    assert torch.equal(x, inputs)
    assert torch.equal(model.head.weight.grad, grad)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert (model.training, model.block.training, model.head.training) == (True, True, False)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == numpy_before
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_watched_model():
    """A model under gradwatch is checked without a trace in the history."""
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with gradwatch.watch(model, optimizer) as watcher:
        assert check_gradients(model, _x(2, 3)).ok
        model(_x(2, 3)).sum().backward()
        optimizer.step()
    assert len(watcher.history.steps()) == 1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inside_no_grad(mode):
    """It works inside a block without gradients."""
    with mode():
        assert check_gradients(nn.Linear(3, 2), _x(2, 3)).ok


def test_same_seed_same_check():
    """The same seed gives the same check, to the last number."""
    model, x = Net(Act()), _x(6, 4)
    assert check_gradients(model, x, seed=3) == check_gradients(model, x, seed=3)


def test_cost():
    """It costs two evaluations for each sample of each tensor, and some six for each tensor."""
    model = nn.Sequential(*[nn.Linear(20, 20) for _ in range(5)])
    for samples in (0, 1, 10):
        check = check_gradients(model, _x(2, 20), samples=samples)
        assert check.evaluations <= 2 * 11 * (samples + 3) + 20


# -- errors ------------------------------------------------------------------------------------------


class _Counts(nn.Module):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return x * self.calls


def _fails(x):
    raise KeyError("nothing to do with precision")


@pytest.mark.parametrize(
    ("function", "inputs", "error", "text"),
    [
        (lambda x: x.argmax(), _x(3), TypeError, "no floating or complex tensor"),
        (lambda x: x / 0, torch.ones(3), ValueError, "without a finite output"),
        (lambda x: x * 2, torch.ones(2, dtype=torch.int64), TypeError, "no tensor to vary"),
        (_Counts(), _x(3), ValueError, "not deterministic: output differs by"),
        (_fails, _x(3), KeyError, "nothing to do with precision"),
        (3, _x(3), TypeError, "must be a function or a module, got an object of type int"),
    ],
)
def test_functions_that_cannot_be_checked(function, inputs, error, text):
    """What cannot be checked is refused, and the text says why and what to write."""
    with pytest.raises(error, match=text):
        check_gradients(function, inputs)


def test_module_that_cannot_be_copied():
    """A module with an attribute that cannot be copied is refused by name."""
    model = nn.Linear(2, 1)
    model.lock = (line for line in ())
    with pytest.raises(TypeError, match=r"Linear cannot be copied: .*__deepcopy__"):
        check_gradients(model, _x(1, 2))


@pytest.mark.parametrize(
    ("option", "value"),
    [("samples", -1), ("samples", 1.5), ("eps", 0.0), ("eps", 1.0), ("rtol", 2.0), ("atol", 0.0)],
)
def test_options_out_of_bounds(option, value):
    """An option out of bounds is named."""
    with pytest.raises(ValueError, match=rf"check_gradients\({option}=\)"):
        check_gradients(torch.tanh, _x(3), **{option: value})


def test_map_tensors_keeps_the_kinds():
    """Structures are rebuilt in their own kinds, with places that read like code."""

    @dataclass
    class Pair:
        one: torch.Tensor
        two: object

    packed = nn.utils.rnn.pack_sequence([torch.ones(2), torch.ones(1)])
    places = []
    value = {"a": (torch.ones(1), "text"), "b": Pair(torch.ones(1), [torch.ones(1)]), "c": packed}
    same = map_tensors(value, lambda place, tensor: places.append(place) or tensor, "x")
    assert places[:4] == ["x['a'][0]", "x['b'].one", "x['b'].two[0]", "x['c'][0]"]
    assert type(same["c"]) is type(packed)
    assert same["b"].two is not value["b"].two
