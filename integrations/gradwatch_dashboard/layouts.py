"""Layouts: what the columns of a stream stand for, read from a stranger's file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gradwatch_dashboard.names import fit_name
from gradwatch_dashboard.notes import note
from gradwatch_dashboard.wire import StreamLayout, Tag

_WRONG = "The Gradients tab leaves out the stream %s of run %s: its layout is damaged."


def read_layout(run: str, tag: Tag, data: Sequence[Any]) -> StreamLayout | None:
    """Reads a layout.

    Args:
        run: For the log.
        tag: Its tag.
        data: Its ``TensorDatum``s.

    Returns:
        The first that is whole, with names that fit into an answer; None where none is.
    """
    layouts = [layout for datum in data if (layout := _read(datum.numpy)) is not None]
    if not layouts:
        note(_WRONG, str(tag), run)
        return None
    return layouts[0]


def _read(array: Any) -> StreamLayout | None:
    try:
        (text,) = array.ravel().tolist()
        return _checked(StreamLayout.from_json(text))
    except ValueError:
        return None


def _checked(layout: StreamLayout) -> StreamLayout:
    count = len(layout.parameters)
    shapes = layout.shapes or ((),) * count
    if len(layout.modules) != count or len(shapes) != count:
        raise ValueError("modules and shapes are not as many as the parameters")
    if any(not 0 <= size < 2**53 for shape in shapes for size in shape):
        raise ValueError("a shape has a size that is none")
    parameters = tuple(map(fit_name, layout.parameters))
    if len(set(parameters)) != count:
        raise ValueError("two parameters have the same name")
    return StreamLayout(
        fit_name(layout.optimizer), parameters, tuple(map(fit_name, layout.modules)), shapes
    )
