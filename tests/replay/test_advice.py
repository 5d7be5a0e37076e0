"""Advice: the circumstance is recognized from what an operation was given, and the code in it works."""

import re
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import gradwatch
from gradwatch import Explanation
from gradwatch.record.circumstances import CIRCUMSTANCES, circumstance
from gradwatch.record.explanation import (
    ATTRIBUTE,
    NO_ARGUMENT,
    NOT_AGAIN,
    Operand,
    Share,
    facts_of,
)
from gradwatch.replay.advice import ADVICE, advice_for
from gradwatch.replay.operands import operand_of

pytestmark = pytest.mark.filterwarnings("ignore:(std|var).*degrees of freedom")

INF = float("inf")
HALF = torch.float16
MASK = torch.tensor([[True, True], [False, False]])


def t(*values, dtype=torch.float32):
    """A tensor."""
    return torch.tensor(values, dtype=dtype)


@dataclass
class Case:
    """What goes wrong, and under which name it must be known.

    ``call`` is the operation, ``then`` what follows the code that the advice shows.
    """

    key: str
    operation: str
    call: Any
    inputs: tuple
    names: tuple = ("self", "other", "third", "fourth")
    weight: Any = 1.0  # what the result is multiplied by: the gradient that arrives
    source: str = ""
    made_by: str = ""
    made: tuple = ()  # what the last input was computed with
    module_class: str = ""
    then: Any = None
    also: dict = field(default_factory=dict)


def _unary(key, function, *values, dtype=torch.float32, **more):
    return Case(key, function.__name__, function, (t(*values, dtype=dtype),), **more)


def _case(key, operation, call, *inputs, **more):
    return Case(key, operation, call, inputs, **more)


def _softmax(x):
    return x.softmax(-1)


