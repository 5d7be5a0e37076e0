"""Explanations: in words, in one line, as plain data, equal and hashable."""

import copy
import json
import math
import pickle
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradwatch import Explanation
from gradwatch.record.explanation import NO_ARGUMENT, Operand, Share
from gradwatch.record.operations import (
    name_of_node,
    plain_name,
    public_name,
    shown_name,
    shown_operand,
)

NAN, INF = math.nan, math.inf
SCORES = Operand("self", (32, 8, 8), "float32", -3.1, 4.2, infs=256, negative_infs=256)
MASK = Explanation(
    origin="operation",
    phase="forward",
    module="encoder.layers.1",
    module_class="Attention",
    operation="masked_fill",
    file="model.py",
    line=40,
    source='scores = scores.masked_fill(mask, float("-inf"))',
)
SOFTMAX = Explanation(
    step=120,
    optimizer="AdamW",
    micro_batch=2,
    origin="operation",
    phase="forward",
    module="encoder.layers.1",
    module_class="Attention",
    operation="_softmax",
    file="model.py",
    line=42,
    source="weights = torch.softmax(scores, dim=-1)",
    examples=(3, 17),
    count=256,
    size=2048,
    result_shape=(32, 8, 8),
    result_dtype="float32",
    inputs=(SCORES,),
    made_possible_by=MASK,
    notes=("the module is compiled, and was replayed uncompiled",),
    advice="Mask with a finite number",
)
SQRT = Explanation(
    origin="operation",
    phase="backward",
    kind="inf",
    module="",
    module_class="Net",
    operation="sqrt",
    file="model.py",
    line=12,
    source="length = x.square().sum(-1).sqrt()",
    examples=(5,),
    count=1,
    size=4,
    result_shape=(4,),
    result_dtype="float16",
    inputs=(
        Operand("self", (4,), "float16", 0.0, 9.0, zeros=1),
        Operand("gradient", (4,), "float16", 0.25, 0.25),
    ),
)
LOSS = Explanation(
    step=3,
    origin="operation",
    phase="forward",
    operation="nll_loss_forward",
    file="train.py",
    line=7,
    source="loss = F.cross_entropy(logits, target)",
    count=1,
    size=1,
    result_dtype="float32",
    inputs=(
        Operand("self", (2, 10), "float32", -4.0, -1.0),
        Operand("target", (2,), "int64", -100.0, -100.0),
    ),
)
DATA = Explanation(
    step=120,
    optimizer="AdamW",
    origin="input",
    argument="batch['image']",
    examples=(3, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 30),
    count=12,
    size=4096,
    result_shape=(32, 128),
    result_dtype="float32",
)
WEIGHTS = Explanation(
    step=120,
    optimizer="AdamW",
    origin="weights",
    kind="inf",
    parameter="head.weight",
    since_step=118,
    count=100,
    size=100,
    result_shape=(10, 10),
    result_dtype="float32",
)
OUTPUT = Explanation(
    step=1,
    micro_batch=1,
    origin="output_gradient",
    module="",
    module_class="Net",
    count=2,
    size=40,
    result_shape=(4, 10),
    result_dtype="float32",
    examples=(0, 1, 2, 3),
)
OUTPUT_OF_A_PART = replace(OUTPUT, module="body.enc", module_class="Linear", file="m.py", line=9)
ONE_OF = Explanation(step=5, candidates=(MASK, SQRT), examples=(1,))
SPIKE = Explanation(
    step=900,
    optimizer="SGD",
    kind="spike",
    largest_parameters=(
        Share("head.weight", 91.0, 0.83),
        Share("head.bias", 40.0, 0.16),
        Share("body.0.weight", 2.5, 0.004),
    ),
    largest_examples=(Share("3", 80.0, 1.2), Share("17", 9.0, -0.1), Share("4", 1.0, NAN)),
    advice="Look at example 3",
)
OVERFLOW = Explanation(
    step=900,
    kind="overflow",
    origin="operation",
    phase="backward",
    module="head",
    operation="mul",
    file="model.py",
    line=9,
    source="return self.linear(x) * 1e30",
    largest_parameters=(Share("head.weight", INF, NAN),),
)
NOT_FOUND = Explanation(step=8, notes=("The batch was changed in place after the forward.",))
OWN_FUNCTION = Explanation(
    origin="operation",
    phase="backward",
    module="head",
    source="return gradient / 0",
    count=1,
)
FROM_ARGUMENT = Explanation(
    origin="operation",
    phase="forward",
    kind="inf",
    module="head",
    module_class="Head",
    operation="aten.log",
    argument="x",
    count=2,
    size=2,
    inputs=(Operand("self", (2,), "float32", 0.0, 0.0, zeros=2),),
)

