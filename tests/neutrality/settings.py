"""Which choices there are for a training in one process, and which of them do not go together."""

from tests.support.optimizers import IN_TWO_PARTS, OPTIMIZERS, WITH_A_CLOSURE
from tests.support.zoo import MODELS

from .covering import covering_array
from .loop import WATCHING
from .precisions import PRECISIONS

SPARSE = ("sparse", "all_sparse")
FOR_SPARSE = ("SGD_bare", "SparseAdam", "LBFGS", "SAM", "SAM_by_hand")

AXES = {
    "model": list(MODELS),
    "optimizer": list(OPTIMIZERS),
    "precision": list(PRECISIONS),
    "micro_batches": ["1", "3"],
    "own_clip": ["no_clip", "clip"],
    "zeroing": ["to_none", "to_zero"],
    "watching": list(WATCHING),
}

# What torch itself cannot do, on CPUs.
FORBIDDEN = [
    {"optimizer": ["SparseAdam"], "model": [name for name in MODELS if name != "all_sparse"]},
    {"model": SPARSE, "optimizer": [name for name in OPTIMIZERS if name not in FOR_SPARSE]},
    {"model": SPARSE, "own_clip": ["clip"]},
    {"model": ["complex"], "optimizer": ["AdamW_fused", "Adagrad_fused"]},
    {"model": ["complex"], "precision": ["bf16", "autocast_fp16"]},
    {"model": ["lstm"], "precision": ["autocast_fp16"]},
    {"optimizer": [*WITH_A_CLOSURE, *IN_TWO_PARTS], "precision": ["autocast_fp16"]},
]

SETTINGS = covering_array(AXES, FORBIDDEN, strength=3)
