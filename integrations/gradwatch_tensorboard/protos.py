"""Protos: the messages that event files are made of, built cheaply."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import DATA_CLASS_SCALAR, SummaryMetadata
from torch.utils.tensorboard import summary

_MAX_TEMPLATES = 64


def _metadata(description: str) -> Any:
    plugin = SummaryMetadata.PluginData(plugin_name="scalars")
    return SummaryMetadata(
        plugin_data=plugin, data_class=DATA_CLASS_SCALAR, summary_description=description
    )


class ScalarEvents:
    """Fills one Event with the scalars of a step.

    Building a message takes ten times as long as writing numbers into one that is there, so a
    message is kept for each set of tags that occurs. TensorBoard keeps the first metadata of a tag
    and ignores the rest, so a tag's meaning goes out once.
    """

    def __init__(self) -> None:
        """Starts with no tag described."""
        self._described: set[str] = set()
        self._templates: dict[tuple[str, ...], tuple[Any, list[Any]]] = {}

    def fill(self, values: Mapping[str, float], meaning: Callable[[str], str]) -> Any:
        """Puts the values of a step into one Event.

        Args:
            values: Tag to value.
            meaning: Says what a tag means; asked once for each.

        Returns:
            An ``Event`` without step and time, valid until the next call.
        """
        tags = tuple(values)
        if tags not in self._templates and not self._described.issuperset(tags):
            return self._describe(values, meaning)
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
        if len(self._templates) >= _MAX_TEMPLATES:
            self._templates.clear()
        event = Event()
        slots = [event.summary.value.add(tag=tag) for tag in tags]
        self._templates[tags] = event, slots
        return event, slots


def text_summary(tag: str, markdown: str) -> Any:
    """Puts a text into a message.

    Args:
        tag: Its tag.
        markdown: The text.

    Returns:
        A ``Summary`` for the Text dashboard.
    """
    return summary.text(tag, markdown)  # type: ignore[no-untyped-call]  # torch's own
