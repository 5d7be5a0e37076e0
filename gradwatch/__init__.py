"""gradwatch: know what the gradients do while a PyTorch model trains."""

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
from gradwatch.history import History, load
from gradwatch.record.batch import RecordBatch
from gradwatch.record.event import Event
from gradwatch.record.run_folder import RunFolder
from gradwatch.record.sinks import GradwatchWarning, Sink
from gradwatch.record.step import StepRecord
from gradwatch.watcher import Watcher
from gradwatch.watching import watch

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
    "load",
    "watch",
]
