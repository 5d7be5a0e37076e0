"""An explanation as a replay makes it, and the forward of a micro-batch as the watcher keeps it."""

import math
from dataclasses import replace

import torch

from gradwatch import Explanation
from gradwatch.hooks.context import ForwardContext
from gradwatch.hooks.forwards import ForwardCall
from gradwatch.record.explanation import Operand

OF_A_LOG = Explanation(
    step=120,
    optimizer="SGD",
    micro_batch=1,
    origin="operation",
    phase="forward",
    kind="nan",
    module="encoder.norm",
    module_class="Norm",
    operation="log",
    file="/home/me/model.py",
    line=42,
    source="return scores.log()",
    examples=(3, 17),
    count=2,
    nan_count=2,
    size=64,
    result_shape=(32, 2),
    result_dtype="float32",
    inputs=(Operand("self", (32, 2), "float32", math.nan, 0.5, zeros=2, infs=1),),
    made_possible_by=Explanation(
        origin="operation", operation="softmax", file="/home/me/model.py", line=39, source="softmax"
    ),
    advice="Clamp the argument of the logarithm.",
)


def explanation(step=120, **changes):
    """NaN by a logarithm in step 120, with changes."""
    return replace(OF_A_LOG, step=step, **changes)


def call(*args, **kwargs):
    """The forward of a module that was given these arguments."""
    return ForwardCall(torch.nn.Identity(), args, kwargs, [], ForwardContext.now())
