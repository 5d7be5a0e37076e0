"""The device "mini": PyTorch's PrivateUse1 in C++, with two devices, streams, events and pinned memory.

``mini.cpp`` is compiled when this module is imported, unless that has been done before.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor
from torch.utils import cpp_extension

from tests.support.device.counts import Counts, counted

NAME = "mini"
SOURCE = Path(__file__).with_name("mini.cpp")
FLAGS = ["-O1", "-g0", "-w"]


def _compiled() -> Any:
    """Compile the device, or load what was compiled before: once for all processes."""
    os.environ["PATH"] += os.pathsep + sysconfig.get_path("scripts")  # where pip puts ninja
    os.environ.setdefault("MAX_JOBS", "1")
    digest = hashlib.sha256(SOURCE.read_bytes() + str(FLAGS).encode()).hexdigest()[:8]
    version = torch.__version__.translate(str.maketrans("+.-", "___"))
    name = f"{NAME}_{sys.implementation.cache_tag.replace('-', '')}_{version}_{digest}"
    folder = Path(cpp_extension._get_build_directory(name, verbose=False))
    with FileLock(folder.with_suffix(".lock")):
        # torch has a lock of its own, which stays behind where a build was killed.
        (folder / "lock").unlink(missing_ok=True)
        return cpp_extension.load(name, [str(SOURCE)], extra_cflags=FLAGS, verbose=False)


torch.utils.rename_privateuse1_backend(NAME)
DEVICES = (torch.device(NAME, 0), torch.device(NAME, 1))
DEVICE = DEVICES[0]
_device = _compiled()


class Event(torch.Event):
    """As ``torch.cuda.Event``: recorded on the current stream of the current device, unless told."""

    def __new__(cls, device: Any = NAME, **options: Any) -> Event:
        return super().__new__(cls, device=device, **options)

    def record(self, stream: torch.Stream | None = None) -> None:
        super().record(torch.accelerator.current_stream() if stream is None else stream)


def _index(device: Any) -> int:
    """The index of a device that is given in any of torch's ways; the current one for None."""
    if isinstance(device, int):
        return device
    index = None if device is None else torch.device(device).index
    return _device.current_device() if index is None else index


class _OnDevice:
    """``torch.mini.device``: makes a device the current one for a block."""

    def __init__(self, device: Any) -> None:
        self._index = _index(device)

    def __enter__(self) -> None:
        self._before = _device.current_device()
        _device.set_device(self._index)

    def __exit__(self, *exception: object) -> None:
        _device.set_device(self._before)


class Module:
    """``torch.mini``, as ``torch.cuda`` is."""

    Event, Stream, device = Event, torch.Stream, _OnDevice
    is_initialized = is_available = staticmethod(lambda: True)
    is_current_stream_capturing = staticmethod(_device.is_capturing)
    device_count = staticmethod(lambda: len(DEVICES))
    current_device = staticmethod(_device.current_device)
    _is_in_bad_fork = staticmethod(lambda: False)
    get_amp_supported_dtype = staticmethod(lambda: [torch.float16, torch.bfloat16])

    @staticmethod
    def set_device(device: Any) -> None:
        _device.set_device(_index(device))

    @staticmethod
    def current_stream(device: Any = None) -> torch.Stream:
        return torch.accelerator.current_stream(_index(device))

    @staticmethod
    def stream(stream: torch.Stream) -> torch.Stream:
        return stream

    @staticmethod
    def synchronize(device: Any = None) -> None:
        torch.accelerator.synchronize(_index(device))

    @staticmethod
    def manual_seed_all(seed: int) -> None:
        for device in DEVICES:
            _device.manual_seed(seed, device.index)

    @staticmethod
    def get_rng_state(device: Any = None) -> Tensor:
        return _device.get_rng_state(_index(device))

    @staticmethod
    def set_rng_state(state: Tensor, device: Any = None) -> None:
        _device.set_rng_state(state, _index(device))


def install() -> None:
    """Make ``torch.device("mini")`` one; once per process, before its first backward."""
    _device.setup()
    torch._register_device_module(NAME, Module)
    torch.utils.generate_methods_for_privateuse1_backend()


# -- what `tests.support.device` offers ------------------------------------------------------------


def tensor(on_host: Tensor, device: torch.device = DEVICE) -> Tensor:
    """Copy a tensor to the device; the copy is not counted."""
    made = _device.on_device(on_host.detach(), device.index)
    return made.requires_grad_(on_host.requires_grad)


def counting() -> contextlib.AbstractContextManager[Counts]:
    """Count what the devices are asked to do inside a block."""
    return counted(_device.counts)


@contextlib.contextmanager
def _set(setter: Callable[[Any], None], inside: object, afterwards: object) -> Iterator[None]:
    setter(inside)
    try:
        yield
    finally:
        setter(afterwards)


def late(polls: int = 1) -> contextlib.AbstractContextManager[None]:
    """Let an event be polled in vain so many times, inside a block."""
    return _set(_device.set_polls, polls, 2)


def no_float64() -> contextlib.AbstractContextManager[None]:
    """Have no float64, as Apple's MPS, inside a block."""
    return _set(_device.set_float64, False, True)


def failing(error: Exception) -> contextlib.AbstractContextManager[None]:
    """Raise an error's text, as RuntimeError, at every event and every wait inside a block."""
    return _set(_device.set_failure, str(error), "")


def capturing() -> contextlib.AbstractContextManager[None]:
    """Be as while a CUDA graph is captured: what would wait, or pin memory, raises."""
    return _set(_device.set_capturing, True, False)
