"""RandomState: the states of all random generators that code may draw from without naming one."""

from __future__ import annotations

import ctypes
import random
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch

PythonState: TypeAlias = tuple[Any, ...]
NumpyState: TypeAlias = dict[str, Any]


def torch_generators() -> list[torch.Generator]:
    """Lists torch's generator of the CPU and those of the accelerators that are initialized."""
    # These tuples are empty until the backend is initialized, which must not happen here.
    found = [
        torch.default_generator,
        *torch.cuda.default_generators,
        *torch.xpu.default_generators,
    ]
    if _HAS_MPS:
        found.append(torch.mps._get_default_mps_generator())
    # A backend outside of torch, such as torch_npu, registers itself under a name of its own.
    other = vars(torch).get(torch._C._get_privateuse1_backend_name())
    if other is not None:
        found.extend(getattr(other, "default_generators", ()))
    return found


# Asking does not initialize it.
_HAS_MPS = torch.backends.mps.is_built() and torch.backends.mps.is_available()


class RandomState:
    """Saved states of the generators of torch, of Python and of NumPy.

    Those of an accelerator are small tensors on the host: nothing waits for the device.

    Attributes:
        generators: torch's generators, each with its state, a tensor ``[n]`` of bytes.
        python: What ``random.getstate()`` returns.
        numpy: What ``numpy.random.get_state(legacy=False)`` returns.
    """

    __slots__ = ("generators", "numpy", "python")

    def __init__(self) -> None:
        """Saves the states, without calling an operation of torch."""
        # It runs before each forward of a training, so there is no further frame on its usual way.
        self.generators = [(one, one.get_state()) for one in torch_generators()]
        raw = _python.raw
        if raw is None or raw.raw != _python.bytes or _python.owner.gauss_next is not _python.gauss:
            _python.read()
        self.python: PythonState = _python.state
        known = _Numpy.known or _Numpy()  # not before, as importing numpy.random takes a while
        owner = known.get()
        raw = known.raw
        if raw is None or owner is not known.owner or raw.raw != known.bytes or known.has_gauss:
            known.read(owner)
        self.numpy: NumpyState = known.state

    def put_back(self) -> None:
        """Restores the saved states."""
        for generator, state in self.generators:
            generator.set_state(state)
        random.setstate(self.python)
        np.random.set_state(self.numpy)


class _Python:
    """The newest state of Python's generator that was read, and its bytes at that time.

    To read it costs more than ten times what it costs to compare the bytes of the object, and most
    trainings never draw from it. The bytes are compared and never understood, so this holds however
    CPython lays them out, as long as they change with the state.
    """

    def __init__(self, owner: random.Random) -> None:
        self.owner: Any = owner
        self.gauss: float | None = None
        # The last attributes, a dict and weak references, are those of the derived class.
        kind = random.Random.__mro__[1]
        length = kind.__basicsize__ - object.__basicsize__
        start = id(owner) + object.__basicsize__
        self.raw = (ctypes.c_char * length).from_address(start) if length > 624 * 4 else None
        self.read()

    def read(self) -> None:
        self.bytes: bytes | None = None if self.raw is None else self.raw.raw
        self.gauss = self.owner.gauss_next
        self.state: PythonState = self.owner.getstate()


class _Numpy:
    """The same for NumPy's global generator, whose bytes are at an address that NumPy documents."""

    known: _Numpy | None = None

    def __init__(self) -> None:
        _Numpy.known = self
        # Public, but the annotations of NumPy do not have it.
        self.get: Callable[[], Any] = np.random.get_bit_generator  # type: ignore[attr-defined]
        self.read(self.get())

    def read(self, owner: Any) -> None:
        self.owner = owner
        # Of other kinds of generator the size is not known.
        known = type(owner) is np.random.MT19937
        address = owner.ctypes.state_address if known else 0
        self.raw = (ctypes.c_char * (625 * 4)).from_address(address) if known else None
        self.bytes = None if self.raw is None else self.raw.raw
        self.state: NumpyState = np.random.get_state(legacy=False)
        # A normal number that is kept for the next call. Handing it out changes no byte.
        self.has_gauss: bool = bool(self.state["has_gauss"])


_python = _Python(getattr(random.getstate, "__self__"))  # noqa: B009