SCORES = t((-INF, -INF), (0.0, 1.0))
ONES = torch.ones(2, 2)
HALVES = {"target": torch.full((2, 2), 0.5)}
RUNNING = {"names": ("input", "running_mean", "running_var")}
CASES = [
    _unary("empty", torch.mean),
    _case("empty", "mse_loss", F.mse_loss, t(), t()),
    _unary("log_zero", torch.log, 0.0, 1.0),
    _unary("log_zero", torch.log2, 0.0, 1.0),
    _unary("log_zero", torch.log10, 0.0, 1.0, dtype=HALF),
    _unary(
        "log_zero",
        torch.log,
        0.0,
        1.0,
        weight=t(0.0, 1.0),
        source="torch.where(x > 0, torch.log(x), 0.0)",
    ),
    _unary("log_zero", torch.log, 0.0, 1.0, made_by="_softmax"),
    _unary("log_zero", torch.log, 0.0, 1.0, module_class="GaussianNLLLoss"),
    _unary("log_zero", torch.log, 0.0, 1.0, made_by="sigmoid", also=HALVES),
    _unary(
        "log_zero",
        torch.log,
        0.0,
        1.0,
        made_by="rsub",
        source="torch.log(1 - torch.sigmoid(x))",
        also=HALVES,
    ),
    _unary("log_negative", torch.log, -1.0, 0.0, 1.0),
    _unary(
        "log_negative",
        torch.log,
        -1.0,
        1.0,
        source="F.poisson_nll_loss(x, y, log_input=False)",
        also={"target": t(1.0, 1.0)},
    ),
    _case(
        "div_zero",
        "div",
        torch.div,
        t(1.0, 0.0),
        t(0.0, 2.0),
        source="F.gaussian_nll_loss(m, y, v, eps=0.0)",
    ),
    _unary("log1p_edge", torch.log1p, -1.0, 0.0),
    _unary("log1p_edge", torch.log1p, -1.0, 0.0, dtype=torch.bfloat16),
    _unary("log1p_below", torch.log1p, -1.5, 0.0),
    _case("xlogy_zero", "xlogy", torch.xlogy, t(1.0, 1.0), t(0.0, 1.0)),
    _unary("sqrt_zero", torch.sqrt, 0.0, 0.0),
    _unary("sqrt_zero", torch.sqrt, 0.0, 1.0, dtype=HALF),
    _unary("sqrt_zero", torch.sqrt, 0.0, 1.0, weight=t(0.0, 1.0)),
    _unary("sqrt_zero", torch.sqrt, 0.0, 0.0, made_by="var"),
    _unary("sqrt_negative", torch.sqrt, -1.0, 0.0),
    _unary("rsqrt_zero", torch.rsqrt, 0.0, 1.0),
    _unary("rsqrt_negative", torch.rsqrt, -1e-9, 1.0),
    _case("hypot_zero", "hypot", torch.hypot, t(0.0), t(0.0)),
    _case(
        "eps_is_zero",
        "div",
        torch.div,
        t(0.0, 1.0, dtype=HALF),
        t(0.0, 1.0, dtype=HALF),
        source="x / (y + 1e-8)",
    ),
    _case(
        "normalize_in_half",
        "div",
        torch.div,
        t(0.0, 0.0, dtype=HALF),
        t(0.0, 0.0, dtype=HALF),
        source="F.normalize(x, dim=-1)",
    ),
    _case("spread_zero", "div", torch.div, t(0.0, 0.0), t(0.0), made_by="std"),
    _case("spread_zero", "div", torch.div, t(1.0, 1.0), t(0.0), source="(x - x.mean()) / x.std()"),
    _case("norm_divides", "div", torch.div, t(0.0, 0.0), t(0.0), made_by="linalg_vector_norm"),
    _case("count_zero", "div", torch.div, t(0.0), torch.tensor([0])),
    _case("sum_zero", "div", torch.div, t(0.0), t(0.0), made_by="sum"),
    _case("rms_zero", "div", torch.div, t((0.0, 0.0)), t(0.0), made=("sqrt", "mean", "square")),
    _case("norm_divides", "div", torch.div, t((0.0, 0.0)), t(0.0), made=("sqrt", "sum", "square")),
    _case("spread_zero", "div", torch.div, t(0.0, 0.0), t(0.0), made=("sqrt", "var")),
    _case("count_zero", "div", torch.div, t(0.0), t(0.0), made=("sum", "to", "ne")),
    _case("div_zero", "div", torch.div, t(0.0), t(0.0), made=("sqrt", "mm")),
    _case("div_zero", "div", torch.div, t(0.0), t(0.0), made=("mm",), source="x / y + x.std()"),
    _case("div_zero", "div", torch.div, t(1.0, 0.0), t(0.0, 2.0)),
    _case(
        "div_zero",
        "true_divide",
        torch.div,
        t(1.0, -1.0),
        t(0.0, -2.0),
        source="torch.where(y > 0, x.true_divide(y), 0)",
    ),
    _case("modulo_zero", "fmod", torch.fmod, t(1.0, 0.0), t(0.0, 2.0)),
    _case("inf_by_inf", "div", torch.div, t(INF, 1.0), t(INF, 1.0), also={"x": t(1.0, 2.0)}),
    _unary("reciprocal_zero", torch.reciprocal, 0.0, 1.0),
    _unary("exp_overflow", torch.exp, 100.0, 1.0),
    _unary("exp_overflow", torch.exp, 12.0, 1.0, dtype=HALF),
    _unary("exp_overflow", torch.expm1, 100.0, 1.0),
    _unary("exp_overflow", torch.exp, 100.0, 1.0, source="torch.where(x < 0, torch.exp(x), 1 + x)"),
    _unary("sinh_overflow", torch.sinh, -100.0, 1.0),
    _case("pow_negative", "pow", lambda x: x**0.5, t(-1.0, 1.0)),
    _case("pow_negative", "pow", torch.pow, t(-1.0, 1.0), t(2.0, 2.0), names=("self", "exponent")),
    _case("pow_zero", "pow", lambda x: x**0.5, t(0.0, 1.0), source="y = x**0.5"),
    _case("pow_zero", "pow", lambda x: x**-2, t(0.0, 1.0), source="y = x.pow(-2)"),
    _case("pow_zero", "pow", lambda x: x**0.3, t(0.0, 1.0), weight=t(0.0, 1.0)),
    _case("softmax_masked", "_softmax", _softmax, SCORES, then=_softmax),
    _case(
        "softmax_masked", "_log_softmax", lambda x: x.log_softmax(-1), SCORES.half(), then=_softmax
    ),
    _case("softmax_masked", "_softmax", _softmax, SCORES, module_class="MultiheadAttention"),
    _case("softmax_inf", "_softmax", _softmax, t((INF, 1.0), (0.0, 1.0))),
    _case(
        "logsumexp_masked",
        "logsumexp",
        lambda x: x.logsumexp(-1),
        SCORES,
        weight=1.0,
        then=lambda x: x.logsumexp(-1),
    ),
    _unary("arc_outside", torch.acos, 1.1, 0.0),
    _unary("arc_edge", torch.acos, 1.0, 0.0),
    _unary("arc_edge", torch.asin, -1.0, 0.0),
    _unary("arc_edge", torch.atanh, 1.0, 0.0, dtype=torch.bfloat16),
    _case("arc_edge", "special_erfinv", torch.special.erfinv, t(1.0, 0.0)),
    _unary("arc_edge", torch.acos, 1.0, 0.0, weight=t(0.0, 1.0)),
    _unary("logit_outside", torch.logit, 1.1, 0.5),
    _unary("logit_edge", torch.logit, 1.0, 0.5),
    _unary("acosh_edge", torch.acosh, 1.0, 2.0),
    _unary("gamma_pole", torch.lgamma, 0.0, 2.0),
    _unary("gamma_pole", torch.digamma, 0.0, 2.0),
    _case("too_few", "std", lambda x: x.std(), t(1.0)),
    _case("too_few", "var", lambda x: x.var(0), t((1.0, 2.0))),
    _case("constant", "native_layer_norm", lambda x: F.layer_norm(x, (2,), eps=0.0), ONES),
    _case(
        "no_spread",
        "native_layer_norm",
        lambda x: F.layer_norm(x, (2,), eps=0.0),
        t((1.0, 1.0), (2.0, 2.0)),
    ),
    _case(
        "running_variance",
        "native_batch_norm",
        lambda x, m, v: F.batch_norm(x, m, v, eps=0.0),
        t((1.0, 1.0)),
        t(0.0, 0.0),
        t(0.0, 1.0),
        **RUNNING,
    ),
    _case(
        "target_masked",
        "nll_loss_forward",
        lambda x: F.nll_loss(x, torch.tensor([0])),
        t((-INF, -1.0)),
        then=lambda x: F.cross_entropy(x, torch.tensor([0])),
    ),
    _case(
        "all_ignored",
        "nll_loss_forward",
        lambda x: F.cross_entropy(x, torch.tensor([-100, -100])),
        ONES,
    ),
    _case(
        "kl_input",
        "kl_div",
        lambda x: F.kl_div(x, t(0.0, 1.0), reduction="sum"),
        t(-INF, -1.0),
        also=HALVES,
    ),
    _case(
        "kl_target",
        "kl_div",
        lambda x, y: F.kl_div(x, y, reduction="sum"),
        t(-1.0, -1.0),
        t(0.0, 1.0),
        names=("self", "target"),
        also=HALVES,
    ),
    _case(
        "ctc",
        "_ctc_loss",
        lambda x: F.ctc_loss(
            x.log_softmax(-1), torch.tensor([[1, 1, 1]]), torch.tensor([2]), torch.tensor([3])
        ),
        torch.zeros(2, 1, 3),
    ),
    _case("equal_values", "linalg_eigh", lambda x: torch.linalg.eigh(x)[1], torch.eye(2)),
    _case("equal_values", "_linalg_svd", lambda x: torch.linalg.svd(x)[0], torch.eye(2)),
    _case("qr_rank", "linalg_qr", lambda x: torch.linalg.qr(x)[0], torch.zeros(2, 2)),
    _case(
        "singular",
        "_linalg_slogdet",
        lambda x: torch.linalg.slogdet(x)[1],
        ONES,
        then=lambda x: torch.linalg.slogdet(x)[1],
    ),
    _case(
        "zero_by_inf", "mul", torch.mul, t(INF, 1.0), t(0.0, 1.0), also={"mask": t(0.0, 1.0) == 0}
    ),
    _case("inf_minus_inf", "sub", torch.sub, t(INF, 1.0), t(INF, 1.0)),
    _case("of_inf", "cos", torch.cos, t(INF, 1.0)),
    _case("cast", "_to_copy", lambda x: x.half(), t(1e5, 1.0)),
    _case("product", "prod", torch.prod, t(1e20, 1e20)),
    _case("product", "cumprod", lambda x: x.cumprod(0), t(1e3, 1e3, dtype=HALF)),
    _case(
        "too_large",
        "mm",
        torch.mm,
        300 * torch.ones(2, 2, dtype=HALF),
        300 * torch.ones(2, 2, dtype=HALF),
    ),
    _case("too_large", "sum", torch.sum, t(3e4, 3e4, 3e4, dtype=HALF)),
    _case("too_large", "mul", torch.mul, t(1e30), t(1e30)),
    _case("too_large", "mse_loss", F.mse_loss, t(1e30), t(0.0)),
    _case("too_large", "pow", lambda x: x**20, t(1e10), source="x**20"),
    _case("divides_small", "div", torch.div, t(1e10), t(1e-30)),
    _case(
        "gradient_too_large", "mul", torch.mul, t(1.0, dtype=HALF), t(6e4, dtype=HALF), weight=2.0
    ),
]
FROM_OPERANDS = {
    "norm_zero": ("linalg_vector_norm", "backward", "nan", (t(0.0, 0.0),)),
    "atan2_zero": ("atan2", "backward", "nan", (t(0.0), t(0.0))),
    "tan_pole": ("tan", "backward", "inf", (t(1.5707964),)),
    "one_per_channel": ("native_batch_norm", "forward", "nan", (t((1.0, 2.0)),)),
    "weight_norm_zero": ("_weight_norm_interface", "forward", "nan", (t(0.0, 0.0),)),
    "mask": ("masked_fill", "forward", "inf", (t(0.0, 1.0), torch.tensor([True, False]))),
    "bce_edge": ("binary_cross_entropy", "backward", "inf", (t(0.0, 1.0),)),
}
TOLD = {
    "`drop_last=True`",
    "`log_input=False`",
    "`need_weights=False`",
}  # options, that are given where they belong


