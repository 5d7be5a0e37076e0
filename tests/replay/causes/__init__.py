"""Causes of NaN and Inf, by kind."""

from tests.replay.causes import attention, layers, losses
from tests.replay.causes.cause import CAUSES

__all__ = ["CAUSES", "attention", "layers", "losses"]
