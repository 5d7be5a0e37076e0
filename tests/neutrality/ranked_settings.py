"""Which choices there are for a training on several ranks, and which of them do not go together."""

from .covering import Row
from .loop import WATCHING

LOOP = {
    "micro_batches": ["1", "3"],
    "own_clip": ["no_clip", "clip"],
    "zeroing": ["to_none", "to_zero"],
    "watching": list(WATCHING),
    "sync": ["last_sync", "every_sync"],
}
SCALED_WITHOUT_CLOSURE = {
    "optimizer": ["LBFGS", "SAM", "SAM_by_hand"],
    "precision": ["autocast_fp16"],
}

DDP = {
    "layout": ["ddp2"],
    "model": [
        "mlp", "cnn", "lstm", "transformer", "checkpoint", "reentrant", "frozen", "sparse",
        "complex",
    ],
    "optimizer": [
        "SGD_bare", "SGD", "Adam", "AdamW_fused", "AdamW_foreach", "Adagrad_fused", "RMSprop",
        "LBFGS", "SAM", "SAM_by_hand",
    ],
    "precision": ["float32", "float64", "autocast_bf16", "bf16", "autocast_fp16"],
    "buckets": ["copied", "bucket_view"],
    "graph": ["plain_graph", "find_unused", "static_graph"],
    "hook": ["no_hook", "fp16_hook"],
    "watched": ["wrapper", "module"],
    **LOOP,
}  # fmt: skip
# What torch cannot do on CPUs, alone or under DDP.
DDP_FORBIDDEN = [
    SCALED_WITHOUT_CLOSURE,
    {"model": ["sparse"], "optimizer": [
        "SGD", "Adam", "AdamW_fused", "AdamW_foreach", "Adagrad_fused", "RMSprop",
    ]},
    {"model": ["sparse"], "own_clip": ["clip"]},
    {"model": ["sparse"], "hook": ["fp16_hook"]},
    {"model": ["complex"], "optimizer": ["AdamW_fused", "Adagrad_fused"]},
    {"model": ["complex"], "precision": ["bf16", "autocast_fp16"]},
    {"model": ["complex"], "hook": ["fp16_hook"]},
    {"model": ["lstm"], "precision": ["autocast_fp16"]},
    {"model": ["frozen"], "graph": ["plain_graph"]},
    {"model": ["reentrant"], "graph": ["find_unused"]},
    {"graph": ["static_graph"], "micro_batches": ["3"], "sync": ["last_sync"]},
]  # fmt: skip

FSDP = {
    "layout": ["fsdp2"],
    "model": ["mlp", "cnn", "lstm", "transformer", "checkpoint", "reentrant", "frozen"],
    "optimizer": [
        "SGD_bare", "SGD", "Adam", "AdamW_fused", "AdamW_foreach", "RMSprop", "SAM", "SAM_by_hand",
    ],
    "precision": ["float32", "float64", "autocast_bf16", "bf16", "autocast_fp16"],
    "units": ["each", "root"],
    "policy": ["one_dtype", "mixed"],
    "gathering": ["reshard", "keep"],
    **LOOP,
}  # fmt: skip
FSDP_FORBIDDEN = [
    SCALED_WITHOUT_CLOSURE,
    {"model": ["lstm"], "precision": ["autocast_fp16"]},
    {"policy": ["mixed"], "precision": ["float64", "autocast_bf16", "bf16", "autocast_fp16"]},
    {"policy": ["mixed"], "model": ["cnn"]},  # its buffers stay in float32
    {
        "policy": ["mixed"],
        "model": ["frozen"],
    },  # its layer without a gradient has nothing to reduce
]

TENSOR = {
    "layout": ["tensor1"],
    "model": ["mlp"],
    "optimizer": ["SGD", "Adam", "AdamW_foreach", "RMSprop", "SAM"],
    "precision": ["float32", "float64", "bf16"],
    "plan": ["whole", "partial"],
    **LOOP,
    "sync": ["every_sync"],
}
TENSOR_FORBIDDEN = [
    # torch's clip and the foreach optimizers take no mix of split and plain tensors.
    {"plan": ["partial"], "own_clip": ["clip"]},
    {"plan": ["partial"], "optimizer": ["AdamW_foreach"]},
]

ON_FOUR_RANKS: list[Row] = [
    {"layout": "ddp4", "hook": "no_hook", "model": "mlp", "optimizer": "AdamW_fused",
     "micro_batches": "3", "own_clip": "clip"},
    {"layout": "fsdp2x2", "units": "each", "gathering": "reshard", "model": "mlp",
     "optimizer": "AdamW_foreach", "micro_batches": "3", "own_clip": "clip"},
    {"layout": "fsdp2x2", "units": "root", "policy": "mixed", "model": "transformer",
     "optimizer": "SGD", "watching": "found_statistics"},
    {"layout": "fsdp4", "units": "each", "gathering": "keep", "model": "checkpoint",
     "optimizer": "Adam", "zeroing": "to_zero", "micro_batches": "3", "sync": "every_sync"},
    {"layout": "tensor2", "plan": "partial", "model": "mlp", "optimizer": "SGD",
     "watching": "statistics"},
]  # fmt: skip
