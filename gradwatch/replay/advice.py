"""What to try, for the patterns that people meet."""

from __future__ import annotations

import re

from gradwatch.record.circumstances import (
    CIRCUMSTANCES,
    Circumstance,
    circumstance,
    circumstance_called,
)
from gradwatch.record.explanation import (
    ATTRIBUTE,
    NO_ARGUMENT,
    NOT_AGAIN,
    Explanation,
    facts_of,
)
from gradwatch.record.operations import Facts, plain_name, shown_name
from gradwatch.record.wording import number

ADVICE = {
    "empty": "Nothing is left to reduce, which gives 0 / 0: leave such a batch out, or write the "
    "mean as `x.sum() / max(x.numel(), 1)`.",
    # Roots and logarithms.
    "eps_is_zero": "The eps in this line is too small for {dtype} and becomes 0. Use one that it "
    "can hold, `x / (y + {eps})`, or compute this line in float32.",
    "log_zero": "Keep the input above 0: `{call}(x.clamp(min={eps}))`.",
    "log_negative": "{op} is not defined there. If rounding brings the input below 0, clamp it: "
    "`{call}(x.clamp(min={eps}))`; if it must be positive, make it so: "
    "`{call}(F.softplus(x) + {eps})`.",
    "log1p_edge": "Keep the input above -1: `torch.log1p(x.clamp(min=-1 + {edge}))`.",
    "log1p_below": "log1p is not defined there: `torch.log1p(x.clamp(min=-1 + {edge}))`.",
    "xlogy_zero": "Keep the second argument above 0: `torch.xlogy(x, y.clamp(min={eps}))`.",
    "sqrt_zero": "The slope of sqrt is infinite at 0. A norm is better written as "
    "`torch.linalg.vector_norm(x, dim=-1)`, whose gradient at 0 is 0; otherwise keep the input "
    "above 0: `torch.sqrt(x.clamp(min={tiny}))`.",
    "sqrt_negative": "sqrt is not defined there. If rounding brings the input below 0, clamp it: "
    "`torch.sqrt(x.clamp(min={tiny}))`.",
    "rsqrt_zero": "Add an eps under the root: `torch.rsqrt(x + {eps})`.",
    "rsqrt_negative": "rsqrt is not defined there. If rounding brings the input below 0, clamp it: "
    "`torch.rsqrt(x.clamp(min={eps}))`.",
    "norm_zero": "The norm has a corner at 0: its second derivative does not exist there, nor the "
    "first of a norm with p < 1. For a gradient penalty write "
    "`torch.sqrt(x.square().sum(dim=-1) + {tiny})`.",
    "hypot_zero": "hypot has no gradient at (0, 0): `torch.sqrt(x * x + y * y + {tiny})`.",
    # Divisions.
    "normalize_in_half": "The eps of F.normalize is 1e-12, which is 0 in float16: "
    "`F.normalize(x, dim=-1, eps={eps})`.",
    "spread_zero": "Values that are all equal have a standard deviation of 0. Add an eps: "
    "`(x - x.mean()) / (x.std(correction=0) + {eps})`.",
    "norm_divides": "A vector of zeros has no direction. Add an eps: "
    "`x / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) + {eps})`.",
    "rms_zero": "Add an eps under the root: "
    "`x / torch.sqrt(x.square().mean(dim=-1, keepdim=True) + {eps})`.",
    "count_zero": "Where nothing is counted, divide by 1: `x / y.clamp(min=1)`.",
    "sum_zero": "Keep the sum away from 0: `x / y.clamp(min={eps})` if it is never negative, "
    "`x / torch.where(y.abs() < {eps}, {eps}, y)` if it may be; `x / y.clamp(min=1)` only where it "
    "counts something.",
    "div_zero": "Keep the divisor away from 0: `x / y.clamp(min={eps})` if it is never negative, "
    "`x / torch.where(y.abs() < {eps}, {eps}, y)` if it may be.",
    "modulo_zero": "Keep the divisor away from 0: `{call}(x, y.clamp(min={eps}))`.",
    "inf_by_inf": "Both have grown beyond {dtype} before this line. Subtract in the logarithm "
    "instead, `torch.exp(torch.log_softmax(x, dim=-1))` for a softmax written by hand, or look at "
    "what made them Inf.",
    "reciprocal_zero": "Keep the input away from 0: `1 / x.clamp(min={eps})` if it is never "
    "negative, `1 / torch.where(x.abs() < {eps}, {eps}, x)` if it may be.",
    # Exponentials and powers.
    "exp_overflow": "Use the form that cannot overflow: `torch.softmax(x, dim=-1)`, "
    "`torch.logsumexp(x, dim=-1)`, `F.softplus(x)` for log(1 + exp(x)). Otherwise bound the input: "
    "`{call}(x.clamp(max={exp_max}))`.",
    "sinh_overflow": "Bound the input: `{call}(x.clamp(-{exp_max}, {exp_max}))`.",
    "pow_negative": "A power with a fractional or a learned exponent needs a base above 0: "
    "`x.clamp(min={eps}) ** p`.",
    "pow_zero": "An exponent below 1 has an infinite slope at 0, and a negative one is a division "
    "by 0: `x.clamp(min={eps}) ** p`.",
    # Softmax and its relatives.
    "softmax_masked": "In that row everything is masked. Mask with a finite number, "
    "`scores.masked_fill(mask, torch.finfo(scores.dtype).min)`, or use "
    "F.scaled_dot_product_attention, which gives 0 for such a row.",
    "softmax_inf": "The scores have overflown before this line. Scale them, "
    "`(q * q.shape[-1] ** -0.5) @ k.mT`, or compute them in float32.",
    "logsumexp_masked": "Where everything is masked, mask with a finite number: "
    "`scores.masked_fill(mask, torch.finfo(scores.dtype).min)`.",
    # Where functions end, and where they have poles.
    "arc_outside": "Rounding is enough to leave the range: `{call}(x.clamp(-1 + {edge}, 1 - "
    "{edge}))`.",
    "arc_edge": "{op} or its slope is infinite there: `{call}(x.clamp(-1 + {edge}, 1 - {edge}))`.",
    "logit_outside": "Bound the input: `torch.logit(x, eps={edge})`.",
    "logit_edge": "Bound the input, `torch.logit(x, eps={edge})`, or stay with the logits that the "
    "probability was made of.",
    "acosh_edge": "Keep the input above 1: `torch.acosh(x.clamp(min=1 + {edge}))`.",
    "atan2_zero": "The angle of (0, 0) is not defined: "
    "`torch.atan2(x, torch.where((x == 0) & (y == 0), 1.0, y))`.",
    "tan_pole": "tan grows without limit near odd multiples of pi / 2: bound the angle, "
    "`torch.tan(x.clamp(-1.5, 1.5))`.",
    "gamma_pole": "It is infinite at 0 and at negative integers: `{call}(x.clamp(min={eps}))`.",
    # Statistics and normalization.
    "too_few": "One element has no spread: `x.{op}(correction=0)` gives 0, or leave such a group "
    "out.",
    "running_variance": "Load the running statistics from a checkpoint, or start them anew: "
    "`norm.reset_running_stats()`.",
    "one_per_channel": "One value has no variance: use a larger batch (`drop_last=True` in the "
    "DataLoader), or a norm that does not need a batch, such as GroupNorm.",
    "constant": "Without spread only the eps is divided by. Give one that {dtype} can hold: "
    "`F.layer_norm(x, x.shape[-1:], eps={norm_eps})`.",
    "no_spread": "Where all values that are normalized together are equal, only the eps is divided "
    "by. Check that it is not 0: `F.layer_norm(x, x.shape[-1:], eps={norm_eps})`.",
    "weight_norm_zero": "A weight of zeros has no direction. Start it with other values: "
    "`torch.nn.init.normal_(weight, std=0.02)`.",
    # Losses.
    "target_masked": "Masked classes must not be targets, and label smoothing counts all classes. "
    "Mask with a finite number: `scores.masked_fill(mask, torch.finfo(scores.dtype).min)`.",
    "all_ignored": "The mean over no target is 0 / 0. Leave out batches in which each target is "
    "ignored or has the weight 0, or divide by hand: `F.cross_entropy(logits, target, "
    'reduction="sum") / (target != -100).sum().clamp(min=1)`.',
    "bce_edge": "Give the loss logits instead of probabilities: "
    "`F.binary_cross_entropy_with_logits(logits, target)`.",
    "kl_input": "Make the log-probabilities in one operation: "
    "`F.kl_div(F.log_softmax(logits, dim=-1), target, "
    'reduction="batchmean")`.',
    "kl_target": "The gradient of the target has its logarithm. Detach it, or give it as "
    'log-probabilities: `F.kl_div(log_p, log_target, reduction="batchmean", log_target=True)`.',
    "ctc": "A target that is longer than its input, with repeats counted twice, has no path: "
    "`torch.nn.CTCLoss(zero_infinity=True)`, or leave such examples out.",
    # Matrices.
    "equal_values": "The gradient of the vectors needs values that all differ, and for svd none "
    "that is 0. If only the values are used, take `torch.linalg.svdvals(A)` or "
    "`torch.linalg.eigvalsh(A)`; otherwise set them apart: "
    "`A + 1e-3 * torch.diag(torch.arange(A.shape[-1]))`.",
    "qr_rank": "The gradient of qr needs columns that are independent: "
    "`torch.linalg.qr(A + 1e-3 * torch.eye(A.shape[-1]))`.",
    "singular": "If the matrix may be singular, add to its diagonal: "
    "`A + 1e-3 * torch.eye(A.shape[-1])`.",
    # Infinities that were there.
    "zero_by_inf": "A mask of zeros does not remove an Inf, since 0 * Inf is NaN: "
    "`x.masked_fill(mask, 0.0)` does.",
    "inf_minus_inf": "Look at the lines that made these Inf. A mask is safer as a finite "
    "number, `torch.finfo(x.dtype).min / 2`.",
    "of_inf": "{op} is given an Inf. Look at the line that made it; a mask is safer as a finite "
    "number, `torch.finfo(x.dtype).min / 2`.",
    "mask": "A row that a mask of -inf covers whole is NaN after the softmax. Mask with a finite "
    "number: `scores.masked_fill(mask, torch.finfo(scores.dtype).min)`.",
    # Numbers that are too large.
    "cast": "They do not fit into {dtype}, which ends at {limit}. Scale them first, or use a wider "
    "range: `x.to(torch.bfloat16)`, `torch.autocast(device, dtype=torch.bfloat16)`.",
    "product": "Products grow with each factor. Stay with the logarithm of the product: "
    "`x.abs().clamp(min={eps}).log().sum(dim=-1)`.",
    "too_large": "Make its inputs smaller before this line: normalize them, bound them, or lower "
    "the learning rate if activations and weights have grown over the steps.",
    "divides_small": "The divisor is too close to 0: `x / y.clamp(min={eps})` bounds the result.",
    "gradient_too_large": "The gradient does not fit into float16 on its way back. Scale the loss "
    "with torch.amp.GradScaler, which lowers its scale by itself, or use "
    "`torch.autocast(device, dtype=torch.bfloat16)`.",
}
"""By the key of the circumstance; what is between backticks is code."""

