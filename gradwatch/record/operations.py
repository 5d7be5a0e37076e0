"""An operation as a replay saw it: its operands, and one name for all that torch calls it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from gradwatch.pickles import stable_name

LIMITS = {"float16": 65504.0, "bfloat16": 3.39e38, "float32": 3.4028e38, "float64": 1.7977e308}
"""The largest number of each dtype."""

SMALLEST = {"float16": 2.0**-25, "bfloat16": 2.0**-134, "float32": 2.0**-150, "float64": 0.0}
"""What rounds to 0 in each dtype: it and all that is smaller."""


def values_of(record: Any) -> tuple[Any, ...]:
    """Returns the values of a dataclass for a comparison: None for NaN, which equals nothing."""
    values = (getattr(record, one.name) for one in fields(record))
    return tuple(None if value != value else value for value in values)


def shown_fields(record: Any) -> str:
    """Returns code that makes an equal dataclass, without the fields that have their defaults."""
    given = {one.name: getattr(record, one.name) for one in fields(record)}
    defaults = {one.name: one.default for one in fields(record)}
    told = [f"{name}={value!r}" for name, value in given.items() if value != defaults[name]]
    return f"{type(record).__name__}({', '.join(told)})"


@stable_name
@dataclass(frozen=True, slots=True, eq=False)
class Operand:
    """One tensor that an operation was given.

    Two operands are equal if all of their attributes are, where NaN equals NaN.

    Attributes:
        name: What the operation calls it, such as ``"self"`` or ``"other"``; for an operation of
            the backward ``"gradient"`` is what arrived there, and the others are those of its
            forward operation.
        shape: Its shape; ``()`` for a number of Python.
        dtype: Its dtype, such as ``"float32"``; ``"float"`` or ``"int"`` for a number of Python.
        low: The smallest of its finite elements; NaN if it has none.
        high: The largest of its finite elements; NaN if it has none.
        zeros: Number of elements that are exactly 0.
        nans: Number of elements that are NaN.
        infs: Number of elements that are plus or minus infinity.
        negative_infs: How many of those are minus infinity; None if not counted.
        made_by: The operations that it was computed with, the last one first, as far as they are
            followed; without those that only copy, pick or scale elements. ``"sqrt"`` and
            ``"square"`` are powers and products as well, and ``"to"`` is a conversion from integers
            or booleans.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    low: float
    high: float
    zeros: int = 0
    nans: int = 0
    infs: int = 0
    negative_infs: int | None = None
    made_by: tuple[str, ...] = ()

    def __eq__(self, other: object) -> bool:
        return values_of(self) == values_of(other) if isinstance(other, Operand) else NotImplemented

    def __hash__(self) -> int:
        return hash(values_of(self))

    def __repr__(self) -> str:
        return shown_fields(self)

    @property
    def size(self) -> int:
        """Number of its elements."""
        return math.prod(self.shape)

    @property
    def most(self) -> float:
        """The largest magnitude of its finite elements; NaN if it has none."""
        return max(abs(self.low), abs(self.high))

    @property
    def is_number(self) -> bool:
        """Whether it is a number of Python, and no tensor."""
        return self.dtype in ("float", "int")

    @property
    def is_gradient(self) -> bool:
        """Whether it is what arrived at an operation of the backward."""
        return self.name == "gradient" or self.name.startswith("grad_")


_NAMES = {
    "_to_copy": "to",
    "_cdist_forward": "cdist",
    "_euclidean_dist": "cdist",
    "_fused_rms_norm": "rms_norm",
    "_thnn_fused_lstm_cell": "lstm_cell",
    "_thnn_fused_gru_cell": "gru_cell",
    "_weight_norm_interface": "weight_norm",
    "mkldnn_rnn_layer": "lstm",
    "_safe_softmax": "softmax",
}
_OF_BACKENDS = ("native_", "cudnn_", "miopen_", "mkldnn_")


