"""gradwatch: know what the gradients do while a PyTorch model trains."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gradwatch.accumulate.noise_scale import NoiseScale
from gradwatch.accumulate.policies import AccumulateByNoiseScale, AccumulatePolicy
from gradwatch.clip.adagc import AdaGC
from gradwatch.clip.agc import AdaptiveGradientClip
from gradwatch.clip.autoclip import AutoClip
from gradwatch.clip.fixed import ClipByNorm, ClipByValue
from gradwatch.clip.policy import ClipDecision, ClipPolicy
from gradwatch.clip.robust import RobustClip
from gradwatch.clip.zclip import ZClip
from gradwatch.errors import AccumulationError, NonFiniteGradientError
from gradwatch.hessian.every import CurvatureEvery
from gradwatch.history import History, load
from gradwatch.record.folder.writer import RunFolder
from gradwatch.record.records import Event, GradwatchWarning, RecordBatch, Sink, StepRecord
from gradwatch.watcher import Watcher, watch

if TYPE_CHECKING:
    from gradwatch.gradcheck.check import check_gradients
    from gradwatch.hessian.curvature import curvature

__version__ = "0.1.0"

__all__ = [
    "AccumulateByNoiseScale",
    "AccumulatePolicy",
    "AccumulationError",
    "AdaGC",
    "AdaptiveGradientClip",
    "AutoClip",
    "ClipByNorm",
    "ClipByValue",
    "ClipDecision",
    "ClipPolicy",
    "CurvatureEvery",
    "Event",
    "GradwatchWarning",
    "History",
    "NoiseScale",
    "NonFiniteGradientError",
    "RecordBatch",
    "RobustClip",
    "RunFolder",
    "Sink",
    "StepRecord",
    "Watcher",
    "ZClip",
    "check_gradients",
    "curvature",
    "load",
    "watch",
]

_ON_DEMAND = {
    "check_gradients": "gradwatch.gradcheck.check",
    "curvature": "gradwatch.hessian.curvature",
}
"""What few runs need, and so is loaded when somebody asks for it."""


def __getattr__(name: str) -> Any:
    if name not in _ON_DEMAND:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_ON_DEMAND[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
