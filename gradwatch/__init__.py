"""gradwatch: know what the gradients do while a PyTorch model trains."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gradwatch import pickles
from gradwatch.accumulate.noise_scale import NoiseScale
from gradwatch.accumulate.policies import AccumulateByNoiseScale, AccumulatePolicy
from gradwatch.clip.adagc import AdaGC
from gradwatch.clip.agc import AdaptiveGradientClip
from gradwatch.clip.autoclip import AutoClip
from gradwatch.clip.fixed import ClipByNorm, ClipByValue
from gradwatch.clip.policy import ClipDecision, ClipPolicy
from gradwatch.clip.robust import RobustClip
from gradwatch.clip.zclip import ZClip
from gradwatch.errors import AccumulationError, GradwatchWarning, NonFiniteGradientError
from gradwatch.hessian.every import CurvatureEvery
from gradwatch.history import History, load
from gradwatch.process.watchers import watch_all
from gradwatch.record.folder.writer import RunFolder
from gradwatch.record.records import Event, Layout, RecordBatch, Sink, StepRecord
from gradwatch.watcher import Watcher, watch

if TYPE_CHECKING:
    from gradwatch.gradcheck.check import check_gradients
    from gradwatch.gradcheck.result import WrongGradientError
    from gradwatch.hessian.curvature import curvature
    from gradwatch.record.explanation import Explanation
    from gradwatch.replay.by_hand import explain
    from gradwatch.report.report import Report
    from gradwatch.report.thresholds import Thresholds

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
    "Explanation",
    "GradwatchWarning",
    "History",
    "Layout",
    "NoiseScale",
    "NonFiniteGradientError",
    "RecordBatch",
    "Report",
    "RobustClip",
    "RunFolder",
    "Sink",
    "StepRecord",
    "Thresholds",
    "Watcher",
    "WrongGradientError",
    "ZClip",
    "check_gradients",
    "curvature",
    "explain",
    "load",
    "watch",
    "watch_all",
]

_ON_DEMAND = {
    "Explanation": "gradwatch.record.explanation",
    "Report": "gradwatch.report.report",
    "Thresholds": "gradwatch.report.thresholds",
    "WrongGradientError": "gradwatch.gradcheck.result",
    "check_gradients": "gradwatch.gradcheck.check",
    "explain": "gradwatch.replay.by_hand",
    "curvature": "gradwatch.hessian.curvature",
}
"""What few runs need, and so is loaded when somebody asks for it."""

pickles.add_aliases(pickles.MOVED, __name__)


def __getattr__(name: str) -> Any:
    if name in _ON_DEMAND:
        value = globals()[name] = getattr(import_module(_ON_DEMAND[name]), name)
        return value
    if (inner := pickles.find_inner(name)) is not None:  # not kept: dir() lists what is public
        return inner
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