LOG_OF = {
    "sub": "1 - p is 0 where p has rounded to 1. For a sigmoid, `F.logsigmoid(-x)` is log(1 - p), "
    "and `F.binary_cross_entropy_with_logits(logits, target)` is the loss; otherwise "
    "`{call}(x.clamp(min={eps}))`.",
    "softmax": "A softmax gives 0 for what is far from the largest: "
    "`torch.log_softmax(x, dim=-1)` computes both in one operation and stays finite.",
    "sigmoid": "A sigmoid gives 0 for very negative inputs: `F.logsigmoid(x)` stays finite, and a "
    "loss is best given the logits: `F.binary_cross_entropy_with_logits(logits, target)`.",
}
"""Advice for a logarithm of 0, by the operation that gave the 0."""

LOSS_OF_VARIANCE = (
    "This loss divides by the variance and takes its logarithm. Make the variance positive, "
    "`F.softplus(x) + {eps}`, or give the loss a larger eps."
)
LOSS_OF_RATE = (
    "With `log_input=False` this loss takes the logarithm of what it is given. Give it the "
    "logarithm of the rate instead: `F.poisson_nll_loss(x, target, log_input=True)`."
)
SQRT_OF_SPREAD = (
    "A variance of 0 has no finite slope under the root. Put the eps inside: "
    "`torch.sqrt(x.var(correction=0) + {eps})`."
)
MASKED = (
    "torch.where and masks send back a gradient of 0, and 0 times an infinite slope is NaN. "
    "Replace the bad inputs before this operation, too: `{call}(torch.where(good, x, {safe}))`."
)
MASKED_DIVISION = (
    "torch.where and masks send back a gradient of 0, and 0 / 0 is NaN. Replace the bad divisors "
    "before this operation, too: `x / torch.where(good, y, 1.0)`."
)
HALF = (
    "float16 ends at 65504: run this line in float32, `x.float()`, or the model in bfloat16, "
    "`torch.autocast(device, dtype=torch.bfloat16)`; or make the inputs smaller."
)
ATTENTION = (
    "For an example whose keys are all masked there is nothing to attend to. Leave one key "
    "unmasked, `mask[..., 0] = False`, or call the attention with `need_weights=False`."
)
CHECK = "Its inputs are not known here. Check for {phrase} first. "
FORWARD = (
    "The inputs of {op} are finite here and its result is not: look at the ranges above, and keep "
    "the input of this line away from where {op} is not defined or too large for {dtype}."
)
FORWARD_OF_BAD = "Look at what {op} was given, above: not all of it is finite."
BACKWARD = (
    "The forward of {op} is finite and its gradient is not: its slope is infinite or not defined "
    "at one of these inputs, or the result is too large for {dtype}. Keep the input of this line "
    "away from such points."
)
UNKNOWN = "Look at what this line was given: print its smallest and largest element before it."

