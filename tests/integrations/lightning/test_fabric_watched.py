"""watch() in a loop of Fabric: names, norms, clips, windows, precisions, checkpoints, explanations."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision
from torch import nn

import gradwatch
from tests.support import float64, zoo

NAMES = ("0.weight", "0.bias", "2.weight", "2.bias")
STEPS = 5

pytestmark = pytest.mark.filterwarnings(r"ignore:.*torch\.jit\.script:DeprecationWarning")


def made(**options):
    """Makes a Fabric for one process on the CPU."""
    return Fabric(accelerator="cpu", devices=1, **options)


def batches(count=STEPS, dtype=torch.float32):
    """Draws batches of 16 inputs."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(16, 4, generator=generator, dtype=dtype) for _ in range(count)]


def sgd(model):
    """Makes an optimizer."""
    return torch.optim.SGD(model.parameters(), lr=0.5)


def loss_of(model, x):
    """Computes a loss that is far from 0."""
    return (model(x) - 3).square().mean()


class Setup:
    """A model and its optimizer, set up by a Fabric, and watched or not."""

    def __init__(self, fabric, how="setup", watched=True, compiled=False, **options):
        self.fabric = fabric
        self.bare = zoo.small(seed=1)
        model = torch.compile(self.bare, backend="eager") if compiled else self.bare
        optimizer = sgd(model)
        self.watcher = None
        if how == "watched before":
            self.watcher = gradwatch.watch(model, optimizer, **options)
        if how == "one by one":
            self.model = fabric.setup_module(model)
            self.optimizer = fabric.setup_optimizers(optimizer)
        else:
            self.model, self.optimizer = fabric.setup(model, optimizer)
        if watched and self.watcher is None:
            self.watcher = gradwatch.watch(self.model, self.optimizer, **options)
        if self.watcher is not None:
            self.watcher.attach()

    def train(self, inputs, accumulate=1, **clip):
        """Trains; returns the norms before and after the clip, in float64, and the weights."""
        before, after = [], []
        for number, x in enumerate(inputs, start=1):
            whole = number % accumulate == 0
            with self.fabric.no_backward_sync(self.model, enabled=not whole):
                self.fabric.backward(loss_of(self.model, x) / accumulate)
            if not whole:
                continue
            before.append(float64.gradient_norm(self.bare))
            if clip:
                self.fabric.clip_gradients(self.model, self.optimizer, **clip)
            after.append(float64.gradient_norm(self.bare))
            self.optimizer.step()
            self.optimizer.zero_grad()
        if self.watcher is not None:
            self.watcher.close()
        weights = torch.cat([p.detach().reshape(-1) for p in self.bare.parameters()])
        return before, after, weights


HOW = ("setup", "one by one", "watched before")
PRECISIONS = ("32-true", "bf16-mixed", "bf16-true", "64-true")
CLIPS = ({}, {"max_norm": 0.5}, {"max_norm": 0.4, "norm_type": 1}, {"clip_val": 0.1})


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("compiled", [False, True])
def test_names_are_those_of_the_module(how, compiled):
    """Nothing of Fabric's wrapper, or of the compiler's, is in a name, and none is doubled."""
    one = Setup(made(), how, compiled=compiled)
    one.train(batches())

    parameters = one.watcher.history.parameters()
    assert tuple(parameters.parameter.unique()) == NAMES
    assert len(parameters) == STEPS * len(NAMES)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("clip", CLIPS)
def test_a_clip_is_seen_from_both_sides(how, clip):
    """The norms before and after clip_gradients(), by norm and by value, are those in float64."""
    one = Setup(made(), how)
    before, after, _ = one.train(batches(), **clip)

    steps = one.watcher.history.steps()
    assert steps.grad_norm.tolist() == pytest.approx(before, rel=1e-6)
    assert steps.grad_norm_clipped.tolist() == pytest.approx(after, rel=1e-6)
    assert set(steps.optimizer) == {"SGD"}