TEXTS = {
    "softmax": (
        SOFTMAX,
        """\
NaN in micro-batch 2 of step 120 (optimizer AdamW), born in the forward of encoder.layers.1
  (Attention):
  model.py:42
    weights = torch.softmax(scores, dim=-1)
This is softmax of a row of -inf: 256 of 2,048 elements of the result (float32, [32, 8, 8]) are NaN,
  in examples 3 and 17.
Its input:
  input: float32 [32, 8, 8], -3.1 to 4.2, 256 are -inf
Made possible by masked_fill in the forward of encoder.layers.1 (Attention):
  model.py:40
    scores = scores.masked_fill(mask, float("-inf"))
Note: the module is compiled, and was replayed uncompiled.
To try: Mask with a finite number.""",
        (
            "NaN born in the forward of encoder.layers.1 (Attention), model.py:42: softmax of a row of "
            "-inf, examples 3 and 17"
        ),
    ),
    "sqrt": (
        SQRT,
        """\
Inf, born in the backward of the model (Net):
  model.py:12
    length = x.square().sum(-1).sqrt()
This is the gradient of sqrt at 0: 1 of 4 elements of the gradient (float16, [4]) is Inf, in
  example 5.
Its inputs:
  input: float16 [4], 0 to 9, 1 is 0
  gradient: float16 [4], all 0.25""",
        (
            "Inf born in the backward of the model (Net), model.py:12: the gradient of sqrt at 0, "
            "example 5"
        ),
    ),
    "loss": (
        LOSS,
        """\
NaN in step 3, born in the forward, outside of the model:
  train.py:7
    loss = F.cross_entropy(logits, target)
This is nll_loss without a target that counts: the result (float32) is NaN.
Its inputs:
  input: float32 [2, 10], -4 to -1
  target: int64 [2], all -100""",
        (
            "NaN born in the forward, outside of the model, train.py:7: nll_loss without a target that "
            "counts"
        ),
    ),
    "data": (
        DATA,
        """\
NaN in step 120 (optimizer AdamW): it came with the data.
12 of 4,096 elements of the input batch['image'] (float32, [32, 128]) are NaN, in examples 3, 17,
  18, 19, 20, 21, 22, 23 and 4 more.""",
        "NaN in the data: batch['image'], examples 3, 17, 18 and 9 more",
    ),
    "weights": (
        WEIGHTS,
        """\
Inf in step 120 (optimizer AdamW): it was in the model before the forward.
All 100 elements of the model's head.weight (float32, [10, 10]) are Inf, since step 118.""",
        "Inf in the model before the forward: head.weight, since step 118",
    ),
    "output": (
        OUTPUT,
        """\
NaN in micro-batch 1 of step 1: it came back from the loss, which is made outside of the model's
  forward.
2 of 40 elements of the gradient at the output of the model (Net) (float32, [4, 10]) are NaN, in
  examples 0 to 3.""",
        "NaN in the gradient that came back from the loss, outside of the model, examples 0 to 3",
    ),
    "output of a part": (
        OUTPUT_OF_A_PART,
        """\
NaN in micro-batch 1 of step 1: it came back to the output of body.enc (Linear), from what ran after
  that outside of the forwards that are kept.
  m.py:9
2 of 40 elements of the gradient at the output of body.enc (Linear) (float32, [4, 10]) are NaN, in
  examples 0 to 3.""",
        "NaN in the gradient that came back to the output of body.enc (Linear), examples 0 to 3",
    ),
    "one of": (
        ONE_OF,
        """\
NaN in step 5, born in one of these places:
  masked_fill in the forward of encoder.layers.1 (Attention):
    model.py:40
      scores = scores.masked_fill(mask, float("-inf"))
  sqrt in the backward of the model (Net):
    model.py:12
      length = x.square().sum(-1).sqrt()
It is in example 1.""",
        "NaN born in one of 2 places: model.py:40 and model.py:12, example 1",
    ),
    "spike": (
        SPIKE,
        """\
Spike in step 900 (optimizer SGD): the step was left out, since its gradient norm is far above those
  before it.
Largest parameters: head.weight (83 %, norm 91), head.bias (16 %, norm 40), body.0.weight (0.4 %,
  norm 2.5).
Largest examples: 3 (120 %, norm 80), 17 (-10 %, norm 9), 4 (norm 1).
To try: Look at example 3.""",
        (
            "Spike: the step was left out, since its gradient norm is far above those before it; "
            "largest: head.weight and example 3"
        ),
    ),
    "overflow": (
        OVERFLOW,
        """\
Overflow in step 900: the gradients are finite, but their norm is too large for a number.
It began in the backward of head:
  model.py:9
    return self.linear(x) * 1e30
This is the gradient of mul.
Largest parameter: head.weight (norm inf).""",
        (
            "Overflow that began in the backward of head, model.py:9: the gradient of mul; largest: "
            "head.weight"
        ),
    ),
    "not found": (
        NOT_FOUND,
        """\
NaN in step 8: where it was born was not found.
Note: The batch was changed in place after the forward.""",
        "NaN: where it was born was not found",
    ),
    "own function": (
        OWN_FUNCTION,
        """\
NaN, born in the backward of head:
  return gradient / 0
1 element of the gradient is NaN.""",
        "NaN born in the backward of head",
    ),
    "from an argument": (
        FROM_ARGUMENT,
        """\
Inf, born in the forward of head (Head).
This is log of 0: all 2 elements of the result are Inf.
Its input:
  input: float32 [2], all 0
Made possible by what is in the input x.""",
        "Inf born in the forward of head (Head): log of 0",
    ),
    "nothing": (
        Explanation(),
        "NaN: where it was born was not found.",
        "NaN: where it was born was not found",
    ),
}


