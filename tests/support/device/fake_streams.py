"""Streams, events and pinned memory of the device "fake".

Kernels run at once, so what a stream holds is the copies to the host that have been asked for and have not
run. They run, in order, when the host waits for the stream, or polls an event on it often enough.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

NAME = "fake"
PRIVATE_USE = 20  # c10::DeviceType::PrivateUse1
torch.utils.rename_privateuse1_backend(NAME)  # from here on torch.device("fake") is one

counts: Counter[str] = Counter()


class Settings:
    """How the device behaves.

    Attributes:
        polls: How many times an event is polled in vain.
        float64: Whether the device has float64.
        error: What every event and every wait raises, as after a device-side assert.
        capturing: Whether the streams are being captured into a graph.
    """

    polls = 2
    float64 = True
    error: Exception | None = None
    capturing = False


@contextmanager
def setting(name: str, value: object) -> Iterator[None]:
    """Set one of the settings for a block."""
    before = getattr(Settings, name)
    setattr(Settings, name, value)
    try:
        yield
    finally:
        setattr(Settings, name, before)


def refuse(what: str) -> None:
    """Raise what a device raises that is broken, or whose stream is being captured."""
    if Settings.error is not None:
        raise Settings.error
    if Settings.capturing:
        raise RuntimeError(f"operation not permitted when stream is capturing ({what})")


# -- streams ---------------------------------------------------------------------------------------


class Queue:
    """The copies of one stream that have not run; autograd's thread adds to it as well."""

    def __init__(self) -> None:
        self._copies: deque[Callable[[], object]] = deque()
        self._lock = threading.RLock()
        self.done = 0

    def put(self, copy: Callable[[], object]) -> None:
        with self._lock:
            self._copies.append(copy)

    def end(self) -> int:
        """The position behind everything that has been asked for."""
        with self._lock:
            return self.done + len(self._copies)

    def run_until(self, position: int) -> None:
        with self._lock:
            while self.done < position:
                self._copies.popleft()()
                self.done += 1


_queues: list[Queue] = [Queue()]
_thread = threading.local()


class Stream(torch.Stream):
    """A stream of the device, as ``torch.cuda.Stream``."""

    def __new__(cls, device: Any = None, *, stream_id: int | None = None, **_: Any) -> Stream:
        if stream_id is None:
            stream_id = len(_queues)
            _queues.append(Queue())
        return super().__new__(cls, stream_id=stream_id, device_index=0, device_type=PRIVATE_USE)

    @property
    def queue(self) -> Queue:
        return queue_of(self)

    def __enter__(self) -> Stream:
        self._outer = current_stream()
        _thread.stream = self
        return self

    def __exit__(self, *exception: object) -> None:
        _thread.stream = self._outer

    def wait_event(self, event: Event) -> None:
        self.queue.put(event.run)

    def wait_stream(self, stream: Stream) -> None:
        self.wait_event(stream.record_event())

    def record_event(self, event: Event | None = None) -> Event:
        event = Event() if event is None else event
        event.record(self)
        return event

    def query(self) -> bool:
        refuse("stream query")
        return self.queue.done >= self.queue.end()

    def synchronize(self) -> None:
        wait("stream synchronize", self.queue)


def queue_of(stream: torch.Stream) -> Queue:
    """The copies of a stream, also where torch made the object."""
    return _queues[stream.stream_id]


_default = Stream(stream_id=0)


def current_stream(device: object = None) -> Stream:
    """The stream of the calling thread."""
    return getattr(_thread, "stream", _default)


def set_stream(stream: Stream) -> None:
    """Make a stream that of the calling thread."""
    _thread.stream = stream


def wait(kind: str, queue: Queue | None = None) -> None:
    """Wait, on the host, for one stream or for all of them."""
    refuse(kind)
    counts["waits"] += 1
    counts[kind] += 1
    for one in _queues if queue is None else [queue]:
        one.run_until(one.end())


def synchronize(device: object = None) -> None:
    """Wait for all streams, as ``torch.cuda.synchronize``."""
    wait("device synchronize")


# -- events ----------------------------------------------------------------------------------------


class Event(torch.Event):
    """A place in a stream, as ``torch.cuda.Event``."""

    def __new__(cls, device: Any = None, **_: Any) -> Event:
        if device is not None and torch.device(device).type != NAME:
            raise RuntimeError(f"this process has no other accelerator than {NAME}")
        return super().__new__(cls, device=NAME)

    def __init__(self, *_: Any, **__: Any) -> None:
        counts["events"] += 1
        self._queue: Queue | None = None
        self._position = self._polls = 0

    def record(self, stream: torch.Stream | None = None) -> None:
        self._queue = queue_of(current_stream() if stream is None else stream)
        self._position, self._polls = self._queue.end(), Settings.polls

    def run(self) -> None:
        """Run what was asked of the stream before this event."""
        if self._queue is not None:
            self._queue.run_until(self._position)

    def _is_reached(self) -> bool:
        return self._queue is None or self._queue.done >= self._position

    def query(self) -> bool:
        refuse("event query")
        counts["queries"] += 1
        if not self._is_reached():
            self._polls -= 1
            if self._polls < 0:
                self.run()
        return self._is_reached()

    def synchronize(self) -> None:
        if self._is_reached():
            refuse("event synchronize")
        else:
            wait("event synchronize", self._queue)

    def wait(self, stream: Stream | None = None) -> None:
        (current_stream() if stream is None else stream).wait_event(self)


# -- pinned memory ---------------------------------------------------------------------------------

_pinned: set[int] = set()


def pinned(size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Allocate pinned memory for a contiguous tensor; its views are pinned as well."""
    refuse("allocation of pinned memory")
    counts["pinned"] += 1
    length = int(np.prod(size, dtype=np.int64)) * dtype.itemsize
    memory = np.zeros(max(length, 1), dtype=np.uint8)
    _pinned.add(memory.ctypes.data)
    # The tensor's storage keeps the array alive, and nothing else does.
    weakref.finalize(memory, _pinned.discard, memory.ctypes.data)
    return torch.from_numpy(memory)[:length].view(dtype).view(size)


def is_pinned(tensor: Tensor) -> bool:
    """Whether a tensor on the host is in pinned memory."""
    return tensor.is_cpu and tensor.untyped_storage().data_ptr() in _pinned
