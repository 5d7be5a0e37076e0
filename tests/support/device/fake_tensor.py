"""Tensors of the device "fake": wrappers without memory of their own, around hidden tensors on the CPU.

Every operation comes through ``__torch_dispatch__``. It refuses to mix devices as CUDA does, counts what a
GPU would launch and wait for, and lets a non-blocking copy to pinned memory arrive late.
"""

from __future__ import annotations

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor

from tests.support.device import fake_streams as streams
from tests.support.device.fake_streams import NAME, Settings, counts

POISON = -1.2345e30  # what a host buffer holds until its copy has arrived
DEVICE = torch.device(NAME, 0)
DOUBLES = (torch.float64, torch.complex128)
aten = torch.ops.aten

# What cannot go on before the host knows a number: on CUDA each of them waits.
LOOKS = {
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.is_nonzero.default,
    aten.unique_dim.default,
    aten._unique2.default,
}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}
# Views that only set a bit, which the kernels of the CPU do not look at below this wrapper.
WRITTEN_OUT = {
    aten._conj.default: aten.conj_physical.default,
    aten._neg_view.default: aten.neg.default,
}
# What takes no number on the CPU beside tensors on the device, not even in a tensor [].
SAME_DEVICE = {"cat", "stack"}


class DeviceTensor(torch.Tensor):
    """A tensor on the device; ``hidden`` has its numbers, and is on the CPU."""

    hidden: Tensor

    @staticmethod
    def __new__(cls, hidden: Tensor) -> DeviceTensor:
        if hidden.dtype in DOUBLES and not Settings.float64:
            raise TypeError(f"Cannot convert a {NAME} Tensor to float64: the device has none.")
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            hidden.size(),
            strides=hidden.stride(),
            storage_offset=hidden.storage_offset(),
            dtype=hidden.dtype,
            layout=hidden.layout,
            device=DEVICE,
        )
        self.hidden = hidden
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return dispatch(func, args, kwargs or {})

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if not isinstance(value, DeviceTensor):
            raise RuntimeError("Attempted to call `variable.set_data(tensor)` across devices")
        torch.Tensor.data.__set__(self, value)
        self.hidden = value.hidden

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.hidden.untyped_storage()  # views are known to share their memory

    def data_ptr(self) -> int:
        return self.hidden.data_ptr()

    def numpy(self, *, force: bool = False) -> Any:
        if not force:
            raise TypeError(f"can't convert {DEVICE} device type tensor to numpy. Use Tensor.cpu()")
        return self.detach().cpu().numpy()

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def __array__(self, dtype: Any = None) -> Any:
        return self.numpy()

    def __repr__(self, **_: Any) -> str:
        shown = repr(self.hidden).removesuffix(")")
        graph = ", requires_grad=True" if self.requires_grad else ""
        return f"{shown}, device='{DEVICE}'{graph})"

    def __deepcopy__(self, memo: dict[int, Any]) -> DeviceTensor:
        if id(self) in memo:
            return memo[id(self)]
        if not self.is_leaf:
            raise RuntimeError("Only Tensors created explicitly by the user support deepcopy")
        made = memo[id(self)] = DeviceTensor(copy.deepcopy(self.hidden, memo))
        made.requires_grad_(self.requires_grad)
        for name, value in self.__dict__.items():
            if name != "hidden":
                setattr(made, name, copy.deepcopy(value, memo))
        made.grad = copy.deepcopy(self.grad, memo)
        return made

    def __reduce_ex__(self, protocol: Any) -> Any:
        # As torch saves tensors of devices whose storages it cannot read, so map_location works.
        if getattr(self, "_is_param", False):
            parts = self.detach(), self.requires_grad, OrderedDict()
            return torch._utils._rebuild_parameter, parts
        plain = self.detach().hidden.clone()
        parts = plain, self.dtype, str(self.device), self.requires_grad
        return torch._utils._rebuild_device_tensor_from_cpu_tensor, parts


def wrap(hidden: Tensor) -> DeviceTensor:
    """A tensor on the device, with these numbers."""
    return DeviceTensor(hidden)


# -- operations ------------------------------------------------------------------------------------


@cache
def _returns_view(func: Any) -> bool:
    aliases = [one.alias_info for one in func._schema.returns]
    return any(one is not None and not one.is_write for one in aliases)


@cache
def _writes_to(func: Any) -> tuple[int | str, ...]:
    """The arguments that an operation writes to: a position, or a name."""
    written = []
    for position, one in enumerate(func._schema.arguments):
        if one.alias_info is not None and one.alias_info.is_write:
            written.append(one.name if one.kwarg_only else position)
    return tuple(written)