def public_name(operation: str) -> str:
    """Returns what users know an operation of torch's as; one in place keeps its underscore.

    Example:
        >>> public_name("_softmax"), public_name("native_layer_norm"), public_name("div_")
        ('softmax', 'layer_norm', 'div_')
    """
    if operation in _NAMES:
        return _NAMES[operation]
    if operation.startswith("_scaled_dot_product"):
        return "scaled_dot_product_attention"
    short = operation.lstrip("_")
    for prefix in _OF_BACKENDS:
        short = short.removeprefix(prefix)
    return short.removesuffix("_forward").removesuffix("_with_total_weight") or operation


def name_of_node(node: str) -> str:
    """Returns the same for a node of the graph.

    Example:
        >>> name_of_node("SoftmaxBackward0"), name_of_node("torch::autograd::CopySlices")
        ('softmax', 'copy_slices')
    """
    base = re.sub(r"Backward\d*$", "", node.rpartition("::")[2])
    return public_name(re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", base).lower())


def shown_name(operation: str) -> str:
    """Returns the name of an operation as texts have it: in place or not, in the backward or not.

    Example:
        >>> shown_name("aten._log_softmax"), shown_name("nll_loss_forward"), shown_name("div_")
        ('log_softmax', 'nll_loss', 'div')
    """
    name = re.sub(r"^(aten(::|\.)|torch\.|prims\.)", "", operation)
    name = public_name(re.sub(r"\.\w+$", "", name))
    return re.sub(r"(_backward|_ex|(?<=[a-z0-9])_+)$", "", name) or operation


_FAMILY = re.compile(r"^(linalg_|special_)")
_SAME = {
    "addmm addbmm addmv addr baddbmm bmm chain_matmul dot einsum inner linear matmul mm multi_dot "
    "mv outer tensordot vdot": "matmul",
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution "
    "convolution_overrideable slow_conv2d thnn_conv2d": "convolution",
    "divide true_divide truediv div_tensor": "div",
    "multiply": "mul",
    "subtract rsub": "sub",
    "float_power": "pow",
    "half bfloat16 float copy type": "to",
    "arccos": "acos",
    "arcsin": "asin",
    "arctanh": "atanh",
    "arccosh": "acosh",
    "arctan2": "atan2",
    "vector_norm matrix_norm frobenius_norm nuclear_norm": "norm",
    "var_mean": "var",
    "std_mean": "std",
    "nll_loss2d nll_loss_nd": "nll_loss",
    "cross_entropy_loss": "cross_entropy",
    "masked_softmax": "softmax",
    "masked_log_softmax": "log_softmax",
    "batch_norm_legit batch_norm_legit_no_training batch_norm_with_update": "batch_norm",
    "inv": "inverse",
    "eig": "eigh",
    "masked_fill masked_scatter": "where",
}
_ALIASES = {name: one for names, one in _SAME.items() for name in names.split()}


def plain_name(operation: str) -> str:
    """Returns one name for operations that fail alike, of which texts may show several.

    Example:
        >>> plain_name("linalg_vector_norm"), plain_name("addmm_"), plain_name("_softmax")
        ('norm', 'matmul', 'softmax')
    """
    name = re.sub(r"_+(impl)?$", "", _FAMILY.sub("", shown_name(operation.lower()))) or operation
    return _ALIASES.get(name, name)


_OPERANDS = {
    "div": {"other": "divisor"},
    "fmod": {"other": "divisor"},
    "remainder": {"other": "divisor"},
    "pow": {"self": "base"},
    "matmul": {"self": "input", "mat2": "other", "batch1": "input", "batch2": "other"},
}
_ADDED = ("addmm", "addmv", "addbmm", "baddbmm", "addr")


def shown_operand(name: str, operation: str) -> str:
    """Returns what a text calls an operand: most of torch's names, but no ``self``.

    Example:
        >>> shown_operand("self", "log"), shown_operand("other", "div_")
        ('input', 'divisor')
    """
    if shown_name(operation) in _ADDED:
        # The layer's bias, most often; the input of the layer is the first factor.
        return {"self": "added", "mat2": "other", "batch2": "other"}.get(name, name)
    named = _OPERANDS.get(plain_name(operation), {})
    return named.get(name, "input" if name in ("self", "") else name)


@dataclass(frozen=True)
class Facts:
    """What is known of one operation, as the table of circumstances asks for it.

    Attributes:
        operation: As torch names it.
        phase: ``"forward"`` or ``"backward"``; None if not known.
        kind: What its result has: ``"nan"`` or ``"inf"``, or what else was explained.
        inputs: What it was given.
        result_dtype: Dtype of its result; empty if not known.
        size: Number of elements of its result.
        source: The line of the user.
        made_by: The operation that made it possible; empty for none.
    """

    operation: str
    phase: str | None
    kind: str
    inputs: tuple[Operand, ...] = ()
    result_dtype: str = ""
    size: int = 0
    source: str = ""
    made_by: str = ""

    @cached_property
    def op(self) -> str:
        """The plain name."""
        return plain_name(self.operation)

    @property
    def backward(self) -> bool:
        """Whether it is the gradient of the operation.

        It is not where the user's own backward, or a hook, calls the operation itself: then no
        gradient arrives at it.
        """
        if self.phase != "backward":
            return False
        return not self.inputs or self.gradient is not None

    def made(self, operand: Operand) -> tuple[str, ...]:
        """The plain names of what an operand was made by, the last operation first."""
        names = operand.made_by or ((self.made_by,) if self.made_by else ())
        return tuple(map(plain_name, names))

    @cached_property
    def operands(self) -> tuple[Operand, ...]:
        """Those of the forward operation."""
        return tuple(one for one in self.inputs if not one.is_gradient)

    @cached_property
    def gradient(self) -> Operand | None:
        """What arrived at an operation of the backward; None if not known."""
        return next((one for one in self.inputs if one.is_gradient), None)

    @cached_property
    def x(self) -> Operand:
        """The first operand; one without elements and numbers if none is known."""
        return self.named("self", "input", "x") or (*self.operands, NOTHING)[0]

    @cached_property
    def y(self) -> Operand:
        """The second operand, likewise; for a power also an exponent written in the line."""
        if (given := self.named("other", "exponent", "target")) is not None:
            return given
        if len(self.operands) > 1:
            return self.operands[1]
        written = _EXPONENT.search(self.source) if self.op == "pow" else None
        if written is None:
            return NOTHING
        value = float(written[1])
        return Operand("exponent", (), "float", value, value, int(value == 0))

    def named(self, *names: str) -> Operand | None:
        """Returns the first operand with one of these names."""
        return next((one for one in self.operands if one.name in names), None)

    @cached_property
    def dtype(self) -> str:
        """Dtype of the result; else that of the first operand of floating point."""
        known = (one.dtype for one in self.operands if one.dtype in LIMITS)
        return self.result_dtype or next(known, "")

    @property
    def limit(self) -> float:
        """The largest number of the dtype; that of float32 for one that is not listed."""
        return LIMITS.get(self.dtype, LIMITS["float32"])

    @cached_property
    def finite(self) -> bool:
        """Whether operands are known, and all of them are finite."""
        return bool(self.operands) and not any(one.nans or one.infs for one in self.operands)

    @cached_property
    def most(self) -> float:
        """The largest magnitude among the finite elements of all operands; NaN for none."""
        found = [one.most for one in self.operands if not math.isnan(one.most)]
        return max(found, default=math.nan)


_EXPONENT = re.compile(
    r"(?:\*\*|\bpow\((?:[^,()]*,)?|exponent=)\s*\(?(-?\d+(?:\.\d*)?(?:[eE]-?\d+)?)"
)
NOTHING = Operand("", (), "", math.nan, math.nan)
