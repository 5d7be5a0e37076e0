"""The trainings whose numbers are compared: choices of the neutral ones, as each test needs them."""

from itertools import product

from tests.neutrality.covering import Row, covering_array
from tests.neutrality.params import every_row, pairs_slowly
from tests.neutrality.ranked_settings import (
    DDP,
    DDP_FORBIDDEN,
    FSDP,
    FSDP_FORBIDDEN,
    ON_FOUR_RANKS,
    TENSOR,
    TENSOR_FORBIDDEN,
)
from tests.neutrality.settings import AXES, FORBIDDEN

# A sparse gradient that is added to another makes a new tensor, like one that comes after
# zero_grad(): where a closure zeroes nothing but those, its evaluations cannot be told apart.
UNTOLD = [{"model": ["all_sparse"], "optimizer": ["LBFGS", "SAM", "SAM_by_hand"]}]

# Weights that are moved without an optimizer, as SAM by hand does, make each backward before the
# first step look like a step of its own, unless the optimizer was named.
MOVED = [{"optimizer": ["SAM_by_hand"], "watching": ["found"]}]

RECORDED = {"own_clip": ["no_clip", "clip", "watch_clip"], "watching": ["named", "found"]}
ALONE_RECORDED = every_row(covering_array({**AXES, **RECORDED}, [*FORBIDDEN, *UNTOLD, *MOVED]))
DDP_RECORDED = pairs_slowly({**DDP, **RECORDED}, [*DDP_FORBIDDEN, *MOVED])
FSDP_RECORDED = pairs_slowly({**FSDP, **RECORDED}, [*FSDP_FORBIDDEN, *MOVED])
TENSOR_RECORDED = pairs_slowly({**TENSOR, **RECORDED}, TENSOR_FORBIDDEN)
FOUR_RANKS_RECORDED = every_row(
    [{**setting, "own_clip": "watch_clip", "watching": "named"} for setting in ON_FOUR_RANKS]
)

# What does not occur in those pairs, on one of each kind of model.
KINDS: list[Row] = [
    *({"model": model, "precision": "float32"} for model in
      ("mlp", "cnn", "lstm", "transformer", "sparse", "complex")),
    {"model": "mlp", "precision": "float64"},
    {"model": "mixed", "precision": "own"},
]  # fmt: skip
DENSE = [kind for kind in KINDS if kind["model"] != "sparse"]


def _rows(kinds: list[Row], **axes: list[str]) -> list[Row]:
    """Return every kind of model with every combination of further choices."""
    combinations = [dict(zip(axes, row, strict=True)) for row in product(*axes.values())]
    return [{**kind, "optimizer": "SGD_bare", **row} for kind in kinds for row in combinations]


OTHER_NORMS = every_row(
    _rows(KINDS, norm_type=["1", "inf"], own_clip=["no_clip", "watch_clip"])
    + _rows(KINDS[:1], norm_type=["1", "inf"], own_clip=["multiplied"])
)
OWN_CLIPPED = every_row(
    [
        row
        for row in _rows(
            DENSE, own_clip=["clip", "clip_far", "clip_value", "multiplied", "replaced"]
        )
        if (row["model"], row["own_clip"]) != ("complex", "clip_value")  # torch has none
    ]
)
IN_TWO_DTYPES = every_row(
    _rows(KINDS[-1:], own_clip=["no_clip", "watch_clip"], micro_batches=["1", "3"])
)
MANAGED = every_row(
    _rows(
        KINDS, managed=["managed"], own_clip=["watch_clip", "watch_far"], micro_batches=["1", "3"]
    )
)

FEW_MODELS = {"model": ["mlp", "cnn", "transformer", "frozen"]}

# torch takes the norm of bfloat16 gradients in bfloat16. A watcher clips at steps only, where SAM
# by hand clips both of its gradients. Complex gradients come out equal but for rounding.
CLIPPED = {
    "own_clip": ["clip"],
    "watching": ["named"],
    "precision": ["float32", "float64", "autocast_bf16", "autocast_fp16"],
}
CLIPPED_ON_RANKS = {
    **CLIPPED,
    **FEW_MODELS,
    "optimizer": ["SGD", "Adam", "AdamW_foreach", "SAM"],
}
FUSED = [name for name in AXES["optimizer"] if "fused" in name]
CLIPPED_OTHERWISE = [{"optimizer": [*FUSED, "SAM_by_hand"]}, {"model": ["complex"]}]
ALONE_CLIPPED = every_row(covering_array({**AXES, **CLIPPED}, [*FORBIDDEN, *CLIPPED_OTHERWISE]))
# Theirs are parameters whose gradient is rounding alone (the bias before a BatchNorm, the key's
# bias), of which Adagrad makes a whole step.
FUSED_CLIPPED = every_row(
    covering_array(
        {**AXES, **CLIPPED, "optimizer": FUSED}, [*FORBIDDEN, {"model": ["cnn", "transformer"]}]
    )
)
DDP_CLIPPED = pairs_slowly({**DDP, **CLIPPED_ON_RANKS}, DDP_FORBIDDEN)
FSDP_CLIPPED = pairs_slowly({**FSDP, **CLIPPED_ON_RANKS}, FSDP_FORBIDDEN)
TENSOR_CLIPPED = pairs_slowly(
    {**TENSOR, **CLIPPED, "precision": ["float32", "float64"]}, TENSOR_FORBIDDEN
)
FOUR_RANKS_CLIPPED = every_row([row for row in ON_FOUR_RANKS if row.get("plan") != "partial"])

# A scaler that meets NaN skips by itself, and lowers its scale: that is another training.
SKIPPED = {
    "own_clip": ["no_clip", "watch_clip"],
    "watching": ["named"],
    "precision": ["float32", "float64", "autocast_bf16", "bf16"],
}
SKIPPED_ON_RANKS = {
    **SKIPPED,
    **FEW_MODELS,
    "optimizer": ["SGD", "AdamW_fused", "AdamW_foreach", "SAM"],
}
ALONE_SKIPPED = every_row(covering_array({**AXES, **SKIPPED}, [*FORBIDDEN, *UNTOLD, *MOVED]))
DDP_SKIPPED = pairs_slowly({**DDP, **SKIPPED_ON_RANKS}, DDP_FORBIDDEN)
FSDP_SKIPPED = pairs_slowly({**FSDP, **SKIPPED_ON_RANKS}, FSDP_FORBIDDEN)
TENSOR_SKIPPED = pairs_slowly(
    {**TENSOR, **SKIPPED, "precision": ["float32", "float64", "bf16"]}, TENSOR_FORBIDDEN
)
FOUR_RANKS_SKIPPED = every_row(ON_FOUR_RANKS)
