"""Names under which pickles find our classes, so that moving a class never breaks a checkpoint.

What users may pickle says that it belongs to ``gradwatch`` itself (:func:`stable_name`), and
``gradwatch`` finds it wherever it lives. Pickles made while classes still gave away their modules
load through aliases of those modules.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import Any, TypeVar

T = TypeVar("T")

INNER = {
    "CommandError": "gradwatch.cli.arguments",
    "Curvature": "gradwatch.hessian.curvature",
    "CurvatureSample": "gradwatch.hessian.every",
    "AccumulationSchedule": "gradwatch.accumulate.policies",
    "FixedAccumulation": "gradwatch.accumulate.policies",
    "_NoiseScaleState": "gradwatch.accumulate.policies",
    "_looked_up": "gradwatch.accumulate.policies",
    "NoiseScaleEstimator": "gradwatch.accumulate.noise_scale",
    "_AdaGCState": "gradwatch.clip.adagc",
    "NormHistory": "gradwatch.clip.norm_history",
    "_FloatBackend": "gradwatch.clip.norm_history",
    "_FloatWindow": "gradwatch.clip.norm_history",
    "_TensorBackend": "gradwatch.clip.norm_history",
    "_TensorWindow": "gradwatch.clip.norm_history",
    "SpikeRule": "gradwatch.clip.spikes",
    "GradientCheck": "gradwatch.gradcheck.result",
    "GradientMismatch": "gradwatch.gradcheck.result",
    "NotFiniteError": "gradwatch.hessian.spectrum",
    "Evidence": "gradwatch.report.finding",
    "Finding": "gradwatch.report.finding",
    "Options": "gradwatch.options",
    "Overhead": "gradwatch.guard",
    "FolderSource": "gradwatch.record.folder.reader",
    "ParameterReader": "gradwatch.record.folder.reader",
    "SessionStarts": "gradwatch.record.folder.reader",
    "Part": "gradwatch.record.folder.parts",
    "UnreadableError": "gradwatch.record.folder.files",
    "WriterLock": "gradwatch.record.folder.lock",
    "TooManySkipsError": "gradwatch.step.skip_rule",
    "late_readings": "gradwatch.testing",
}
"""Where ``gradwatch`` finds what is not public, but is in the pickle of something that is."""

MOVED = {
    "gradwatch.commands.shared.command_error": "CommandError",
    "gradwatch.control.accumulate": "AccumulatePolicy",
    "gradwatch.control.accumulate_by_noise_scale": "AccumulateByNoiseScale _State=_NoiseScaleState",
    "gradwatch.control.accumulate_schedule": "AccumulationSchedule FixedAccumulation _looked_up",
    "gradwatch.control.adagc": "AdaGC _State=_AdaGCState",
    "gradwatch.control.agc": "AdaptiveGradientClip",
    "gradwatch.control.auto": "RobustClip",
    "gradwatch.control.autoclip": "AutoClip",
    "gradwatch.control.clip": "ClipByNorm ClipByValue",
    "gradwatch.control.history_window": "DeviceWindow=_TensorWindow HostWindow=_FloatWindow",
    "gradwatch.control.judge": "TooManySkipsError",
    "gradwatch.control.memory": "Memory=NormHistory",
    "gradwatch.control.noise_scale": "NoiseScale NoiseScaleEstimator",
    "gradwatch.control.places": "Device=_TensorBackend Host=_FloatBackend",
    "gradwatch.control.policy": "ClipDecision ClipPolicy",
    "gradwatch.control.spikes": "SpikeRule",
    "gradwatch.control.zclip": "ZClip",
    "gradwatch.explain.check_gradients": "GradientCheck GradientMismatch WrongGradientError "
    "check_gradients",
    "gradwatch.explain.curvature": "Curvature curvature",
    "gradwatch.explain.curvature_every": "CurvatureEvery CurvatureSample",
    "gradwatch.explain.gradients.result": "GradientCheck GradientMismatch WrongGradientError",
    "gradwatch.explain.hessian.not_finite": "NotFiniteError",
    "gradwatch.explain.hessian.result": "Curvature",
    "gradwatch.explain.report": "Finding Report Seen=Evidence Thresholds",
    "gradwatch.explain.report.finding": "Finding Seen=Evidence",
    "gradwatch.explain.report.report": "Report",
    "gradwatch.explain.report.thresholds": "Thresholds",
    "gradwatch.observe.readings": "late_readings",
    "gradwatch.overhead": "Overhead",
    "gradwatch.record.batch": "Layout RecordBatch",
    "gradwatch.record.event": "Event",
    "gradwatch.record.folder.beginnings": "Beginnings=SessionStarts",
    "gradwatch.record.folder.parameter_rows": "ParameterRows=ParameterReader",
    "gradwatch.record.folder.unreadable": "UnreadableError",
    "gradwatch.record.folder.writer_lock": "WriterLock",
    "gradwatch.record.run_folder": "RunFolder",
    "gradwatch.record.sinks": "GradwatchWarning Sink",
    "gradwatch.record.step": "StepRecord",
    "gradwatch.watching": "watch",
}
"""Modules of gradwatch 0.1, and what of them pickles may name: ``NAME`` or ``OLD=NEW``."""


def stable_name(thing: T) -> T:
    """Makes a class or function one of ``gradwatch`` itself, by which name it is then pickled."""
    kind: Any = thing
    if isinstance(kind, type) and "__annotations__" in vars(kind):
        # Unlike a function, a class would have them looked up in the module that it names.
        kind.__annotations__ = inspect.get_annotations(kind, eval_str=True)
    kind.__module__ = "gradwatch"
    return thing


def add_aliases(moved: Mapping[str, str], home: str) -> None:
    """Lets pickles find what was moved.

    The modules are put where the import system looks first, and are not bound in their packages:
    a name such as ``gradwatch.explain`` stays free.

    Args:
        moved: As :data:`MOVED`.
        home: The module that has the things now.
    """
    for module, names in moved.items():
        pairs = [name.partition("=") for name in names.split()]
        sys.modules.setdefault(
            module, _Moved(module, home, {old: new or old for old, _, new in pairs})
        )
        # A module is imported after its package, as far as there is none under that name today.
        while (module := module.rpartition(".")[0]) != home and module not in sys.modules:
            sys.modules[module] = _Moved(module, home, {})


class _Moved(ModuleType):
    """Stands for a module that is no more; imports nothing before it is asked for a name."""

    def __init__(self, name: str, home: str, names: Mapping[str, str]) -> None:
        super().__init__(name, "Only pickles of gradwatch 0.1 need this module.")
        self._home = home
        self._names = names
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name not in self._names:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(import_module(self._home), self._names[name])
