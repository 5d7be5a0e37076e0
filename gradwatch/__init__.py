"""gradwatch: know what the gradients do while a PyTorch model trains."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gradwatch import imports, pickles

__version__ = "0.1.0"

_HOMES = {
    "AccumulateByNoiseScale": "gradwatch.accumulate.policies",
    "AccumulatePolicy": "gradwatch.accumulate.policies",
    "AccumulationError": "gradwatch.errors",
    "AdaGC": "gradwatch.clip.adagc",
    "AdaptiveGradientClip": "gradwatch.clip.agc",
    "AutoClip": "gradwatch.clip.autoclip",
    "ClipByNorm": "gradwatch.clip.fixed",
    "ClipByValue": "gradwatch.clip.fixed",
    "ClipDecision": "gradwatch.clip.policy",
    "ClipPolicy": "gradwatch.clip.policy",
    "CurvatureEvery": "gradwatch.hessian.every",
    "Event": "gradwatch.record.records",
    "Explanation": "gradwatch.record.explanation",
    "GradwatchWarning": "gradwatch.errors",
    "History": "gradwatch.history",
    "Layout": "gradwatch.record.records",
    "NoiseScale": "gradwatch.accumulate.noise_scale",
    "NonFiniteGradientError": "gradwatch.errors",
    "RecordBatch": "gradwatch.record.records",
    "Report": "gradwatch.report.report",
    "RobustClip": "gradwatch.clip.robust",
    "RunFolder": "gradwatch.record.folder.writer",
    "Sink": "gradwatch.record.records",
    "StepRecord": "gradwatch.record.records",
    "Thresholds": "gradwatch.report.thresholds",
    "Watcher": "gradwatch.watcher",
    "WrongGradientError": "gradwatch.gradcheck.result",
    "ZClip": "gradwatch.clip.zclip",
    "check_gradients": "gradwatch.gradcheck.check",
    "curvature": "gradwatch.hessian.curvature",
    "explain": "gradwatch.replay.by_hand",
    "load": "gradwatch.history",
    "load_all": "gradwatch.history",
    "watch": "gradwatch.watcher",
    "watch_all": "gradwatch.process.watchers",
}
"""The public names, and the modules that have them: imported when somebody asks for a name.

So ``import gradwatch`` loads neither torch nor anything else that is heavy. A program under
``gradwatch run`` imports torch itself, and may say before how many threads it has.
"""

_FOR_IPYTHON = ("load_ipython_extension", "unload_ipython_extension")
"""What ``%load_ext gradwatch`` calls; in :mod:`gradwatch.notebook`."""

pickles.add_aliases(pickles.MOVED, __name__)

if TYPE_CHECKING:  # type checkers and editors do not see the names of a table; a test compares them
    from gradwatch.accumulate.noise_scale import NoiseScale as NoiseScale
    from gradwatch.accumulate.policies import AccumulateByNoiseScale as AccumulateByNoiseScale
    from gradwatch.accumulate.policies import AccumulatePolicy as AccumulatePolicy
    from gradwatch.clip.adagc import AdaGC as AdaGC
    from gradwatch.clip.agc import AdaptiveGradientClip as AdaptiveGradientClip
    from gradwatch.clip.autoclip import AutoClip as AutoClip
    from gradwatch.clip.fixed import ClipByNorm as ClipByNorm
    from gradwatch.clip.fixed import ClipByValue as ClipByValue
    from gradwatch.clip.policy import ClipDecision as ClipDecision
    from gradwatch.clip.policy import ClipPolicy as ClipPolicy
    from gradwatch.clip.robust import RobustClip as RobustClip
    from gradwatch.clip.zclip import ZClip as ZClip
    from gradwatch.errors import AccumulationError as AccumulationError
    from gradwatch.errors import GradwatchWarning as GradwatchWarning
    from gradwatch.errors import NonFiniteGradientError as NonFiniteGradientError
    from gradwatch.gradcheck.check import check_gradients as check_gradients
    from gradwatch.gradcheck.result import WrongGradientError as WrongGradientError
    from gradwatch.hessian.curvature import curvature as curvature
    from gradwatch.hessian.every import CurvatureEvery as CurvatureEvery
    from gradwatch.history import History as History
    from gradwatch.history import load as load
    from gradwatch.history import load_all as load_all
    from gradwatch.process.watchers import watch_all as watch_all
    from gradwatch.record.explanation import Explanation as Explanation
    from gradwatch.record.folder.writer import RunFolder as RunFolder
    from gradwatch.record.records import Event as Event
    from gradwatch.record.records import Layout as Layout
    from gradwatch.record.records import RecordBatch as RecordBatch
    from gradwatch.record.records import Sink as Sink
    from gradwatch.record.records import StepRecord as StepRecord
    from gradwatch.replay.by_hand import explain as explain
    from gradwatch.report.report import Report as Report
    from gradwatch.report.thresholds import Thresholds as Thresholds
    from gradwatch.watcher import Watcher as Watcher
    from gradwatch.watcher import watch as watch
else:  # a type checker that saw __getattr__() would accept any name
    __all__ = list(_HOMES)

    def __getattr__(name: str) -> Any:
        """Imports a public name."""
        if name in _HOMES:
            with imports.no_collection():
                value = globals()[name] = getattr(import_module(_HOMES[name]), name)
            return value
        if name in _FOR_IPYTHON:
            return getattr(import_module("gradwatch.notebook"), name)
        if (inner := pickles.find_inner(name)) is not None:  # not kept: dir() lists what is public
            return inner
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__() -> list[str]:
        """Returns the public names, whether they have been imported or not."""
        return sorted({*globals(), *__all__})