@pytest.mark.parametrize("name", TEXTS)
def test_the_whole_text(name):
    """What print() shows, word by word."""
    explanation, text, _ = TEXTS[name]
    assert str(explanation) == text


@pytest.mark.parametrize("name", TEXTS)
def test_the_line(name):
    """The summary is one line with what matters most."""
    explanation, _, line = TEXTS[name]
    assert explanation.summary == line


names = st.sampled_from(
    ["", "x", "head.weight", "batch['image']", "encoder.layers.11", "a b", "\t"]
)
counts = st.integers(0, 10**7)
numbers = st.one_of(st.sampled_from([NAN, INF, -INF, 0.0, -1.0]), st.floats())
dtypes = st.sampled_from(
    ["", "float16", "bfloat16", "float32", "float64", "int64", "bool", "float"]
)
shapes = st.lists(st.integers(0, 64), max_size=4).map(tuple)
operations = st.sampled_from(
    [
        *(
            "",
            "log",
            "_softmax",
            "div",
            "div_",
            "pow",
            "where",
            "_to_copy",
            "aten.mm",
            "std",
            "exp",
        ),
        *("nll_loss_forward", "norm", "gru", "_", "native_batch_norm", "linalg_vector_norm"),
        *("_linalg_svd", "my::op.default"),
    ]
)
operands = st.builds(
    Operand,
    st.sampled_from(["self", "other", "gradient", "running_var", "exponent", ""]),
    shapes,
    dtypes,
    numbers,
    numbers,
    zeros=counts,
    nans=counts,
    infs=counts,
    negative_infs=st.none() | counts,
)
shares = st.lists(st.builds(Share, names.filter(bool), numbers, numbers), max_size=3).map(tuple)