INPUT = (
    "Look at {examples} of {argument} in the data set; `torch.isfinite(x).all()` in the loader "
    "finds others. Fill in what is missing, `torch.nan_to_num(x)`, or leave such examples out."
)
OTHER_TENSOR = (
    "Look at what {argument} was made from, and at the code that has written to it since."
)
ELSEWHERE = "Check what is computed there outside of torch, and what the tensor is made from."
WEIGHTS = (
    "No batch can mend that: load the last good checkpoint{since}. "
    '`gradwatch.watch(model, optimizer, on_nonfinite="skip")` leaves out the steps that spoil '
    "weights."
)
FIRST_WEIGHTS = "Look at how it was initialized, or at the checkpoint that it was loaded from."
UPDATED = (
    "Load the last good checkpoint{since}. The gradients of all steps that were taken before are "
    "finite, so the optimizer's own update made it, or the loop has written it: "
)
UPDATE = "lower the learning rate, and look at the optimizer's eps."
UPDATE_IN = {
    "float16": "in float16 the usual eps of 1e-8 is 0, and what is beyond 65504 is Inf. Keep the "
    "weights in float32 (master weights) and use `torch.autocast(device, dtype=torch.float16)`, or "
    "give the optimizer `eps=1e-4`.",
    "bfloat16": "lower the learning rate, look at the optimizer's eps, or keep the weights in "
    "float32 (master weights) and use `torch.autocast(device, dtype=torch.bfloat16)`.",
}
"""By the dtype of the weights."""
ATTRIBUTES = "Look at the code that writes to {parameter}, and start it anew with finite values."
BUFFERS = (
    "Running statistics do not recover: load them from a checkpoint{since}, or start them anew: "
    "`norm.reset_running_stats()`."
)
OUTPUT_GRADIENT = (
    "The loss is made outside of the model's forward, where this replay cannot see it. To get its "
    "line, give the whole closure, `watcher.explain(closure)`, or call "
    "`gradwatch.explain(model, *args, loss=...)`."
)
OUTPUT_OF_A_PART = (
    "Look at what is done with that output: it is not part of a forward that was run again. To get "
    "its line, give the whole closure, `watcher.explain(closure)`, or do it in the forward of the "
    "watched model, and call that."
)
CHANGED = (
    "Look for what differs from call to call: random numbers that are not torch's, what the loop "
    "changes in between, or operations of torch's that differ themselves, which "
    "`torch.use_deterministic_algorithms(True)` finds."
)
BACKWARD_ALONE = (
    "The forward that this backward belongs to was not seen. `torch.autograd.detect_anomaly()` "
    "around forward and backward shows where it ran."
)
ONE_OF = "Look at each of these lines: print the smallest and largest element of what it is given."
OVERFLOW = (
    "Bound the gradients: `torch.nn.utils.clip_grad_value_(model.parameters(), 1.0)`, since a norm "
    "that is infinite cannot be clipped by; and lower the learning rate."
)
SPIKE = (
    "Look at {examples}. If such steps are frequent, lower the learning rate, warm it up for "
    "longer, or clip: `gradwatch.watch(model, optimizer, clip=1.0)`."
)