def _leaves(case):
    names = zip(case.inputs, case.names, strict=False)
    learned = [one.is_floating_point() and not name.startswith("running") for one, name in names]
    return [
        one.clone().requires_grad_(able) for one, able in zip(case.inputs, learned, strict=True)
    ]


def _explained(case):
    """Runs the operation, and records it as a replay does."""
    leaves = _leaves(case)
    result = case.call(*leaves)
    phase = "forward" if not torch.isfinite(result).all() else "backward"
    operands = [operand_of(*pair) for pair in zip(case.names, case.inputs, strict=False)]
    operands[-1] = replace(operands[-1], made_by=case.made)
    if phase == "backward":
        weight = torch.as_tensor(case.weight, dtype=result.dtype).expand(result.shape)
        wanted = [one for one in leaves if one.requires_grad]
        gradients = torch.autograd.grad(result, wanted, weight)
        result = next(one for one in gradients if not torch.isfinite(one).all())
        operands.append(operand_of("gradient", weight))
    kind = "nan" if result.isnan().any() else "inf"
    return _explanation(case, phase, kind, tuple(operands), result)


def _explanation(case, phase, kind, operands, result):
    return Explanation(
        origin="operation",
        phase=phase,
        kind=kind,
        operation=case.operation,
        source=case.source,
        module="",
        module_class=case.module_class,
        inputs=operands,
        count=int((~torch.isfinite(result)).sum()),
        nan_count=int(result.isnan().sum()),
        inf_count=int(result.isinf().sum()),
        size=result.numel(),
        result_shape=tuple(result.shape),
        result_dtype=str(result.dtype).removeprefix("torch."),
        made_possible_by=Explanation(origin="operation", operation=case.made_by)
        if case.made_by
        else None,
    )


