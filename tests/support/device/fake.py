"""The device "fake": PyTorch's PrivateUse1 in Python alone, with hooks in a thread of autograd's.

There is one of it, "fake:0": torch tells a backend in Python of no second one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.backend_registration import _DummyDeviceGuard, _DummyPrivateUse1Hook

from tests.support.device import fake_streams as streams
from tests.support.device import fake_tensor as tensors
from tests.support.device.counts import Counts, counted
from tests.support.device.fake_streams import NAME
from tests.support.device.fake_tensor import DEVICE, wrap

DEVICES = (DEVICE,)
LOWER_PRECISION = (
    "linear",
    "mm",
    "addmm",
    "matmul",
    "bmm",
    "baddbmm",
    "conv1d",
    "conv2d",
    "scaled_dot_product_attention",
)
FULL_PRECISION = (
    "mse_loss",
    "nll_loss",
    "log_softmax.int",
    "softmax.int",
    "layer_norm",
    "exp",
    "pow",
)


class Module:
    """``torch.fake``, as ``torch.cuda`` is."""

    Event, Stream = streams.Event, streams.Stream
    current_stream = staticmethod(streams.current_stream)
    set_stream = staticmethod(streams.set_stream)
    synchronize = staticmethod(streams.synchronize)

    @staticmethod
    def stream(stream: streams.Stream) -> streams.Stream:
        return stream

    @staticmethod
    def device(index: object) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    @staticmethod
    def is_current_stream_capturing() -> bool:
        return streams.Settings.capturing

    @staticmethod
    def get_rng_state(device: object = None) -> Tensor:
        return tensors.generator.get_state()

    @staticmethod
    def set_rng_state(state: Tensor, device: object = None) -> None:
        tensors.generator.set_state(state)

    @staticmethod
    def manual_seed(seed: int) -> None:
        tensors.generator.manual_seed(seed)

    manual_seed_all = manual_seed
    is_initialized = is_available = staticmethod(lambda: True)
    current_device = staticmethod(lambda: 0)
    set_device = staticmethod(lambda device: None)
    device_count = staticmethod(lambda: 1)
    _is_in_bad_fork = staticmethod(lambda: False)
    get_amp_supported_dtype = staticmethod(lambda: [torch.float16, torch.bfloat16])


def install() -> None:
    """Make ``torch.device("fake")`` one; once per process, before its first backward."""
    torch._register_device_module(NAME, Module)
    torch.utils.generate_methods_for_privateuse1_backend()
    torch._C._acc.register_python_privateuseone_hook(_kept(_DummyPrivateUse1Hook()))
    torch._C._acc.register_python_privateuseone_device_guard(_kept(_DummyDeviceGuard()))
    _install_operations()
    _install_autocast()
    _install_pinned_memory()
    # A backend in Python cannot give torch its streams and events, so they take torch's names.
    torch.Event, torch.Stream = streams.Event, streams.Stream
    if hasattr(torch, "accelerator"):
        torch.accelerator.current_stream = streams.current_stream
        torch.accelerator.set_stream = streams.set_stream
        torch.accelerator.synchronize = streams.synchronize


_registered: list[object] = []  # torch keeps no reference


def _kept(registered: Any) -> Any:
    _registered.append(registered)
    return registered


def _install_operations() -> None:
    """What makes a tensor on the device out of none, and copies to it."""
    library = _kept(torch.library.Library("aten", "IMPL"))

    def empty(size: Any, *, dtype: Any = None, memory_format: Any = None, **_: Any) -> Tensor:
        dtype, form = dtype or torch.get_default_dtype(), memory_format or torch.contiguous_format
        return wrap(torch.empty(size, dtype=dtype, memory_format=form, device="cpu"))

    def empty_strided(size: Any, stride: Any, *, dtype: Any = None, **_: Any) -> Tensor:
        dtype = dtype or torch.get_default_dtype()
        return wrap(torch.empty_strided(size, stride, dtype=dtype, device="cpu"))

    def copy_from(source: Tensor, to: Tensor, non_blocking: bool = False) -> Tensor:
        return tensors.copy_(to, source, non_blocking)

    library.impl("empty.memory_format", empty, "PrivateUse1")
    library.impl("empty_strided", empty_strided, "PrivateUse1")
    library.impl("_copy_from", copy_from, "PrivateUse1")


def _install_autocast() -> None:
    """Casts as CUDA's autocast does, for the operations that tests use; the others pass."""
    _kept(torch.library.Library("_", "IMPL")).fallback(
        torch.library.fallthrough_kernel, "AutocastPrivateUse1"
    )
    library = _kept(torch.library.Library("aten", "IMPL"))
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def cast(operation: Any, dtype: Callable[[], torch.dtype], *args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(key):
            to = dtype()
            moved = [
                x.to(to) if isinstance(x, Tensor) and x.is_floating_point() else x for x in args
            ]
            return operation(*moved, **kwargs)

    def register(name: str, dtype: Callable[[], torch.dtype]) -> None:
        packet, _, overload = name.partition(".")
        operation = getattr(getattr(torch.ops.aten, packet), overload or "default", None)
        if operation is None:
            name, operation = f"{packet}.Tensor_Scalar", torch.ops.aten.pow.Tensor_Scalar
        library.impl(name, partial(cast, operation, dtype), "AutocastPrivateUse1")

    for name in LOWER_PRECISION:
        register(name, lambda: torch.get_autocast_dtype(NAME))
    for name in FULL_PRECISION:
        register(name, lambda: torch.float32)


def _install_pinned_memory() -> None:
    """Pinned memory is the device's, and a backend in Python cannot give torch an allocator."""

    def asked_for(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*args: Any, pin_memory: bool = False, **kwargs: Any) -> Tensor:
            if not pin_memory:
                return make(*args, **kwargs)
            like = make(*args, **{**kwargs, "device": "meta"})
            out = streams.pinned(tuple(like.shape), like.dtype)
            return out.zero_() if make is zeros else out

        return made

    zeros = torch.zeros
    for name in ("empty", "empty_like", "zeros", "zeros_like"):
        setattr(torch, name, asked_for(getattr(torch, name)))

    def pin_memory(self: Tensor, device: object = None) -> Tensor:
        if streams.is_pinned(self):
            return self
        return streams.pinned(tuple(self.shape), self.dtype).copy_(self)

    def is_pinned(self: Tensor, device: object = None) -> bool:
        return streams.is_pinned(self)

    torch.Tensor.pin_memory, torch.Tensor.is_pinned = pin_memory, is_pinned


# -- what `tests.support.device` offers ------------------------------------------------------------


def tensor(on_host: Tensor, device: object = DEVICE) -> Tensor:
    """Copy a tensor to the device; the copy is not counted."""
    return wrap(on_host.detach().clone()).requires_grad_(on_host.requires_grad)


def counting() -> contextlib.AbstractContextManager[Counts]:
    """Count what the device is asked to do inside a block."""
    return counted(lambda: streams.counts)


def late(polls: int = 1) -> contextlib.AbstractContextManager[None]:
    """Let an event be polled in vain so many times, inside a block."""
    return streams.setting("polls", polls)


def no_float64() -> contextlib.AbstractContextManager[None]:
    """Have no float64, as Apple's MPS, inside a block."""
    return streams.setting("float64", False)


def failing(error: Exception) -> contextlib.AbstractContextManager[None]:
    """Raise an error at every event and every wait, as after a device-side assert."""
    return streams.setting("error", error)


def capturing() -> contextlib.AbstractContextManager[None]:
    """Be as while a CUDA graph is captured: what would wait, or pin memory, raises."""
    return streams.setting("capturing", True)