@cache
def _draws(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in func.tags


def dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operation on the hidden tensors."""
    if func is aten.copy_.default:
        return copy_(*args, **kwargs)
    if func is aten._to_copy.default:
        return _to_copy(*args, **kwargs)
    func = WRITTEN_OUT.get(func, func)
    name = func._schema.name.removeprefix("aten::")
    if name.startswith("_foreach_") and _is_mixed(args[0]):
        return _one_by_one(func, args, kwargs)
    _refuse_other_devices(func, name, args, kwargs)
    _count(func, name, args)
    kwargs = {key: value for key, value in kwargs.items() if key != "pin_memory"}
    wrapped = True
    if kwargs.get("device") is not None:
        wrapped = torch.device(kwargs["device"]).type == NAME
        kwargs["device"] = "cpu"
    hidden_args = _mapped(_hidden, args)
    hidden_kwargs = {key: _mapped(_hidden, value) for key, value in kwargs.items()}
    with own_draws() if _draws(func) else contextlib.nullcontext():
        out = func(*hidden_args, **hidden_kwargs)
    return _wrapped_like(args, kwargs, out) if wrapped else out


def _hidden(tensor: Tensor) -> Tensor:
    return tensor.hidden if isinstance(tensor, DeviceTensor) else tensor


def _mapped(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Change the tensors among arguments or results, which are in lists and tuples at most."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, (list, tuple)):
        return type(value)([_mapped(change, one) for one in value])
    return value


def _tensors_in(*values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors_in(*value)


def _is_mixed(tensors: Any) -> bool:
    return len({isinstance(x, DeviceTensor) for x in tensors}) > 1


def _one_by_one(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What torch's slow path does with lists on several devices: an operation per tensor."""
    length = len(args[0])
    lists = [isinstance(x, (list, tuple)) and len(x) == length for x in args]
    out = [
        func(*([x[i]] if many else x for x, many in zip(args, lists, strict=True)), **kwargs)
        for i in range(length)
    ]
    return None if out[0] is None else [x[0] for x in out]


def _refuse_other_devices(func: Any, name: str, args: Any, kwargs: Any) -> None:
    """Raise where CUDA does: only a number in a tensor [] may be on the CPU, and only to be read."""
    tensors = list(_tensors_in(*args, *kwargs.values()))
    on_host = [x for x in tensors if not isinstance(x, DeviceTensor)]
    if not on_host or len(on_host) == len(tensors):
        return
    written = [kwargs.get(at) if isinstance(at, str) else args[at] for at in _writes_to(func)]
    strict = name in SAME_DEVICE or name.startswith("_foreach_")
    bad = strict or any(x.dim() for x in on_host)
    if func in INDEXING and isinstance(args[0], DeviceTensor):
        streams.wait("h2d index")  # an index on the CPU is copied
        bad = False
    if bad or any(not isinstance(x, DeviceTensor) for x in _tensors_in(*written)):
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{DEVICE} and cpu! ({name})"
        )


def _count(func: Any, name: str, args: tuple[Any, ...]) -> None:
    if func in LOOKS:
        streams.wait("d2h item" if name == "_local_scalar_dense" else f"d2h {name}")
    elif func is aten.index.Tensor and any(
        index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
    ):
        streams.wait("d2h mask")
    is_allocation = name.startswith(("empty", "new_empty"))
    if _returns_view(func) or is_allocation or name in ("_local_scalar_dense", "detach", "alias"):
        return
    # A list of several dtypes goes CUDA's slow path: a kernel for each tensor.
    is_slow = name.startswith("_foreach_") and len({x.dtype for x in args[0]}) > 1
    number = len(args[0]) if is_slow else 1
    counts["kernels"] += number
    counts[f"kernel {name}"] += number


def _wrapped_like(args: Any, kwargs: Any, out: Any) -> Any:
    """Give in-place and out= results back as the wrappers that were passed, and wrap the rest."""
    given = _tensors_in(*args, *kwargs.values())
    known = {id(x.hidden): x for x in given if isinstance(x, DeviceTensor)}

    def wrapped(hidden: Tensor) -> Tensor:
        wrapper = known.get(id(hidden))
        if wrapper is None:
            return wrap(hidden)
        if wrapper.shape != hidden.shape or wrapper.stride() != hidden.stride():
            wrapper.data = wrap(hidden)  # resized, or transposed, in place
        return wrapper

    return _mapped(wrapped, out)


# -- copies ----------------------------------------------------------------------------------------


def copy_(to: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """``to.copy_(source)`` where at least one of them is on the device."""
    if not isinstance(to, DeviceTensor):
        _download(to, source.hidden, non_blocking)
    elif isinstance(source, DeviceTensor):
        counts["kernels"] += 1
        to.hidden.copy_(source.hidden)
    else:
        _upload(source, non_blocking)
        to.hidden.copy_(source)
    return to


def _upload(source: Tensor, non_blocking: bool) -> None:
    counts["h2d"] += 1
    if not (non_blocking and streams.is_pinned(source)):
        streams.wait("h2d pageable")


def _download(to: Tensor, hidden: Tensor, non_blocking: bool) -> None:
    counts["d2h"] += 1
    if non_blocking and streams.is_pinned(to):
        values = hidden.clone()  # the stream runs later, but in order
        to.fill_(POISON if to.dtype.is_floating_point or to.is_complex() else 0)
        streams.current_stream().queue.put(lambda: to.copy_(values))
    else:
        streams.wait("d2h copy")
        to.copy_(hidden)


def _to_copy(
    source: Tensor,
    *,
    device: Any = None,
    dtype: torch.dtype | None = None,
    non_blocking: bool = False,
    pin_memory: bool | None = None,
    **options: Any,
) -> Tensor:
    there = source.device if device is None else torch.device(device)
    dtype = source.dtype if dtype is None else dtype
    if there.type == NAME:
        if isinstance(source, DeviceTensor):
            counts["kernels"] += 1
            return wrap(aten._to_copy.default(source.hidden, dtype=dtype, **options))
        _upload(source, non_blocking)
        return wrap(aten._to_copy.default(source, dtype=dtype, **options))
    converted = aten._to_copy.default(source.hidden, dtype=dtype, **options)
    if not non_blocking:
        counts["d2h"] += 1
        streams.wait("d2h copy")
        return converted
    out = streams.pinned(tuple(converted.shape), dtype)  # so does torch, since 2.3 or so
    _download(out, converted, non_blocking=True)
    return out


# -- random numbers --------------------------------------------------------------------------------

generator = torch.Generator()


@contextlib.contextmanager
def own_draws() -> Iterator[None]:
    """Draw from the device's own generator, not from that of the CPU."""
    before = torch.default_generator.get_state()
    torch.default_generator.set_state(generator.get_state())
    try:
        yield
    finally:
        generator.set_state(torch.default_generator.get_state())
        torch.default_generator.set_state(before)