def _codes(advice):
    codes = re.findall(r"`[^`]+`", advice)
    assert advice.count("`") == 2 * len(codes)
    return [one[1:-1] for one in codes if one not in TOLD]


def _names(case):
    """What the code of an advice may use: ``x`` and ``y`` are what the operation was given."""
    leaves = _leaves(case)
    x, y = (*leaves, t(1.0))[:2]
    heads = nn.Parameter(torch.randn(2, 4, generator=torch.Generator().manual_seed(0)))
    given = {"torch": torch, "F": F, "nn": nn, "gradwatch": gradwatch, "p": 0.5, "device": "cpu"}
    given |= {
        "x": x,
        "y": y,
        "A": x,
        "scores": x,
        "mask": ~torch.isfinite(x),
        "q": heads,
        "k": heads,
    }
    given |= {"logits": torch.zeros(2, 2, requires_grad=True), "target": torch.tensor([-100, -100])}
    given |= {"log_p": torch.zeros(2, 2), "log_target": torch.zeros(2, 2, requires_grad=True)}
    given |= {"weight": nn.Parameter(torch.zeros(2)), "norm": nn.BatchNorm1d(2)}
    given |= {"good": torch.isfinite(case.call(*leaves))}
    if isinstance(case.weight, torch.Tensor):
        given["good"] = case.weight > 0
    return given | case.also