def _some(inner):
    return st.builds(
        Explanation,
        step=counts,
        optimizer=names,
        micro_batch=counts,
        origin=st.sampled_from(["operation", "input", "weights", "output_gradient", "not_found"]),
        phase=st.sampled_from(["forward", "backward", None]),
        kind=st.sampled_from(["nan", "inf", "overflow", "spike"]),
        module=st.none() | names,
        module_class=names,
        operation=operations,
        file=st.sampled_from(["", "model.py", "/a/b c/model.py", "C:\\model.py"]),
        line=counts,
        source=st.sampled_from(
            ["", "x = torch.log(y)", "x / (y + 1e-8)", "y = x ** 0.5", "a" * 150]
        ),
        argument=names,
        parameter=names,
        since_step=counts,
        examples=st.lists(st.integers(0, 99), unique=True, max_size=10).map(sorted).map(tuple),
        count=counts,
        size=counts,
        nan_count=counts,
        inf_count=counts,
        result_shape=shapes,
        result_dtype=dtypes,
        inputs=st.lists(operands, max_size=3).map(tuple),
        candidates=st.lists(inner, max_size=5).map(tuple),
        largest_parameters=shares,
        largest_examples=shares,
        made_possible_by=st.none() | inner,
        notes=st.lists(names, max_size=2).map(tuple),
        advice=names,
        rank=st.integers(0, 3),
    )


explanations = _some(st.builds(Explanation, operation=operations, module=names, line=counts))


@settings(max_examples=100, deadline=None)
@given(explanations)
def test_all_of_them_read_well(explanation):
    """No gaps where something is not known, and no long lines but those of code and paths."""
    text, line = str(explanation), explanation.summary
    assert text.replace("\n", "").isprintable()
    assert line.isprintable()
    told = [one for one in text.split("\n") if "model.py" not in one and "a" * 150 not in one]
    assert all(len(one) <= 100 for one in told)
    for one in (*told, line):
        assert "None" not in one
        assert not re.search(r"\S  |\(\)|\( |\(,|, ?[,.:;]|: [.:]| [.,:;]| $", one), one
        assert not re.search(r"\b1 (elements|examples) |\bexample \d+( and| to) \d", one), one


@settings(max_examples=60, deadline=None)
@given(explanations)
def test_a_way_through_json(explanation):
    """Strict JSON, without NaN, gives an equal explanation, also in a set."""
    data = json.loads(json.dumps(explanation.as_dict(), allow_nan=False))
    again = Explanation.from_dict(data)
    assert again == explanation
    assert hash(again) == hash(explanation)
    assert str(again) == str(explanation)


def test_copies_and_pickles():
    """Equal to what they are of, although they hold other NaNs."""
    operand = Operand("self", (2,), "float32", float("nan"), float("nan"), nans=2)
    explanation = Explanation(
        inputs=(operand,), made_possible_by=SQRT, largest_examples=(Share("1", NAN, NAN),)
    )
    for again in (pickle.loads(pickle.dumps(explanation)), copy.deepcopy(explanation)):
        assert again == explanation
        assert {again, explanation} == {explanation}
    assert operand != Operand("self", (2,), "float32", float("nan"), 1.0, nans=2)
    assert operand != "self"


def test_a_file_below_the_current_directory(tmp_path, monkeypatch):
    """It is shown relative to that; any other as it is."""
    monkeypatch.chdir(tmp_path)
    below = Explanation(origin="operation", file=str(tmp_path / "src" / "model.py"), line=3)
    above = Explanation(origin="operation", file=str(tmp_path.parent / "model.py"), line=3)
    assert f"  {Path('src', 'model.py')}:3" in str(below).split("\n")
    assert f"  {tmp_path.parent / 'model.py'}:3" in str(above).split("\n")
    assert f"{Path('src', 'model.py')}:3" in below.summary


