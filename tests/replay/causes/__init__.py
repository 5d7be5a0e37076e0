"""Causes of NaN and Inf, by kind."""

from tests.replay.causes import (
    attention,
    data,
    differentiation,
    generative,
    half,
    layers,
    losses,
    meant,
    structure,
    tensors,
)
from tests.replay.causes.cause import CAUSES

__all__ = [
    "CAUSES",
    "attention",
    "data",
    "differentiation",
    "generative",
    "half",
    "layers",
    "losses",
    "meant",
    "structure",
    "tensors",
]
