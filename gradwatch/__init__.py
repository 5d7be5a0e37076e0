"""gradwatch: know what the gradients do while a PyTorch model trains."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gradwatch.control.accumulate import AccumulatePolicy
from gradwatch.control.accumulate_by_noise_scale import AccumulateByNoiseScale
from gradwatch.control.adagc import AdaGC
from gradwatch.control.agc import AdaptiveGradientClip
from gradwatch.control.auto import RobustClip
from gradwatch.control.autoclip import AutoClip
from gradwatch.control.clip import ClipByNorm, ClipByValue
from gradwatch.control.noise_scale import NoiseScale
from gradwatch.control.policy import ClipDecision, ClipPolicy
from gradwatch.control.zclip import ZClip
from gradwatch.errors import AccumulationError, NonFiniteGradientError
from gradwatch.explain.curvature_every import CurvatureEvery
from gradwatch.history import History, load
from gradwatch.record.batch import RecordBatch
from gradwatch.record.event import Event
from gradwatch.record.run_folder import RunFolder
from gradwatch.record.sinks import GradwatchWarning, Sink
from gradwatch.record.step import StepRecord
from gradwatch.watcher import Watcher
from gradwatch.watching import watch

if TYPE_CHECKING:
    from gradwatch.explain.check_gradients import check_gradients
    from gradwatch.explain.curvature import curvature

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
    "check_gradients": "gradwatch.explain.check_gradients",
    "curvature": "gradwatch.explain.curvature",
}
"""What few runs need, and so is loaded when somebody asks for it."""


def __getattr__(name: str) -> Any:
    if name not in _ON_DEMAND:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_ON_DEMAND[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
