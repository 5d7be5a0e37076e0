"""Whose code runs an operation: the user's line, and the module, from the frames of the stack."""

from __future__ import annotations

import linecache
import os
import sys
import sysconfig
from collections.abc import Mapping
from enum import IntEnum
from pathlib import Path
from types import CodeType, FrameType
from typing import NamedTuple

import torch
from torch import Tensor, nn

from gradwatch.hooks.callers import ENGINE_CODE
from gradwatch.hooks.variables import local_variables
from gradwatch.replay.operands import memory_of


class _Kind(IntEnum):
    USER = 0
    LIBRARY = 1  # of torch or Python: left out
    ENGINE = 2  # below it is the backward, above it who started it
    CHECKPOINT = 3  # runs a forward again, inside of the backward
    OURS = 4  # the replay itself: everything above it is not of the replay


class Place(NamedTuple):
    """Where an operation was run.

    Attributes:
        file: The file of the user's innermost line; empty if there is none.
        line: Its number.
        module: ``id()`` of the innermost module whose code was running; 0 for none.
        in_backward: Whether the engine ran it, and no code of the user's.
        recomputed: Whether a checkpoint ran it again inside of the backward.
        code: The code that the line is in; None if there is none.
    """

    file: str = ""
    line: int = 0
    module: int = 0
    in_backward: bool = False
    recomputed: bool = False
    code: CodeType | None = None


_TORCH = str(Path(torch.__file__).parent) + os.sep
_OURS = str(Path(__file__).parents[1]) + os.sep
_PYTHON = tuple(
    str(Path(path)) + os.sep
    for path in {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib")}
    if path
)
_PACKAGES = tuple(f"{os.sep}{name}{os.sep}" for name in ("site-packages", "dist-packages"))
# What Fabric has around a model.
_AROUND = tuple(
    str(Path(os.sep, packages, name)) + os.sep
    for packages in ("site-packages", "dist-packages")
    for name in ("lightning/fabric", "lightning_fabric", "lightning_utilities")
)
_CHECKPOINT = str(Path(_TORCH, "utils", "checkpoint.py"))


class Frames:
    """Finds the place of the operation that is running now."""

    def __init__(self, modules: Mapping[int, object]) -> None:
        """``modules`` are those of the model, by ``id()``; it may still grow."""
        self._modules = modules
        self._kinds: dict[CodeType, _Kind] = {}
        self._owners: dict[CodeType, str] = {}

    def place(self) -> Place:
        """Walks from the caller's caller up to the replay itself."""
        frame: FrameType | None = sys._getframe(2)
        file, line, module, code = "", 0, 0, None
        in_engine = checkpoint = False
        # A checkpoint's frame is on the stack in the forward, too.
        runs_node = torch._C._current_autograd_node() is not None
        kinds = self._kinds
        while frame is not None:
            here = frame.f_code
            kind = kinds.get(here)
            if kind is None:
                kind = kinds[here] = _kind_of(here)
            if kind is _Kind.OURS:
                break
            if kind is _Kind.ENGINE:
                in_engine = not line
                break
            if kind is _Kind.CHECKPOINT:
                checkpoint = True
            elif kind is _Kind.USER and not line:
                file, line, code = here.co_filename, frame.f_lineno, here
            if not module:
                module = self._module_in(frame, here)
            if module and line and not (runs_node and not checkpoint):
                break
            frame = frame.f_back
        return Place(file, line, module, in_engine, runs_node and checkpoint, code)

    def _module_in(self, frame: FrameType, code: CodeType) -> int:
        owner = self._owners.get(code)
        if owner is None:
            owner = self._owners[code] = _owner_of(code)
        if not owner:
            return 0
        value = local_variables(frame).get(owner)
        if not isinstance(value, nn.Module) or id(value) not in self._modules:
            return 0
        # A function that is given a module as its first argument is not of the module.
        return id(value) if owner == "self" or hasattr(type(value), code.co_name) else 0


def _kind_of(code: CodeType) -> _Kind:
    file = code.co_filename
    if code is ENGINE_CODE:
        return _Kind.ENGINE
    if file == _CHECKPOINT:
        return _Kind.CHECKPOINT
    if file.startswith(_OURS):
        return _Kind.OURS
    # What a mode or a subclass of the user's own does is not a line of the model.
    if code.co_name in ("__torch_function__", "__torch_dispatch__"):
        return _Kind.LIBRARY
    if file.startswith((_TORCH, "<frozen ")):
        return _Kind.LIBRARY
    in_packages = any(part in file for part in _PACKAGES)
    if file.startswith(_PYTHON) and not in_packages:
        return _Kind.LIBRARY
    if in_packages and any(part in file for part in _AROUND):
        return _Kind.LIBRARY
    return _Kind.USER


def _owner_of(code: CodeType) -> str:
    """Returns the name under which code knows the module that it is of; empty for none."""
    if code.co_argcount and code.co_varnames[0] not in ("args", "kwargs"):
        return code.co_varnames[0]
    return "self" if "self" in code.co_freevars else ""


def source_of(file: str, line: int) -> str:
    """Returns a line of a file, stripped; empty if it cannot be read."""
    return linecache.getline(file, line).strip() if file and line else ""


def variable_of(tensor: Tensor, file: str, line: int) -> str:
    """Returns what the user's frame at a line calls a tensor: ``"target"``, ``"batch['y']"``.

    It must be called while that frame runs. Empty if no variable holds the tensor.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and (frame.f_code.co_filename, frame.f_lineno) != (file, line):
        frame = frame.f_back
    while frame is not None and not frame.f_code.co_filename.startswith(_OURS):
        if not frame.f_code.co_filename.startswith((_TORCH, *_PYTHON)):
            known = local_variables(frame) | {
                name: frame.f_globals[name]
                for name in frame.f_code.co_names
                if name in frame.f_globals
            }
            for name, value in known.items():
                found = _within(name, value, tensor)
                if found:
                    return found
        frame = frame.f_back
    return ""


def _within(name: str, value: object, tensor: Tensor) -> str:
    if _is_same(value, tensor):
        return name
    if isinstance(value, Mapping):
        pairs = ((f"{name}[{key!r}]", one) for key, one in value.items())
    elif isinstance(value, (list, tuple)):
        pairs = ((f"{name}[{i}]", one) for i, one in enumerate(value))
    elif isinstance(value, nn.Module):
        pairs = ((f"{name}.{key}", one) for key, one in vars(value).items())
    else:
        return ""
    return next((path for path, one in pairs if _is_same(one, tensor)), "")


def _is_same(value: object, tensor: Tensor) -> bool:
    if not isinstance(value, Tensor):
        return False
    if value is tensor:
        return True
    memory = memory_of(value)
    return memory is not None and memory == memory_of(tensor)
