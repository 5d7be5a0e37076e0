"""Under which circumstances an operation makes a NaN or an Inf: what its operands show."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from gradwatch.record.operations import SMALLEST, Facts, shown_name
from gradwatch.record.wording import number


@dataclass(frozen=True, slots=True)
class Circumstance:
    """One pattern that people meet.

    Attributes:
        key: Its name.
        operations: Plain names of the operations that it is about, or ``"*"`` for all.
        when: Whether the facts show it.
        phrase: It in a few words. ``{op}`` is the operation; ``{of}`` is "of", or "at" for the
            gradient of the operation, where "the gradient of" comes before all of it.
    """

    key: str
    operations: str
    when: Callable[[Facts], bool]
    phrase: str

    def about(self, operation: str) -> bool:
        """Whether it is about this operation, given by its plain name."""
        return self.operations == "*" or operation in self.operations.split()

    def told(self, facts: Facts) -> str:
        """Returns the phrase for these facts."""
        told = self.phrase.format(
            op="division" if facts.op == "div" else shown_name(facts.operation),
            of="at" if facts.backward else "of",
            low=number(facts.x.low),
            high=number(facts.x.high),
            most=number(facts.most),
            dtype=facts.dtype or "its dtype",
            limit=number(facts.limit),
        )
        return f"the gradient of {told}" if facts.backward else told


def circumstance(facts: Facts) -> Circumstance | None:
    """Returns the first circumstance that the facts show; None if they show none that is known."""
    if facts.kind not in ("nan", "inf") or not facts.operation:
        return None
    for one in CIRCUMSTANCES:
        if one.about(facts.op) and one.when(facts):
            return one
    return None


def circumstance_called(key: str) -> Circumstance:
    """Returns the circumstance with this key."""
    return next(one for one in CIRCUMSTANCES if one.key == key)


def _infinite_at_zero(facts: Facts) -> bool:
    """Whether a 0 is what matters: with a number below 0 as well, that is what gives the NaN."""
    x = facts.x
    return x.zeros > 0 and (facts.backward or facts.kind == "inf" or not x.low < 0)


def _below(bound: float) -> Callable[[Facts], bool]:
    return lambda f: not f.backward and f.kind == "nan" and f.x.low < bound


def _outside(low: float, high: float) -> Callable[[Facts], bool]:
    return lambda f: not f.backward and f.kind == "nan" and (f.x.low < low or f.x.high > high)


def _at_edge(low: float, high: float) -> Callable[[Facts], bool]:
    return lambda f: (f.backward or f.kind == "inf") and (f.x.low <= low or f.x.high >= high)


def _divides_by_zero(facts: Facts) -> bool:
    return facts.y.zeros > 0


def _divisor(facts: Facts) -> str:
    """Returns what a divisor of 0 is: ``"spread"``, ``"norm"``, ``"mean square"`` and so on."""
    if not _divides_by_zero(facts):
        return ""
    made = facts.made(facts.y)
    if not made:
        return _divisor_in_line(facts)
    if made[0] == "sqrt":
        return _ROOTS.get(made[1:3]) or _ROOTS.get(made[1:2], "other")
    if facts.y.dtype in _WHOLE or "to" in made[:2]:
        return "count"
    return _MADE_BY.get(made[0], "other")


def _divisor_in_line(facts: Facts) -> str:
    """Returns the same where it is not known what made the divisor."""
    if facts.y.dtype in _WHOLE:
        return "count"
    for what, names in (("spread", "std|var"), ("norm", "norm|vector_norm")):
        if re.search(rf"\b({names})\(", facts.source):
            return what
    return "other"


def _divides_by(what: str) -> Callable[[Facts], bool]:
    return lambda facts: _divisor(facts) == what


_WHOLE = ("int", "bool", "int64", "int32", "int16", "int8", "uint8")
_ROOTS = {
    ("sum", "square"): "norm",
    ("add", "square"): "norm",
    ("mean", "square"): "mean square",
    ("var",): "spread",
}
_MADE_BY = {
    "std": "spread",
    "var": "spread",
    "norm": "norm",
    **dict.fromkeys(("sum", "index_add", "scatter_add", "segment_reduce"), "sum"),
}


def _eps_is_zero(facts: Facts) -> bool:
    """Whether the line adds an eps that is 0 in the dtype of the operands, and that was needed."""
    found = re.findall(r"(?<![\w.])\d+(?:\.\d*)?[eE]-\d+", facts.source)
    needed = facts.y.zeros if facts.op == "div" else facts.x.zeros
    return needed > 0 and any(float(one) <= SMALLEST.get(facts.dtype, 0.0) for one in found)


def _normalizes_in_half(facts: Facts) -> bool:
    """Whether the eps of ``F.normalize`` is the usual 1e-12, which is 0 in float16."""
    usual_eps = re.search(r"\bnormalize\((?!.*eps)", facts.source)
    return facts.dtype == "float16" and _divides_by_zero(facts) and bool(usual_eps)


def _power_of_negative(facts: Facts) -> bool:
    # The gradient of the exponent has the logarithm of the base.
    learned = facts.backward and len(facts.operands) > 1 and not facts.y.is_number
    return facts.kind == "nan" and facts.x.low < 0 and (learned or not facts.backward)


def _power_of_zero(facts: Facts) -> bool:
    if not facts.x.zeros:
        return False
    if not facts.backward:
        return facts.y.low < 0
    # A NaN is 0 * Inf, and there is no other Inf among finite numbers than that of a pole.
    return facts.kind == "nan" or facts.y.low < 1


def _exp_overflows(facts: Facts) -> bool:
    return facts.x.high > math.log(facts.limit)


def _all_minus_infinity(facts: Facts) -> bool:
    """Whether each Inf is negative: what is bad then is a row that has nothing else."""
    x = facts.x
    return x.infs > 0 and x.negative_infs == x.infs and not x.nans


def _has_plus_infinity(facts: Facts) -> bool:
    x = facts.x
    known = x.negative_infs is not None
    return facts.kind == "nan" and known and x.infs > (x.negative_infs or 0) and not x.nans


def _finite_forward(facts: Facts) -> bool:
    return not facts.backward and facts.finite


def _two_finite(facts: Facts) -> bool:
    # A number of Python, which may be infinite, is not among the operands.
    return _finite_forward(facts) and len(facts.operands) > 1


def _infinite_forward(facts: Facts) -> bool:
    return _finite_forward(facts) and facts.kind == "inf"


def _single_element(facts: Facts) -> bool:
    if facts.kind != "nan" or not facts.finite:
        return False
    return 1 in (facts.x.shape or (1,)) if facts.backward else facts.size == facts.x.size


def _one_per_channel(facts: Facts) -> bool:
    shape = facts.x.shape
    return len(shape) > 1 and facts.x.size == shape[1]


def _variance_is_bad(facts: Facts) -> bool:
    variance = facts.named("running_var")
    return variance is not None and (variance.zeros > 0 or variance.low < 0)


def _constant(facts: Facts) -> bool:
    return facts.x.size > 0 and facts.x.low == facts.x.high and not facts.x.infs


def _zero_by_infinity(facts: Facts) -> bool:
    x, y = facts.x, facts.y
    return facts.kind == "nan" and bool((x.zeros and y.infs) or (y.zeros and x.infs))


def _of_infinity(facts: Facts) -> bool:
    return facts.kind == "nan" and not facts.backward and any(one.infs for one in facts.operands)


REDUCED = "sum mean cumsum"
COMBINED = "matmul convolution add sub mul index_add scatter_add bilinear"
SQUARES = "mse_loss l1_loss smooth_l1_loss huber_loss pow square norm var std"
NORMS = "batch_norm layer_norm group_norm instance_norm rms_norm"

_TABLE: tuple[tuple[str, str, Callable[[Facts], bool], str], ...] = (
    (
        "empty",
        "*",
        lambda f: not f.backward and f.kind == "nan" and 0 in f.x.shape,
        "{op} of an empty tensor",
    ),
    # Roots and logarithms.
    (
        "eps_is_zero",
        "div log rsqrt reciprocal",
        _eps_is_zero,
        "{op} with an eps that is 0 in {dtype}",
    ),
    ("log_zero", "log log2 log10", _infinite_at_zero, "{op} {of} 0"),
    ("log_negative", "log log2 log10", _below(0), "{op} of a negative number, down to {low}"),
    (
        "log1p_edge",
        "log1p",
        lambda f: (f.backward or f.kind == "inf") and f.x.low <= -1,
        "{op} {of} -1",
    ),
    ("log1p_below", "log1p", _below(-1), "{op} of a number below -1, down to {low}"),
    ("xlogy_zero", "xlogy", lambda f: f.y.zeros > 0, "{op} with a 0 under the logarithm"),
    ("sqrt_zero", "sqrt", _infinite_at_zero, "{op} {of} 0"),
    ("sqrt_negative", "sqrt", _below(0), "{op} of a negative number, down to {low}"),
    ("rsqrt_zero", "rsqrt", _infinite_at_zero, "{op} {of} 0"),
    ("rsqrt_negative", "rsqrt", _below(0), "{op} of a negative number, down to {low}"),
    ("norm_zero", "norm", lambda f: f.backward and f.x.zeros > 0, "{op} {of} 0"),
    (
        "hypot_zero",
        "hypot",
        lambda f: f.backward and f.x.zeros > 0 and f.y.zeros > 0,
        "{op} {of} (0, 0)",
    ),
    # Divisions.
    ("normalize_in_half", "div", _normalizes_in_half, "division by a norm of 0"),
    (
        "spread_zero",
        "div",
        _divides_by("spread"),
        "division by a standard deviation or variance of 0",
    ),
    ("norm_divides", "div", _divides_by("norm"), "division by a norm of 0"),
    ("rms_zero", "div", _divides_by("mean square"), "division by a root mean square of 0"),
    ("count_zero", "div", _divides_by("count"), "division by a count of 0"),
    ("sum_zero", "div", _divides_by("sum"), "division by a sum of 0"),
    ("div_zero", "div", _divides_by_zero, "division by 0"),
    ("modulo_zero", "fmod remainder", lambda f: f.y.zeros > 0, "{op} by 0"),
    ("inf_by_inf", "div", lambda f: f.kind == "nan" and f.x.infs > 0 and f.y.infs > 0, "Inf / Inf"),
    ("reciprocal_zero", "reciprocal", lambda f: f.x.zeros > 0, "{op} {of} 0"),
    # Exponentials and powers.
    ("exp_overflow", "exp exp2 expm1", _exp_overflows, "{op} {of} {high}, beyond {dtype}"),
    (
        "sinh_overflow",
        "sinh cosh",
        _infinite_forward,
        "{op} of numbers up to {most}, beyond {dtype}",
    ),
    ("pow_negative", "pow", _power_of_negative, "{op} {of} a negative number"),
    ("pow_zero", "pow", _power_of_zero, "{op} {of} 0"),
    # Softmax and its relatives.
    ("softmax_masked", "softmax log_softmax", _all_minus_infinity, "{op} {of} a row of -inf"),
    ("softmax_inf", "softmax log_softmax", _has_plus_infinity, "{op} {of} a row with +inf"),
    (
        "logsumexp_masked",
        "logsumexp logaddexp logaddexp2 logcumsumexp",
        _all_minus_infinity,
        "{op} {of} nothing but -inf",
    ),
    # Where functions end, and where they have poles.
    (
        "arc_outside",
        "acos asin atanh erfinv",
        _outside(-1, 1),
        "{op} outside of [-1, 1], {low} to {high}",
    ),
    ("arc_edge", "acos asin atanh erfinv", _at_edge(-1, 1), "{op} {of} 1 or -1"),
    ("logit_outside", "logit", _outside(0, 1), "{op} outside of [0, 1], {low} to {high}"),
    ("logit_edge", "logit", _at_edge(0, 1), "{op} {of} 0 or 1"),
    ("acosh_edge", "acosh", lambda f: f.x.low <= 1, "{op} {of} 1 or less"),
    (
        "atan2_zero",
        "atan2",
        lambda f: f.backward and f.x.zeros > 0 and f.y.zeros > 0,
        "{op} {of} (0, 0)",
    ),
    ("tan_pole", "tan", lambda f: f.finite, "{op}"),
    (
        "gamma_pole",
        "lgamma digamma polygamma mvlgamma",
        lambda f: f.x.low <= 0,
        "{op} {of} 0 or a negative number",
    ),
    # Statistics and normalization.
    ("too_few", "std var", _single_element, "{op} of a single element"),
    (
        "running_variance",
        "batch_norm",
        _variance_is_bad,
        "{op} with a running variance of 0 or less",
    ),
    ("one_per_channel", "batch_norm", _one_per_channel, "{op} of one value per channel"),
    ("constant", NORMS, _constant, "{op} of values that are all equal"),
    ("no_spread", NORMS, lambda f: f.finite, "{op}"),
    (
        "weight_norm_zero",
        "weight_norm",
        lambda f: f.finite and f.x.zeros > 0,
        "{op} of a weight with a norm of 0",
    ),
    # Losses.
    (
        "target_masked",
        "nll_loss cross_entropy",
        lambda f: not f.backward and f.x.infs > 0,
        "{op} with a class that is masked by -inf",
    ),
    (
        "all_ignored",
        "nll_loss cross_entropy",
        lambda f: f.kind == "nan" and _finite_forward(f),
        "{op} without a target that counts",
    ),
    (
        "bce_edge",
        "binary_cross_entropy",
        lambda f: f.x.low <= 0 or f.x.high >= 1,
        "{op} {of} a probability of 0 or 1",
    ),
    ("kl_input", "kl_div", lambda f: f.x.infs > 0, "{op} of log-probabilities of -inf"),
    ("kl_target", "kl_div", lambda f: f.backward and f.y.zeros > 0, "{op} {of} a target of 0"),
    (
        "ctc",
        "ctc_loss",
        lambda f: f.finite and (f.kind == "inf" or f.backward),
        "{op} of a target that does not fit its input",
    ),
    # Matrices.
    ("equal_values", "svd eigh", lambda f: f.backward, "{op}"),
    ("qr_rank", "qr", lambda f: f.backward, "{op}"),
    (
        "singular",
        "logdet slogdet det inverse pinv cholesky solve solve_triangular lu lstsq",
        lambda f: f.finite,
        "{op}",
    ),
    # Infinities that were there.
    ("zero_by_inf", "mul", _zero_by_infinity, "0 * Inf"),
    ("inf_minus_inf", "add sub sum mean cumsum var std", _of_infinity, "Inf - Inf"),
    ("of_inf", "*", _of_infinity, "{op} of Inf"),
    ("mask", "where", _infinite_forward, "{op} with Inf"),
    # Numbers that are too large.
    (
        "cast",
        "to",
        lambda f: not f.backward and f.most > f.limit,
        "numbers up to {most} as {dtype}",
    ),
    ("product", "prod cumprod", _infinite_forward, "{op} beyond {dtype}, which ends at {limit}"),
    ("too_large", COMBINED, _two_finite, "{op} beyond {dtype}, which ends at {limit}"),
    ("too_large", REDUCED, _finite_forward, "{op} beyond {dtype}, which ends at {limit}"),
    ("too_large", SQUARES, _infinite_forward, "{op} beyond {dtype}, which ends at {limit}"),
    (
        "divides_small",
        "div",
        lambda f: f.kind == "inf" and _two_finite(f),
        "{op} beyond {dtype}, which ends at {limit}",
    ),
    (
        "gradient_too_large",
        "*",
        lambda f: f.backward and f.kind == "inf" and f.dtype == "float16",
        "{op}, beyond float16, which ends at 65504",
    ),
)

CIRCUMSTANCES = tuple(Circumstance(*row) for row in _TABLE)
"""The first one that fits is taken: the special ones come first."""
