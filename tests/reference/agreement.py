"""Where a record does not say what it must, given what the gradients really were."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from tests.neutrality.covering import Row
from tests.neutrality.loop import MAX_NORM, OWN_CLIPS
from tests.support.float64 import total
from tests.support.optimizers import IN_TWO_PARTS, WITH_A_CLOSURE

from .taught import MAX_NORMS, norm_type_of

EXACT = 1e-5  # of norms that are taken in float32
# How far a training in that precision is from one in float64 that starts from the same weights.
OF_PRECISION = {
    "float32": 2e-5, "float64": 1e-6, "autocast_bf16": 5e-2, "bf16": 5e-2, "autocast_fp16": 5e-3,
    "own": 5e-2,
}  # fmt: skip
OF_CHOICE = {"fp16_hook": 2e-3, "mixed": 5e-2}  # a policy of fully_shard, or a model
ROUNDED = 1e-2  # a clipped gradient of bfloat16, beside the product that is recorded
THE_SAME_ON_ALL_RANKS = (
    "micro_batches", "weight", "grad_norm", "grad_norm_clipped", "clip_coef", "clip_threshold",
    "clipped", "outcome", "nonfinite_parameters", "lr", "loss_scale", "parameters",
    "clipped_parameters",
)  # fmt: skip


def disagreements(setting: Row, seen: Mapping[str, Any]) -> list[str]:
    """Return what is recorded otherwise than it was, step by step, for all parameters."""
    recorded, expected = seen["recorded"], seen["expected"]
    steps = list(enumerate(expected, start=1))
    if setting.get("watching", "named").startswith("found"):  # an optimizer is, once it steps
        skipped = sum(step["outcome"] == "skipped_scaler" for step in expected)
        steps = steps[-len(recorded) :] if len(expected) - skipped <= len(recorded) else steps
    if len(recorded) != len(steps):
        return [f"{len(recorded)} steps are recorded, not {len(steps)}"]
    numbers = [row["number"] for row in recorded]
    if numbers != sorted(set(numbers)):
        return [f"the steps are numbered {numbers}"]
    return [
        f"step {number} {text}"
        for row, (number, step) in zip(recorded, steps, strict=True)
        for text in _of_step(setting, row, step)
    ]


def differences_between_ranks(ranks: list[Mapping[str, Any]]) -> list[str]:
    """Return what the ranks recorded differently."""
    first = ranks[0]["recorded"]
    return [
        f"step {number} rank {rank} {column}: {row[column]}, and {other[column]} on rank 0"
        for rank, seen in enumerate(ranks)
        for number, (row, other) in enumerate(zip(seen["recorded"], first, strict=True), start=1)
        for column in THE_SAME_ON_ALL_RANKS
        if not _equal(row[column], other[column])
    ]


def tolerance_of(setting: Row) -> float:
    """Return how far a training may be from float64, relative to the norm."""
    choices = [value for choice, value in OF_CHOICE.items() if choice in setting.values()]
    return max([OF_PRECISION[setting.get("precision", "float32")], *choices])


def near(number: float, wanted: float, relative: float, absolute: float = 0.0) -> bool:
    """Return whether a number is as wanted; NaN and infinity are where they are wanted."""
    if not math.isfinite(wanted):
        return number == wanted or (math.isnan(number) and math.isnan(wanted))
    return abs(number - wanted) <= max(relative * abs(wanted), absolute)


def _of_step(setting: Row, row: Mapping[str, Any], step: Mapping[str, Any]) -> Iterator[str]:
    for column in ("outcome", "loss_scale"):
        if row[column] != step[column]:
            yield f"{column}: {row[column]}, not {step[column]}"
    yield from _of_micro_batches(setting, row["micro_batches"])
    p = norm_type_of(setting)
    if step["gradients"] is not None:
        yield from _of_norms("the gradients", row, step["gradients"], EXACT, p)
    if step["outcome"] == "applied":
        yield from _of_norms("float64", row, step["double"], tolerance_of(setting), p)
        yield from _of_clip(setting, row, step)
        yield from _of_what_is_left(setting, row, step["left"])
        yield from _of_local_norm(setting, row["grad_norm_local"], total(step["local"], p))


def _of_micro_batches(setting: Row, recorded: int) -> Iterator[str]:
    wanted = int(setting.get("micro_batches", "1"))
    several = setting.get("optimizer") in {**WITH_A_CLOSURE, **IN_TWO_PARTS}
    # On several ranks gradients that were thrown away without a step cannot be told from those in
    # use: a closure's evaluations are all counted.
    counted = {wanted * evaluations for evaluations in range(1, 10)}
    if recorded != wanted and not ("layout" in setting and several and recorded in counted):
        yield f"micro_batches: {recorded}, not {wanted}"


def _of_local_norm(setting: Row, recorded: float, own: float) -> Iterator[str]:
    wrapped = setting.get("layout", "").startswith("ddp")
    wanted = own if wrapped else math.nan
    if not near(recorded, wanted, tolerance_of(setting)):
        yield f"grad_norm_local: {recorded}, not {wanted}"


def _of_norms(
    whose: str,
    row: Mapping[str, Any],
    norms: Mapping[str, float],
    tolerance: float,
    p: float,
    columns: tuple[str, str] = ("grad_norm", "parameters"),
) -> Iterator[str]:
    whole, (column, parameters) = total(norms, p), columns
    if not near(row[column], whole, tolerance):
        yield f"{column}: {row[column]}, {whose} say {whole}"
    if set(row[parameters]) != set(norms):
        yield f"{parameters}: {sorted(row[parameters])}, not {sorted(norms)}"
    for name, norm in norms.items():
        recorded = row[parameters].get(name, norm)
        if not near(recorded, norm, tolerance, tolerance * whole if whole < math.inf else 0.0):
            yield f"{column} of {name}: {recorded}, {whose} say {norm}"


def _of_what_is_left(
    setting: Row, row: Mapping[str, Any], left: Mapping[str, float] | None
) -> Iterator[str]:
    """Compare the norms after the clip with those of the gradients that the step left behind."""
    if left is None:
        return
    rounds = setting.get("own_clip") == "watch_clip" and {"bf16", "own"} & set(setting.values())
    columns = ("grad_norm_clipped", "clipped_parameters")
    tolerance = ROUNDED if rounds else EXACT
    yield from _of_norms("those left", row, left, tolerance, norm_type_of(setting), columns)


def _of_clip(setting: Row, row: Mapping[str, Any], step: Mapping[str, Any]) -> Iterator[str]:
    clip, p = setting.get("own_clip", "no_clip"), norm_type_of(setting)
    managed = step["gradients"] is None
    whole = total(step["double"] if managed else step["gradients"], p)
    tolerance = EXACT if not managed else tolerance_of(setting)
    if clip in ("no_clip", "clip_far", "watch_far"):
        coefficient, tolerance = 1.0, 0.0
    elif clip == "watch_clip":
        coefficient = min(1.0, MAX_NORMS[p] / (whole + 1e-6))
        if not near(row["clip_threshold"], MAX_NORMS[p], EXACT):
            yield f"clip_threshold: {row['clip_threshold']}, not {MAX_NORMS[p]}"
    elif clip == "clip":
        # The loop's own clip writes gradients in their own dtype, whose norms are measured again.
        coefficient, tolerance = min(1.0, MAX_NORM / (whole + 1e-6)), ROUNDED
    else:
        assert clip in OWN_CLIPS
        coefficient = total(step["left"], p) / whole
    if not near(row["clip_coef"], coefficient, tolerance):
        yield f"clip_coef: {row['clip_coef']}, not {coefficient}"
    if row["clipped"] != (coefficient < 1.0):
        yield f"clipped: {row['clipped']} with a coefficient of {coefficient}"
    product = row["clip_coef"] * row["grad_norm"]
    if not near(row["grad_norm_clipped"], product, 1e-6 if coefficient < 1 else 0.0):
        yield f"grad_norm_clipped: {row['grad_norm_clipped']}, not clip_coef * grad_norm"


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, Mapping):
        return left.keys() == right.keys() and all(_equal(left[key], right[key]) for key in left)
    return left == right or (isinstance(left, float) and near(left, right, 1e-6))
