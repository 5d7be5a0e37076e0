"""Tensors: values of an Event that only the Gradients tab reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tensorboard.compat.proto import types_pb2
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_TENSOR, SummaryMetadata

from gradwatch_dashboard.wire import PLUGIN, Tag, plugin_content

_TYPES = {
    np.dtype(np.float32): types_pb2.DT_FLOAT,
    np.dtype(np.float64): types_pb2.DT_DOUBLE,
    np.dtype(np.uint16): types_pb2.DT_UINT16,
}
# Without the data class no reader lists the tag.
_METADATA = SummaryMetadata(
    plugin_data=SummaryMetadata.PluginData(plugin_name=PLUGIN, content=plugin_content()),
    data_class=DATA_CLASS_TENSOR,
)


class Outgoing(NamedTuple):
    """An Event that is ready.

    Attributes:
        event: An ``Event`` without step and time.
        step: Its step; rises within each tag.
        time: Its wall time in seconds since 1970.
    """

    event: Any
    step: int
    time: float


def array_event(arrays: dict[Tag, NDArray[Any]], *, described: bool) -> Any:
    """Puts arrays into one Event, so that a reader sees all of them or none.

    Args:
        arrays: Tag to a float32, float64 or uint16 array.
        described: Whether the tags were written before: TensorBoard reads what a tag is from its
            first Event.

    Returns:
        The ``Event``.
    """
    event = Event()
    for tag, array in arrays.items():
        tensor = _add(event, tag, described=described)
        tensor.dtype = _TYPES[array.dtype]
        tensor.tensor_content = array.tobytes()
        _shape(tensor, array.shape)
    return event


def text_event(tag: Tag, texts: str | Sequence[str], *, described: bool = False) -> Any:
    """Puts texts into an Event.

    Args:
        tag: Their tag.
        texts: One text, a tensor of shape ``[]``; or several, one of shape ``[texts]``.
        described: Whether the tag was written before.

    Returns:
        The ``Event``.
    """
    event = Event()
    tensor = _add(event, tag, described=described)
    tensor.dtype = types_pb2.DT_STRING
    lines = [texts] if isinstance(texts, str) else texts
    tensor.string_val.extend(line.encode() for line in lines)
    _shape(tensor, () if isinstance(texts, str) else (len(lines),))
    return event


def _add(event: Any, tag: Tag, *, described: bool) -> Any:
    value = event.summary.value.add(tag=str(tag))
    if not described:
        value.metadata.CopyFrom(_METADATA)
    return value.tensor


def _shape(tensor: Any, shape: Sequence[int]) -> None:
    for size in shape:
        tensor.tensor_shape.dim.add(size=size)