def test_long_code_and_paths_are_not_wrapped():
    """They stay on their lines, to be copied."""
    source = "x = " + " + ".join(["torch.log(probabilities)"] * 8)
    path = "/home/someone/" + "a directory with spaces/" * 8 + "model.py"
    lines = str(
        Explanation(origin="operation", operation="log", file=path, line=7, source=source)
    ).split("\n")
    assert f"  {path}:7" in lines
    assert f"    {source}" in lines


def test_code_in_an_advice_stays_together():
    """A piece of code moves to the next line as a whole."""
    code = "`scores.masked_fill(mask, torch.finfo(scores.dtype).min)`"
    advice = (
        f"In that row everything is masked. Mask with a finite number, {code}, or leave it out."
    )
    assert any(code in line for line in str(Explanation(advice=advice)).split("\n"))


def test_control_characters_are_escaped():
    """A line of code or a name moves no cursor and colors nothing."""
    explanation = Explanation(
        origin="operation", module="a\x1b[31m", source="x = '\x1b[0m'", file="a\nb", line=1
    )
    assert "\x1b" not in str(explanation) + explanation.summary
    assert "\\x1b" in str(explanation)


def test_what_the_result_has_is_told_apart_from_the_gradients():
    """A NaN in the gradients may have begun as an Inf; a result may have both."""
    base = Explanation(origin="operation", operation="exp", phase="forward", count=3, size=8)
    assert "3 of 8 elements of the result are Inf." in str(replace(base, inf_count=3))
    assert "3 of 8 elements of the result are NaN or Inf." in str(
        replace(base, nan_count=1, inf_count=2)
    )
    assert "3 of 8 elements of the result are NaN." in str(base)


def test_a_number_next_to_a_whole_one():
    """Enough digits show that it is beyond: 1.0000001 is not 1."""
    angle = Operand("self", (2,), "float32", -0.0, 1.0000001192)
    found = Explanation(origin="operation", operation="acos", phase="forward", inputs=(angle,))
    assert "This is acos outside of [-1, 1], 0 to 1.0000001." in str(found)


def test_ranks_are_named():
    """Where another rank than the first was bad."""
    assert "on rank 3" in str(Explanation(step=4, rank=3))


@pytest.mark.parametrize(
    ("operation", "plain", "shown"),
    [
        ("log", "log", "log"),
        ("log_", "log", "log"),
        ("_softmax", "softmax", "softmax"),
        ("aten::_log_softmax", "log_softmax", "log_softmax"),
        ("aten.div.Tensor", "div", "div"),
        ("true_divide", "div", "true_divide"),
        ("linalg_vector_norm", "norm", "linalg_vector_norm"),
        ("native_batch_norm", "batch_norm", "batch_norm"),
        ("_native_batch_norm_legit", "batch_norm", "batch_norm_legit"),
        ("cudnn_batch_norm", "batch_norm", "batch_norm"),
        ("native_layer_norm", "layer_norm", "layer_norm"),
        ("nll_loss_forward", "nll_loss", "nll_loss"),
        ("nll_loss2d_forward", "nll_loss", "nll_loss2d"),
        ("addmm", "matmul", "addmm"),
        ("linear", "matmul", "linear"),
        ("convolution", "convolution", "convolution"),
        ("_to_copy", "to", "to"),
        ("special_erfinv", "erfinv", "special_erfinv"),
        ("linalg_inv_ex", "inverse", "linalg_inv"),
        ("_linalg_slogdet", "slogdet", "linalg_slogdet"),
        ("var_mean", "var", "var_mean"),
        ("log1p", "log1p", "log1p"),
        ("exp2", "exp2", "exp2"),
        ("masked_fill_", "where", "masked_fill"),
        ("sigmoid_backward", "sigmoid", "sigmoid"),
        ("__truediv__", "div", "truediv"),
        ("_", "_", "_"),
        ("", "", ""),
    ],
)
def test_the_names_of_an_operation(operation, plain, shown):
    """All that torch calls an operation means the same; users see the name that they know."""
    assert plain_name(operation) == plain
    assert shown_name(operation) == shown