USUAL = tuple(
    circumstance_called(key)
    for key in (
        *("log_zero", "log1p_edge", "xlogy_zero", "sqrt_zero", "rsqrt_zero", "hypot_zero"),
        *("div_zero", "reciprocal_zero", "pow_zero", "softmax_masked", "logsumexp_masked"),
        *("arc_edge", "logit_edge", "acosh_edge", "gamma_pole", "all_ignored", "bce_edge"),
        "kl_input",
    )
)
"""What it most often is, where only the operation is known."""

POLES = {
    "log_zero": "1.0",
    "log1p_edge": "0.0",
    "sqrt_zero": "1.0",
    "rsqrt_zero": "1.0",
    "reciprocal_zero": "1.0",
    "arc_edge": "0.0",
    "logit_edge": "0.5",
    "acosh_edge": "2.0",
    "exp_overflow": "0.0",
    "gamma_pole": "1.0",
}
"""Where the slope is infinite, with a number that is safe there."""

DIVISIONS = tuple(one.key for one in CIRCUMSTANCES if one.phrase.startswith("division by"))
NORM_EPS = {"float16": "1e-3"}
EPS = {"float16": "1e-4"}
TINY = {"float16": "1e-4", "float64": "1e-24"}
EDGE = {"float16": "1e-3", "bfloat16": "1e-2"}
EXP_MAX = {"float16": "10", "float64": "700"}