def test_the_norm_is_that_of_a_model_in_float64():
    """A copy in double precision that is trained apart has the same norms."""
    one = Setup(made())
    apart = copy.deepcopy(one.bare).double()
    optimizer = sgd(apart)
    expected = []
    for x in batches():
        loss_of(apart, x.double()).backward()
        expected.append(float64.gradient_norm(apart))
        optimizer.step()
        optimizer.zero_grad()

    one.train(batches())

    assert one.watcher.history.steps().grad_norm.tolist() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_precisions(precision):
    """In each precision norms are those of the gradients that the optimizer gets, in float64."""
    one = Setup(made(precision=precision))
    before, after, _ = one.train(batches(), max_norm=0.5)

    steps = one.watcher.history.steps()
    assert steps.grad_norm.tolist() == pytest.approx(before, rel=1e-6)
    assert steps.grad_norm_clipped.tolist() == pytest.approx(after, rel=1e-6)
    assert one.watcher.events == []


def test_the_scaler_of_a_precision_is_found():
    """Norms under a GradScaler are in true units, and a step that it skips is none of ours."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    fabric = made(plugins=MixedPrecision("16-mixed", "cpu", scaler=scaler))
    inputs = batches()
    inputs[2][0, 0] = math.inf
    one = Setup(fabric)
    before, _, _ = one.train(inputs)

    steps = one.watcher.history.steps()
    assert steps.loss_scale.tolist() == [1024, 1024, 1024, 512, 512]
    expected = [norm / scale for norm, scale in zip(before, steps.loss_scale, strict=True)]
    assert steps.grad_norm.tolist() == pytest.approx(expected, rel=1e-6, nan_ok=True)
    assert steps.outcome.tolist() == ["applied", "applied", "skipped_scaler", "applied", "applied"]


def test_micro_batches_are_counted():
    """Under no_backward_sync() a window has its micro-batches, and one norm."""
    one = Setup(made())
    before, _, _ = one.train(batches(6), accumulate=3)

    steps = one.watcher.history.steps()
    assert steps.micro_batches.tolist() == [3, 3]
    assert steps.grad_norm.tolist() == pytest.approx(before, rel=1e-6)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_training_is_the_same(precision, compiled):
    """Weights are bit for bit those of a loop that is not watched."""
    weights = []
    for watched in (False, True):
        fabric = made(precision=precision)
        one = Setup(fabric, watched=watched, compiled=compiled)
        weights.append(one.train(batches(), max_norm=0.5)[2])
    assert torch.equal(*weights)


def test_gradwatch_can_clip():
    """clip= of watch() takes the place of clip_gradients(), with the same weights."""
    by_fabric = Setup(made(), watched=False).train(batches(), max_norm=0.5)[2]
    one = Setup(made(), clip=0.5)
    by_gradwatch = one.train(batches())[2]

    assert torch.allclose(by_fabric, by_gradwatch, rtol=1e-5)
    assert one.watcher.history.steps().clipped.all()


def test_a_checkpoint_has_the_watcher(tmp_path):
    """fabric.save() and fabric.load() take the watcher, and the run goes on at the next step."""
    path = tmp_path / "state.ckpt"

    def train(loads):
        one = Setup(made(), clip=gradwatch.ZClip())
        state = {"model": one.model, "optimizer": one.optimizer, "watcher": one.watcher}
        if loads:
            assert one.fabric.load(path, state) == {}
        one.train(batches(3))
        one.fabric.save(path, state)
        return one.watcher.history.steps().index.tolist()

    assert train(loads=False) == [1, 2, 3]
    assert train(loads=True) == [4, 5, 6]


def test_several_models():
    """A GAN is watched as a ModuleDict, with a name for each optimizer."""
    fabric = made()
    first, second = nn.Linear(4, 3), nn.Linear(3, 1)
    generator, of_generator = fabric.setup(first, sgd(first))
    discriminator, of_discriminator = fabric.setup(second, sgd(second))
    both = nn.ModuleDict({"generator": generator, "discriminator": discriminator})
    optimizers = {"g": of_generator, "d": of_discriminator}
    expected = []

    with gradwatch.watch(both, optimizers) as watcher:
        for x in batches(2):
            for optimizer, bare in ((of_generator, first), (of_discriminator, second)):
                fabric.backward(discriminator(generator(x)).square().mean())
                expected.append(float64.gradient_norm(bare))
                optimizer.step()
                of_generator.zero_grad()
                of_discriminator.zero_grad()

    steps = watcher.history.steps()
    assert steps.optimizer.tolist() == ["g", "d", "g", "d"]
    assert steps.grad_norm.tolist() == pytest.approx(expected, rel=1e-6)
    names = set(watcher.history.parameters().parameter)
    assert names == {f"{m}.{p}" for m in ("generator", "discriminator") for p in ("weight", "bias")}


def test_a_closure():
    """An optimizer that is given a closure, such as LBFGS, is watched with its loss."""
    fabric, bare = made(), zoo.small(seed=1)
    model, optimizer = fabric.setup(bare, torch.optim.LBFGS(bare.parameters(), max_iter=1))
    [x] = batches(1)
    expected = []

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, x)
        fabric.backward(loss)
        expected.append((loss.item(), float64.gradient_norm(bare)))
        return loss

    with gradwatch.watch(model, optimizer) as watcher:
        for _ in range(3):
            optimizer.step(closure)

    steps = watcher.history.steps()
    assert list(zip(steps.loss, steps.grad_norm, strict=True)) == [
        pytest.approx(one, rel=1e-6) for one in expected
    ]


def test_watch_all_finds_the_model_of_a_fabric():
    """Its label is the class of the user's module."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = zoo.small(seed=1)

        def forward(self, x):
            return self.body(x)

    fabric, bare = made(), Net()
    model, optimizer = fabric.setup(bare, sgd(bare))
    with gradwatch.watch_all() as watched:
        for x in batches(2):
            fabric.backward(model(x).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        [watcher] = watched.watchers
    assert watcher.label == "Net"
    assert tuple(watcher.history.parameters().parameter.unique()) == tuple(
        f"body.{name}" for name in NAMES
    )


# -- what runs the model again ---------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_nan_in_the_data_is_found(precision, compiled):
    """The explanation names the input as the model does, its example, and the line of the loop."""
    inputs = batches()
    inputs[2][7, 1] = math.nan
    one = Setup(made(precision=precision), compiled=compiled, on_nonfinite="explain")
    weights = one.train(inputs)[2]

    [found] = one.watcher.explanations
    assert (found.step, found.origin, found.argument, found.examples) == (3, "input", "input", (7,))
    assert found.file == __file__
    assert "model(x)" in found.source
    assert bool(weights.isfinite().all())


class Divides(nn.Module):
    """Has a line that makes a NaN."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return (0 * self.layer(x)).sqrt().sum()  # the line


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # the compiler's
@pytest.mark.parametrize("compile_around", [False, True])
def test_the_line_in_the_model_is_found(compile_around):
    """In mixed precision too, where Fabric refuses backwards that it does not run itself."""
    fabric, bare = made(precision="bf16-mixed"), Divides()
    model, optimizer = fabric.setup(bare, sgd(bare))
    if compile_around:
        model = torch.compile(model, backend="eager")
    with gradwatch.watch(model, optimizer, on_nonfinite="explain") as watcher:
        fabric.backward(model(batches(1)[0]))
        optimizer.step()

    [found] = watcher.explanations
    assert found.source.endswith("# the line")
    assert found.operation == "sqrt"
    by_hand = gradwatch.explain(model, batches(1)[0])
    assert by_hand.source.endswith("# the line")


def test_fabrics_own_check_is_as_before():
    """After an explanation loss.backward() is refused again, as Fabric has it in mixed precision."""
    fabric, bare = made(precision="bf16-mixed"), Divides()
    model, _ = fabric.setup(bare, sgd(bare))
    gradwatch.explain(model, batches(1)[0])
    with pytest.raises(RuntimeError, match=r"requires you to call `fabric\.backward"):
        model(batches(1)[0]).backward()


def test_the_curvature_is_that_of_the_module():
    """The eigenvalues of a model of Fabric's are those of the module in it."""
    fabric, bare = made(), zoo.small(seed=1)
    [x] = batches(1)
    plain = gradwatch.curvature(bare, lambda: loss_of(bare, x))
    model, _ = fabric.setup(bare, sgd(bare))
    wrapped = gradwatch.curvature(model, lambda: loss_of(model, x))
    assert wrapped.largest_eigenvalue == pytest.approx(plain.largest_eigenvalue)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_gradients_are_checked(precision):
    """check_gradients() takes a model of Fabric's, in mixed precision too."""
    bare = zoo.small(seed=1)
    model, _ = made(precision=precision).setup(bare, sgd(bare))
    assert gradwatch.check_gradients(model, batches(1)[0]).ok