def _check(code, case, names):
    value = eval(code, names)
    if (
        isinstance(value, AbstractContextManager)
        or value is None
        or not isinstance(value, torch.Tensor)
    ):
        return
    if case.then is not None and value.is_floating_point() and value.dim():
        value = case.then(value)
    assert torch.isfinite(value).all(), code
    leaves = [one for one in names.values() if isinstance(one, torch.Tensor) and one.requires_grad]
    if value.requires_grad:
        for one in torch.autograd.grad(value.sum(), leaves, allow_unused=True):
            assert one is None or torch.isfinite(one).all(), code


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.key}-{case.operation}")
def test_the_circumstance_is_recognized(case):
    """From operation, phase, operands and line follows what has happened."""
    explanation = _explained(case)
    known = circumstance(facts_of(explanation))
    assert known is not None, explanation
    assert known.key == case.key


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.key}-{case.operation}")
def test_the_code_of_an_advice_works(case):
    """With the input that failed, each piece of code gives finite results and gradients."""
    advice = advice_for(_explained(case))
    for code in _codes(advice):
        if "=" in code and re.match(r"^[\w.\[\], ]+ = ", code):
            exec(code, {"mask": MASK.clone()})
        else:
            _check(code, case, _names(case))


def _made(operation="", operands=(), **more):
    given = {"origin": "operation", "phase": "forward", "operation": operation, "inputs": operands}
    return Explanation(**given | more)


@pytest.mark.parametrize("key", FROM_OPERANDS)
def test_what_torch_does_not_show_here(key):
    """A second derivative, another backend or an older torch: known from the operands alone."""
    operation, phase, kind, tensors = FROM_OPERANDS[key]
    operands = tuple(operand_of(*pair) for pair in zip(("self", "other"), tensors, strict=False))
    if phase == "backward":
        operands += (operand_of("gradient", t(1.0)),)
    explanation = _made(operation, operands, phase=phase, kind=kind, result_dtype="float32", size=2)
    known = circumstance(facts_of(explanation))
    assert known is not None
    assert known.key == key
    inputs = (*tensors, t(1.0))[:2]
    case = Case(key, operation, lambda x, y: x, inputs, also=HALVES)
    for code in _codes(advice_for(explanation)):
        _check(code, case, _names(case))