def advice_for(explanation: Explanation, by_update: bool = False) -> str:
    """Returns what to try: one to three sentences; code is between backticks.

    It says nothing that the explanation does not show, so it is general where that knows little,
    and empty where its notes say all there is.

    Args:
        explanation: The explanation.
        by_update: Whether no step with bad gradients was taken, so that an update with finite ones
            has spoiled the weights.
    """
    if explanation.kind == "spike":
        return SPIKE.format(examples=_largest_examples(explanation))
    if explanation.kind == "overflow":
        return OVERFLOW
    if explanation.candidates:
        return ONE_OF
    if explanation.origin == "input":
        return _for_input(explanation)
    if explanation.origin == "weights":
        return _for_weights(explanation, by_update)
    if explanation.origin == "output_gradient":
        return OUTPUT_OF_A_PART if explanation.module else OUTPUT_GRADIENT
    if explanation.origin == "not_found":
        if NOT_AGAIN in explanation.notes:
            return CHANGED
        return BACKWARD_ALONE if explanation.operation else ""
    return _for_operation(explanation)


def _for_input(explanation: Explanation) -> str:
    argument = explanation.argument
    if not argument:
        return ELSEWHERE
    if NO_ARGUMENT in explanation.notes:
        return OTHER_TENSOR.format(argument=argument)
    return INPUT.format(argument=argument, examples=_examples(explanation))


