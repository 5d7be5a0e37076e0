"""Messages: builds the protobuf Events that TensorBoard reads, from scalars, arrays and texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tensorboard.compat.proto import types_pb2
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import (
    DATA_CLASS_SCALAR,
    DATA_CLASS_TENSOR,
    SummaryMetadata,
)

from gradwatch_dashboard.wire import PLUGIN, Tag, plugin_content

_MAX_TEMPLATES = 64


class ScalarEvents:
    """Fills one Event with the scalars of a step.

    TensorBoard keeps only the first metadata of a tag, so the description of each tag is written
    once.
    """

    def __init__(self) -> None:
        self._described: set[str] = set()
        self._templates: dict[tuple[str, ...], tuple[Any, list[Any]]] = {}

    def fill(self, values: Mapping[str, float], meaning: Callable[[str], str]) -> Any:
        """Returns an ``Event`` of the values, without step and time, valid until the next call.

        Args:
            values: Tag to value.
            meaning: Returns the description of a tag. Called once per tag.
        """
        tags = tuple(values)
        if tags not in self._templates and not self._described.issuperset(tags):
            return self._describe(values, meaning)
        # Building a message takes ten times as long as writing numbers into an existing one.
        event, slots = self._templates.get(tags) or self._template(tags)
        for slot, value in zip(slots, values.values(), strict=True):
            slot.simple_value = value
        return event

    def _describe(self, values: Mapping[str, float], meaning: Callable[[str], str]) -> Any:
        event = Event()
        for tag, value in values.items():
            slot = event.summary.value.add(tag=tag, simple_value=value)
            if tag not in self._described:
                slot.metadata.CopyFrom(_metadata(meaning(tag)))
        self._described.update(values)
        return event

    def _template(self, tags: tuple[str, ...]) -> tuple[Any, list[Any]]:
        # Bounded, because the sets of tags vary: each optimizer has its own, and a block without a
        # gradient is missing from one.
        if len(self._templates) >= _MAX_TEMPLATES:
            self._templates.clear()
        event = Event()
        slots = [event.summary.value.add(tag=tag) for tag in tags]
        self._templates[tags] = event, slots
        return event, slots


def _metadata(description: str) -> Any:
    plugin = SummaryMetadata.PluginData(plugin_name="scalars")
    return SummaryMetadata(
        plugin_data=plugin, data_class=DATA_CLASS_SCALAR, summary_description=description
    )


_TYPES = {
    np.dtype(np.float32): types_pb2.DT_FLOAT,
    np.dtype(np.float64): types_pb2.DT_DOUBLE,
    np.dtype(np.uint16): types_pb2.DT_UINT16,
}
# Neither loader of TensorBoard (Python or data server) lists a tag without the data class.
_METADATA = SummaryMetadata(
    plugin_data=SummaryMetadata.PluginData(plugin_name=PLUGIN, content=plugin_content()),
    data_class=DATA_CLASS_TENSOR,
)


class Outgoing(NamedTuple):
    """An Event that is ready to be written.

    Attributes:
        event: A protobuf ``Event`` without step and time.
        step: Its step, which rises within each tag.
        time: Its wall time, in seconds since 1970.
    """

    event: Any
    step: int
    time: float


def summary_event(summary: Any) -> Any:
    """Puts a ``Summary`` into an Event."""
    return Event(summary=summary)


def array_event(arrays: dict[Tag, NDArray[Any]], *, described: bool) -> Any:
    """Puts arrays into one Event, so that a reader sees all of them or none.

    Args:
        arrays: Tag to a float32, float64 or uint16 array.
        described: Whether the tags were written before. TensorBoard reads a tag's metadata from its
            first Event only.
    """
    event = Event()
    for tag, array in arrays.items():
        tensor = _add_tensor(event, tag, described=described)
        tensor.dtype = _TYPES[array.dtype]
        tensor.tensor_content = array.tobytes()  # float_val would be filled number by number
        _set_shape(tensor, array.shape)
    return event


def text_event(tag: Tag, texts: str | Sequence[str], *, described: bool = False) -> Any:
    """Puts texts into an Event, as a string tensor.

    One string makes a tensor of shape ``[]``, a sequence one of shape ``[texts]``. ``described``
    says whether the tag was written before.
    """
    event = Event()
    tensor = _add_tensor(event, tag, described=described)
    tensor.dtype = types_pb2.DT_STRING
    lines = [texts] if isinstance(texts, str) else texts
    tensor.string_val.extend(line.encode() for line in lines)
    _set_shape(tensor, () if isinstance(texts, str) else (len(lines),))
    return event


def _add_tensor(event: Any, tag: Tag, *, described: bool) -> Any:
    value = event.summary.value.add(tag=str(tag))
    if not described:
        value.metadata.CopyFrom(_METADATA)
    return value.tensor


def _set_shape(tensor: Any, shape: Sequence[int]) -> None:
    for size in shape:
        tensor.tensor_shape.dim.add(size=size)
