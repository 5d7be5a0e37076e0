"""Training in 8 bits and less: quantized optimizer state, float8 products, quantized weights."""

import math

import pytest
import torch
from torch import nn

import gradwatch
from tests.support import float64
from tests.support.state import identical

STEPS, BAD = 5, 3
STATISTICS = ("max", "mean", "std", "zeros", "weight_norm", "update_ratio")


def _imported(name):
    """Imports a package that these tests need; skips them where it is missing or does not start."""
    try:
        return pytest.importorskip(name)
    except Exception as error:  # compiled for another version of torch
        pytest.skip(f"{name} cannot be imported: {error}")


@pytest.fixture(autouse=True)
def without_generated_code():
    """torchao compiles its optimizers, which takes a minute and is no matter of these tests."""
    if not hasattr(torch.compiler, "set_stance"):
        pytest.skip("needs torch 2.6, to run compiled code as it is written")
    with torch.compiler.set_stance("force_eager"):
        yield


def _torchao(name, **options):
    return lambda p: getattr(_imported("torchao.optim"), name)(p, lr=1e-3, **options)


def _bitsandbytes(name, **options):
    return lambda p: getattr(_imported("bitsandbytes").optim, name)(p, lr=1e-3, **options)


def _sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def _plain():
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))


def _bfloat16():
    return _plain().bfloat16()


def _float8_products(**options):
    float8 = _imported("torchao.float8")
    config = float8.Float8LinearConfig(emulate=True, **options)
    return float8.convert_to_float8_training(_plain(), config=config)


def _quantized_weights(name):
    model = _plain()
    config = getattr(_imported("torchao.prototype.quantized_training"), name)()
    _imported("torchao.quantization").quantize_(model, config)
    return model


CASES = {
    "torchao AdamW8bit": (_plain, _torchao("AdamW8bit")),
    "torchao AdamW4bit": (_plain, _torchao("AdamW4bit")),
    "torchao AdamWFp8": (_plain, _torchao("AdamWFp8")),
    "torchao Adam8bit, stochastic rounding": (
        _bfloat16,
        _torchao("Adam8bit", bf16_stochastic_round=True),
    ),
    "bitsandbytes AdamW8bit": (_plain, _bitsandbytes("AdamW8bit")),
    "bitsandbytes SGD8bit": (_plain, _bitsandbytes("SGD8bit", momentum=0.9)),
    "bitsandbytes Lion8bit": (_plain, _bitsandbytes("Lion8bit")),
    "bitsandbytes AdEMAMix8bit": (_plain, _bitsandbytes("AdEMAMix8bit")),
    "float8 products": (_float8_products, _sgd),
    "float8 products, weights cast for FSDP": (
        lambda: _float8_products(enable_fsdp_float8_all_gather=True),
        _sgd,
    ),
    "weights of int8": (lambda: _quantized_weights("int8_weight_only_quantized_training"), _sgd),
    "products of int8": (lambda: _quantized_weights("int8_mixed_precision_training"), _sgd),
    "weights of 1.58 bits": (lambda: _quantized_weights("bitnet_training"), _sgd),
}


@pytest.fixture(params=CASES)
def case(request):
    """How to make a model and its optimizer."""
    return CASES[request.param]


def _dense(tensor):
    """Takes a tensor of a class of its own apart: into the plain tensors that it holds."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return tensor.detach().clone()
    return [_dense(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0]]


def _train(case, options=None, poisoned=None, left_out=None):
    """Trains; returns weights and state, the watcher, and the true norms of all gradients."""
    torch.manual_seed(0)
    model = case[0]()
    optimizer = case[1](model.parameters())
    watcher = None
    if options is not None:
        watcher = gradwatch.watch(model, optimizer, **options).attach()
    norms = []
    for step in range(STEPS):
        if step == left_out:
            continue
        x = torch.randn(16, 64, generator=torch.Generator().manual_seed(step))
        x = x.to(next(model.parameters()).dtype)
        loss = model(x).float().square().mean()
        (loss * math.nan if step == poisoned else loss).backward()
        norms.append(float64.gradient_norms(dict(model.named_parameters())))
        optimizer.step()
        optimizer.zero_grad()
    if watcher is not None:
        watcher.close()
    state = [
        [_dense(value) if isinstance(value, torch.Tensor) else value for value in one.values()]
        for one in optimizer.state.values()
    ]
    return [list(map(_dense, model.parameters())), state], watcher, norms


def test_watching_changes_no_bit(case):
    """Weights and quantized state are those of an unwatched training, with all statistics taken."""
    plain, _, _ = _train(case)
    watched, watcher, _ = _train(case, {"statistics": STATISTICS})
    assert identical(plain, watched)
    assert len(watcher.history.steps()) == STEPS


def test_norms_are_those_of_the_gradients(case):
    """Each parameter's norm is that of its gradient in float64, and finite statistics are taken."""
    _, watcher, norms = _train(case, {"statistics": STATISTICS})
    rows = watcher.history.parameters()
    for number, expected in enumerate(norms, 1):
        mine = rows[rows["step"] == number].set_index("parameter")["grad_norm"]
        assert dict(mine) == pytest.approx(expected, rel=1e-5)
    assert rows[["max", "std", "weight_norm", "update_ratio"]].map(math.isfinite).all(axis=None)


