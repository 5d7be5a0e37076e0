"""Names under which pickles find our classes, so that moving a class never breaks a checkpoint.

A pickle stores the module of each class. Classes that users may pickle claim to be defined in
``gradwatch`` itself (:func:`stable_name`), and ``gradwatch`` looks them up wherever they are now.
Pickles of version 0.1 name the real modules of that time, and load through aliases of these.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from itertools import accumulate
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
    "gradwatch.record.columns": "LiveSource",
    "gradwatch.record.explanation": "Share",
    "gradwatch.record.folder.files": "UnreadableError",
    "gradwatch.record.folder.lock": "WriterLock",
    "gradwatch.record.folder.parts": "Part",
    "gradwatch.record.folder.reader": "FolderSource ParameterReader SessionStarts",
    "gradwatch.record.operations": "Operand",
    "gradwatch.record.records": "ParameterGroups",
    "gradwatch.report.finding": "Evidence Finding",
    "gradwatch.step.skip_rule": "TooManySkipsError",
    "gradwatch.testing": "late_readings",
}
"""Modules, and the names in them that are not public but occur in pickles of public objects."""

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
"""Modules of gradwatch 0.1, and the names in them that pickles may use: ``NAME`` or ``OLD=NEW``."""


def find_inner(name: str) -> Any:
    """Returns the object of :data:`INNER` with this name; None if there is none."""
    for module, names in INNER.items():
        if name in names.split():
            return getattr(import_module(module), name)
    return None


def stable_name(thing: T) -> T:
    """Decorates a class or function so that it is pickled as one of the module ``gradwatch``."""
    import inspect  # here, so that `import gradwatch` does not load it

    kind: Any = thing
    if isinstance(kind, type) and "__annotations__" in vars(kind):
        # Resolved now: string annotations of a class are looked up in the module that it names,
        # those of a function in the module that defines it.
        # The class has no name there yet, so one that names itself is looked up here.
        own = {kind.__name__: kind}
        kind.__annotations__ = inspect.get_annotations(kind, eval_str=True, locals=own)
    kind.__module__ = "gradwatch"
    return thing


def add_aliases(moved: Mapping[str, str], home: str) -> None:
    """Makes old module names importable, so that old pickles load.

    The modules are entered into ``sys.modules``, but not set as attributes of their packages, so a
    name such as ``gradwatch.explain`` stays free.

    Args:
        moved: Old modules and names, in the form of :data:`MOVED`.
        home: The name of the module that has the objects now.
    """
    for module, names in moved.items():
        pairs = [name.partition("=") for name in names.split()]
        sys.modules.setdefault(
            module, _Moved(module, home, {old: new or old for old, _, new in pairs})
        )
        # A module is imported after its packages. Make those that no longer exist.
        for package in accumulate(module.split(".")[:-1], "{}.{}".format):
            if package not in sys.modules and find_spec(package) is None:
                sys.modules[package] = _Moved(package, home, {})


class _Moved(ModuleType):
    """Stands in for a module that no longer exists; imports nothing until a name is looked up."""

    def __init__(self, name: str, home: str, names: Mapping[str, str]) -> None:
        super().__init__(name, "Only pickles of gradwatch 0.1 need this module.")
        self._home = home
        self._names = names
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name not in self._names:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return getattr(import_module(self._home), self._names[name])