def _for_weights(explanation: Explanation, by_update: bool) -> str:
    since = explanation.since_step
    before = f", from before the update of step {since - 1:,}" if since > 1 else ""
    if ATTRIBUTE in explanation.notes:
        return ATTRIBUTES.format(parameter=explanation.parameter)
    if explanation.parameter.rpartition(".")[2] in ("running_mean", "running_var"):
        return BUFFERS.format(since=before)
    if 1 in (since, explanation.step):
        return FIRST_WEIGHTS
    if not by_update:
        return WEIGHTS.format(since=before)
    return UPDATED.format(since=before) + UPDATE_IN.get(explanation.result_dtype, UPDATE)


def _for_operation(explanation: Explanation) -> str:
    facts = facts_of(explanation)
    known = circumstance(facts)
    if known is not None:
        return _filled(_special(known, facts, explanation) or ADVICE[known.key], facts)
    if not facts.operation:
        return UNKNOWN
    usual = next((one for one in USUAL if one.about(facts.op)), None)
    if not facts.operands and usual is not None:
        check = CHECK.format(phrase=usual.told(facts))
        return check + _filled(ADVICE[usual.key], facts)
    if facts.backward:
        return _filled(BACKWARD, facts)
    return _filled(FORWARD if facts.finite else FORWARD_OF_BAD if facts.inputs else UNKNOWN, facts)


def _special(known: Circumstance, facts: Facts, explanation: Explanation) -> str:
    """Returns advice for what surrounds the operation; empty if there is none that fits better."""
    if _hidden_later(facts):
        if known.key in POLES:
            return MASKED.replace("{safe}", POLES[known.key])
        if known.key in DIVISIONS:
            return MASKED_DIVISION
    if "gaussian_nll_loss(" in facts.source or explanation.module_class == "GaussianNLLLoss":
        return LOSS_OF_VARIANCE
    if "poisson_nll_loss(" in facts.source or explanation.module_class == "PoissonNLLLoss":
        return LOSS_OF_RATE
    if known.key == "log_zero":
        return next((told for op, told in LOG_OF.items() if _made_of(facts, op)), "")
    if known.key == "sqrt_zero" and (_made_of(facts, "var") or _made_of(facts, "std")):
        return SQRT_OF_SPREAD
    if known.key in ("too_large", "product") and facts.dtype == "float16":
        return HALF
    if known.key == "softmax_masked" and explanation.module_class == "MultiheadAttention":
        return ATTENTION
    return ""


def _hidden_later(facts: Facts) -> bool:
    """Whether the forward leaves the bad element out, and a gradient of 0 meets an infinite slope.

    Among finite numbers there is no other NaN in such a backward than 0 * Inf.
    """
    gradient = facts.gradient
    if facts.backward:
        return facts.kind == "nan" and (gradient is None or gradient.zeros > 0)
    return bool(
        re.search(rf"\bwhere\(.*\b{re.escape(shown_name(facts.operation))}\(", facts.source)
    )


def _made_of(facts: Facts, operation: str) -> bool:
    """Whether the bad input came from an operation; the line tells it where nothing else does."""
    made = facts.made(facts.x)[:1] + ((plain_name(facts.made_by),) if facts.made_by else ())
    return operation in made if made else bool(re.search(rf"\b{operation}\(", facts.source))


def _filled(advice: str, facts: Facts) -> str:
    op, dtype = shown_name(facts.operation), facts.dtype
    return advice.format(
        op=op,
        call=f"torch.{facts.op}",
        dtype=dtype or "its dtype",
        limit=number(facts.limit),
        eps=EPS.get(dtype, "1e-6"),
        tiny=TINY.get(dtype, "1e-12"),
        edge=EDGE.get(dtype, "1e-6"),
        norm_eps=NORM_EPS.get(dtype, "1e-5"),
        exp_max=EXP_MAX.get(dtype, "80"),
    )


def _examples(explanation: Explanation) -> str:
    if not explanation.examples:
        return "the examples"
    if len(explanation.examples) == 1:
        return f"example {explanation.examples[0]}"
    return "these examples"


def _largest_examples(explanation: Explanation) -> str:
    if explanation.largest_examples:
        return f"example {explanation.largest_examples[0].name}, which has the largest share"
    return "the examples of this step"