@pytest.mark.parametrize("bad", [0, BAD])
def test_a_skipped_step_leaves_no_trace(case, bad):
    """Weights and quantized state are as if the batch had not been."""
    expected, _, _ = _train(case, left_out=bad)
    got, watcher, _ = _train(case, {"on_nonfinite": "skip"}, poisoned=bad)
    assert identical(expected, got)
    assert list(watcher.history.steps()["outcome"]).count("skipped_nonfinite") == 1


def test_a_clip_clips(case):
    """The norm after the clip is the limit, and the training is another one."""
    plain, _, _ = _train(case)
    clipped, watcher, _ = _train(case, {"clip": 1e-4})
    assert watcher.history.steps()["grad_norm_clipped"].tolist() == pytest.approx(
        [1e-4] * STEPS, rel=1e-3
    )
    assert not identical(plain, clipped)


def test_a_bad_step_raises(case):
    """on_nonfinite="raise" ends the training at the bad step."""
    with pytest.raises(gradwatch.NonFiniteGradientError) as raised:
        _train(case, {"on_nonfinite": "raise"}, poisoned=BAD)
    assert raised.value.step == BAD + 1


@pytest.mark.parametrize("options", [{}, {"enable_fsdp_float8_all_gather": True}], ids=str)
def test_an_explanation_looks_into_float8_products(options):
    """The line is found although 8-bit tensors cannot be looked at, and the example is named."""
    torch.manual_seed(0)
    model = _float8_products(**options)
    optimizer = _sgd(model.parameters())
    x = torch.randn(16, 64)
    x[5, 7] = math.nan
    with gradwatch.watch(model, optimizer, on_nonfinite="explain") as watcher:
        model(x).square().mean().backward()
        optimizer.step()
    explanation = watcher.explanations[0]
    assert explanation.origin == "input"
    assert explanation.examples == (5,)


FLOAT8 = [torch.float8_e4m3fn, torch.float8_e5m2]


def _of_float8(dtype, options, gradient=(3.0, 4.0)):
    """Watches an optimizer of the user's own, as those of torch do not take float8."""

    class Rounding(torch.optim.Optimizer):
        def step(self):
            for weight in self.param_groups[0]["params"]:
                if weight.grad is not None:
                    weight.copy_((weight.float() - weight.grad.float()).to(dtype))

    weight = torch.ones(2).to(dtype).requires_grad_()
    optimizer = Rounding([weight], {})
    with gradwatch.watch({"w": weight}, optimizer, **options) as watcher, torch.enable_grad():
        (weight.float() * torch.tensor(gradient)).sum().backward()
        with torch.no_grad():
            optimizer.step()
    return weight.detach().float().tolist(), watcher


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
def test_gradients_of_float8_are_measured(dtype):
    """Weights of float8 have such gradients: the norm and the statistics are right."""
    weights, watcher = _of_float8(dtype, {"statistics": ("max", "mean", "std", "zeros")})
    assert weights == [-2.0, -3.0]
    assert watcher.history.steps()["grad_norm"].tolist() == [5.0]
    row = watcher.history.parameters().iloc[0]
    assert (row["max"], row["mean"], row["std"], row["zeros"]) == (4.0, 3.5, 0.5, 0.0)


@pytest.mark.parametrize("dtype", FLOAT8, ids=str)
def test_bad_gradients_of_float8_are_skipped(dtype):
    """A NaN in float8 is found, counted and skipped."""
    weights, watcher = _of_float8(dtype, {"on_nonfinite": "skip"}, gradient=(math.nan, 4.0))
    assert weights == [1.0, 1.0]
    assert watcher.events[0].nan_count == 1


def test_gradients_of_float8_are_not_clipped():
    """torch cannot multiply them, so clip= raises, as clip_grad_norm_ does."""
    with pytest.raises(NotImplementedError, match="Float8_e4m3fn"):
        _of_float8(torch.float8_e4m3fn, {"clip": 1.0})