def test_a_second_derivative_of_a_norm():
    """The gradient penalty that the advice shows has finite gradients where that of norm() has not."""
    for norm, finite in (
        (lambda g: g.norm(dim=-1), False),
        (lambda g: torch.sqrt(g.square().sum(dim=-1) + 1e-12), True),
    ):
        x = torch.zeros(2, 2, requires_grad=True)
        (slope,) = torch.autograd.grad(norm(x * x).sum() + norm(x).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(norm(slope).sum(), x, allow_unused=True)
        assert bool(torch.isfinite(second).all()) == finite


def test_each_circumstance_has_an_advice_and_a_test():
    """The two tables have the same keys, and nothing in them is left untested."""
    keys = {one.key for one in CIRCUMSTANCES}
    assert keys == set(ADVICE)
    assert keys == {case.key for case in CASES} | set(FROM_OPERANDS)


def test_attention_weights_are_finite_without_them():
    """What is said of MultiheadAttention with a mask that leaves nothing is so."""
    attention = nn.MultiheadAttention(2, 1, batch_first=True)
    x = torch.ones(1, 2, 2)
    mask = torch.tensor([[True, True]])
    bad, _ = attention(x, x, x, key_padding_mask=mask)
    good, _ = attention(x, x, x, key_padding_mask=mask, need_weights=False)
    one_left, _ = attention(x, x, x, key_padding_mask=torch.tensor([[False, True]]))
    assert bad.isnan().all()
    assert torch.isfinite(good).all()
    assert torch.isfinite(one_left).all()


@pytest.mark.parametrize(
    "operation", ["log", "sqrt", "div_", "pow", "_softmax", "nll_loss_forward"]
)
def test_without_operands_it_is_only_a_guess(operation):
    """Where nothing is known of the inputs, the usual reason is something to check."""
    advice = advice_for(_made(operation, phase="backward"))
    assert advice.startswith("Its inputs are not known here. Check for ")


@pytest.mark.parametrize(
    ("kind", "phase", "operands", "begins"),
    [
        (
            "nan",
            "forward",
            (Operand("x", (2,), "float32", 0.0, 1.0),),
            "The inputs of gru are finite here",
        ),
        (
            "inf",
            "forward",
            (Operand("x", (2,), "float32", 0.0, 1.0, infs=1),),
            "Look at what gru was given",
        ),
        (
            "nan",
            "forward",
            (Operand("x", (2,), "float32", 0.0, 1.0, infs=1),),
            "gru is given an Inf.",
        ),
        ("nan", "forward", (), "Look at what this line was given"),
        ("nan", "backward", (), "The forward of gru is finite and its gradient is not"),
    ],
)
def test_an_operation_without_an_entry(kind, phase, operands, begins):
    """The advice is general, and says only what is seen."""
    advice = advice_for(_made("gru", operands, kind=kind, phase=phase))
    assert advice.startswith(begins)


def test_no_operation_is_named_where_none_is_known():
    """An operation of the user's own, of which there is only the line."""
    assert advice_for(_made()).startswith("Look at what this line was given")


def test_nothing_is_said_that_the_numbers_do_not_show():
    """An Inf whose sign was not counted is no mask; a divisor without 0 is no division by 0."""
    scores = Operand("self", (2, 2), "float32", 0.0, 1.0, infs=2)
    masked = _made("_softmax", (scores,))
    assert "mask" not in circumstance(facts_of(masked)).key
    divided = _made(
        "div", (Operand("self", (), "float32", 1.0, 1.0), Operand("other", (), "float32", 2.0, 2.0))
    )
    assert circumstance(facts_of(divided)) is None
    by_number = replace(divided, inputs=divided.inputs[:1], kind="inf")
    assert circumstance(facts_of(by_number)) is None
    times_inf = _made("mul", (Operand("self", (2,), "float32", 1.0, 2.0),))
    assert circumstance(facts_of(times_inf)) is None
    squared = _made(
        "pow",
        (
            Operand("self", (2,), "float16", 0.0, 300.0, zeros=1),
            Operand("gradient", (2,), "float16", 1.0, 1.0),
        ),
        phase="backward",
        kind="inf",
        source="x**2",
    )
    assert circumstance(facts_of(squared)).key == "gradient_too_large"


def test_a_logarithm_of_what_a_sigmoid_leaves():
    """1 - sigmoid(x) is sigmoid(-x): the advice for sigmoid(x) would be wrong."""
    explanation = _explained(next(case for case in CASES if case.made_by == "rsub"))
    assert "`F.logsigmoid(-x)`" in advice_for(explanation)
    x = t(3.0)
    assert torch.isclose(F.logsigmoid(-x), torch.log(1 - torch.sigmoid(x)))


def test_what_a_nan_began_as():
    """The gradients are NaN, and the operation made an Inf: the advice is about that."""
    operand = Operand("self", (2,), "float32", -1.0, 1.0, zeros=1)
    began = _made("log", (operand,), kind="nan", count=1, inf_count=1)
    assert circumstance(facts_of(began)).key == "log_zero"
    both = _made("log", (operand,), kind="nan", count=2, nan_count=1, inf_count=1)
    assert circumstance(facts_of(both)).key == "log_negative"


def test_data():
    """Which argument and which examples; the code finds them."""
    x = t(1.0, float("nan"))
    advice = advice_for(Explanation(origin="input", argument="batch['image']", examples=(3,)))
    assert advice.startswith("Look at example 3 of batch['image'] in the data set")
    assert "these examples of x " in advice_for(
        Explanation(origin="input", argument="x", examples=(3, 4))
    )
    assert "outside of torch" in advice_for(Explanation(origin="input"))
    assert [
        bool(torch.as_tensor(eval(one, {"torch": torch, "x": x})).isfinite().all())
        for one in _codes(advice)
    ] == [True, True]
    assert not torch.isfinite(x).all()


def test_a_tensor_that_is_no_argument():
    """Nothing is said of a data set."""
    advice = advice_for(Explanation(origin="input", argument="w", notes=(NO_ARGUMENT,)))
    assert advice.startswith("Look at what w was made from")
    assert "data" not in advice


def test_weights_that_were_bad():
    """A parameter needs a checkpoint; running statistics can start anew."""
    weights = Explanation(origin="weights", parameter="head.weight", since_step=118)
    advice = advice_for(weights)
    assert "load the last good checkpoint, from before the update of step 117." in advice
    assert 'on_nonfinite="skip"' in advice
    assert "was initialized" in advice_for(replace(weights, since_step=1))
    buffer = advice_for(Explanation(origin="weights", parameter="body.1.running_var"))
    norm = nn.BatchNorm1d(2)
    norm.running_var.fill_(float("nan"))
    assert "`norm.reset_running_stats()`" in buffer
    norm.reset_running_stats()
    assert torch.isfinite(norm.running_var).all()
    attribute = replace(weights, parameter="ema", notes=(ATTRIBUTE,))
    assert advice_for(attribute).startswith("Look at the code that writes to ema")


@pytest.mark.parametrize(
    ("dtype", "told"),
    [
        ("float32", "lower the learning rate"),
        ("bfloat16", "float32 (master weights)"),
        ("float16", "the usual eps of 1e-8 is 0"),
    ],
)
def test_weights_that_an_update_has_spoiled(dtype, told):
    """Where bad steps are skipped, that is no advice: the gradients before were finite."""
    weights = Explanation(origin="weights", parameter="w", since_step=118, result_dtype=dtype)
    advice = advice_for(weights, by_update=True)
    assert "on_nonfinite" not in advice
    assert "the optimizer's own update made it" in advice
    assert told in advice
    assert len(advice) < 500


def test_an_eps_that_is_0():
    """What is said of float16 is so: Adam divides 0 by 0 with its usual eps, and not with 1e-4."""
    for eps, finite in ((1e-8, False), (1e-4, True)):
        weight = nn.Parameter(torch.ones(2, dtype=torch.float16))
        weight.grad = torch.zeros_like(weight)
        torch.optim.AdamW([weight], eps=eps).step()
        assert bool(torch.isfinite(weight).all()) == finite


def test_the_loss_outside():
    """The advice says what replays the loss, too."""
    advice = advice_for(Explanation(origin="output_gradient", step=3))
    assert "`watcher.explain(closure)`" in advice
    assert "`gradwatch.explain(model, *args, loss=...)`" in advice
    part = advice_for(Explanation(origin="output_gradient", module="encoder", step=3))
    assert "`watcher.explain(closure)`" in part
    assert "loss" not in part


def test_what_was_not_found():
    """What fits the reason; nothing where the note says all there is."""
    assert advice_for(Explanation(notes=("Memory ran out.",))) == ""
    assert "differs from call to call" in advice_for(Explanation(notes=(NOT_AGAIN,)))
    assert "detect_anomaly" in advice_for(Explanation(operation="mm"))


def test_one_of_several():
    """Where it can only be one of them, each is to be looked at."""
    several = Explanation(candidates=(_made("log"), _made("sqrt")))
    assert advice_for(several).startswith("Look at each of these lines")


def test_what_is_too_large():
    """An overflow is bounded by value, since its norm is infinite; a spike names its example."""
    model = nn.Linear(2, 1)
    model.weight.grad = torch.full_like(model.weight, 3e38)
    (code,) = _codes(advice_for(Explanation(kind="overflow")))
    eval(code, {"torch": torch, "model": model})
    assert torch.isfinite(model.weight.grad.norm())
    spike = Explanation(kind="spike", largest_examples=(Share("3", 2.0, 0.9),))
    assert advice_for(spike).startswith("Look at example 3, which has the largest share.")
    assert advice_for(Explanation(kind="spike")).startswith("Look at the examples of this step.")


@pytest.mark.parametrize("advice", [*ADVICE.values()])
def test_an_advice_is_short(advice):
    """At most three sentences, none longer than what is read in one go."""
    assert len(advice) <= 330
