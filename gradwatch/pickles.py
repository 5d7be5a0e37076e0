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
    "gradwatch.accumulate.noise_scale": "NoiseScaleEstimator",
    "gradwatch.accumulate.policies": "AccumulationSchedule FixedAccumulation _NoiseScaleState "
    "_looked_up",
    "gradwatch.cli.arguments": "CommandError",
    "gradwatch.clip.adagc": "_AdaGCState",
    "gradwatch.clip.norm_history": "NormHistory _FloatBackend _FloatWindow _TensorBackend "
    "_TensorWindow",
    "gradwatch.clip.spikes": "SpikeRule",
    "gradwatch.gradcheck.result": "GradientCheck GradientMismatch",
    "gradwatch.guard": "Overhead",
    "gradwatch.hessian.curvature": "Curvature",
    "gradwatch.hessian.every": "CurvatureSample",
    "gradwatch.hessian.spectrum": "NotFiniteError",
    "gradwatch.options": "Options",
    "gradwatch.record.folder.files": "UnreadableError",
    "gradwatch.record.folder.lock": "WriterLock",
    "gradwatch.record.folder.parts": "Part",
    "gradwatch.record.folder.reader": "FolderSource ParameterReader SessionStarts",
    "gradwatch.report.finding": "Evidence Finding",
    "gradwatch.step.skip_rule": "TooManySkipsError",
    "gradwatch.testing": "late_readings",
}
"""Modules, and what of them is not public but in the pickle of something that is."""

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


def find_inner(name: str) -> Any:
    """Returns a thing that is not public but pickled by this name; None for any other name."""
    for module, names in INNER.items():
        if name in names.split():
            return getattr(import_module(module), name)
    return None


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