def test_the_name_that_is_recorded():
    """torch's own, in place or not, without what is of its inside; a node has that of its forward."""
    recorded = [public_name(one) for one in ("log_", "_softmax", "native_layer_norm_backward")]
    assert recorded == ["log_", "softmax", "layer_norm_backward"]
    assert public_name("_scaled_dot_product_flash_attention") == "scaled_dot_product_attention"
    assert [name_of_node(one) for one in ("LogBackward0", "NativeLayerNormBackward0")] == [
        *("log", "layer_norm")
    ]


@pytest.mark.parametrize(
    ("name", "operation", "shown"),
    [
        ("self", "log_", "input"),
        ("other", "div", "divisor"),
        ("other", "fmod", "divisor"),
        ("other", "mul", "other"),
        ("self", "pow", "base"),
        ("exponent", "pow", "exponent"),
        ("mat2", "mm", "other"),
        ("self", "addmm", "added"),
        ("mat1", "addmm", "mat1"),
        ("weight", "native_layer_norm", "weight"),
        ("", "log", "input"),
    ],
)
def test_operands_have_names_that_users_know(name, operation, shown):
    """torch's dispatcher calls the first one "self", which reads as the module."""
    assert shown_operand(name, operation) == shown


def test_a_number_that_is_infinite():
    """It is shown as such: it has no finite element."""
    minus = Operand("other", (), "float", NAN, NAN, infs=1, negative_infs=1)
    found = Explanation(origin="operation", operation="mul", inputs=(SCORES, minus))
    assert "\n  other: -inf" in str(found)


def test_one_finite_value_beside_others_that_are_not():
    """It is not said that all are 1."""
    divisor = Operand("other", (4,), "float32", 1.0, 1.0, infs=2, negative_infs=0)
    found = Explanation(origin="operation", operation="div", inputs=(divisor,))
    assert "\n  divisor: float32 [4], 1 where finite, 2 are +inf" in str(found)


def test_an_operation_of_the_user_s_own_backward():
    """It is that operation, and no gradient of it; no gradient arrives at it."""
    divisor = Operand("other", (4,), "float32", 0.0, 2.0, zeros=1)
    own = Explanation(
        origin="operation",
        phase="backward",
        kind="inf",
        module="head",
        operation="div",
        inputs=(Operand("self", (4,), "float32", 1.0, 1.0), divisor),
        count=1,
        size=4,
    )
    assert own.summary == "Inf born in the backward of head: division by 0"
    assert "This is division by 0: 1 of 4 elements of the result is Inf." in str(own)
    gradient = Operand("gradient", (4,), "float32", 1.0, 1.0)
    of_forward = replace(own, inputs=(*own.inputs, gradient))
    assert "the gradient of division by 0: 1 of 4 elements of the gradient" in str(of_forward)


def test_a_tensor_that_is_no_argument():
    """It is not said to be data: a constant, or one that was made outside of torch."""
    constant = Explanation(
        origin="input", argument="w", count=1, size=4, result_shape=(4,), notes=(NO_ARGUMENT,)
    )
    assert constant.summary == "NaN in a tensor from outside of the forward: w"
    assert str(constant) == (
        "NaN: it was in another tensor that the forward uses.\n"
        "1 of 4 elements of w ([4]) is NaN.\n"
        "Note: It is no argument of the forward, and no parameter or buffer, but another tensor that "
        "the code\n  uses on this line."
    )
    assert "data" not in str(replace(constant, argument="", notes=()))


def test_a_repr_is_short():
    """It has what differs from the defaults, and is code that makes an equal one."""
    assert repr(NOT_FOUND) == (
        "Explanation(step=8, notes=('The batch was changed in place after the forward.',))"
    )
    names = {"Explanation": Explanation, "Operand": Operand, "Share": Share, "nan": NAN, "inf": INF}
    for explanation, _, _ in TEXTS.values():
        assert eval(repr(explanation), names) == explanation
