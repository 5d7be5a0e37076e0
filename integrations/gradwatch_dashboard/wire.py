"""Wire: the format of the parameters-by-steps matrix in TensorBoard's event files.

The writer (:mod:`gradwatch_tensorboard`) and the reader (this package) share these definitions. All
tags belong to the plugin :data:`PLUGIN` and hold tensors.

A *session* is one process that writes a run. A *stream* is one optimizer in a session, with one set
of parameters. A *window* is one or more consecutive steps of a stream, and is one row of its
tensors. Windows are written in *chunks*, one Event each. A *segment* is the tag of up to a hundred
chunks, so that a reader can refresh by reading the newest segment only.

==================================  ==========================  ===================================
tag                                 tensor                      content
==================================  ==========================  ===================================
``layout/<session>/<stream>``       string ``[]``               JSON, see :class:`StreamLayout`
``norms/<session>/<stream>/<seg>``  float32 ``[windows, P]``    largest finite pre-clip norm; if
                                                                none is finite, the NaN or Inf
``bad/<session>/<stream>/<seg>``    uint16 ``[windows, P]``     steps whose norm is NaN or Inf;
                                                                ``[0, P]`` where there are none
``steps/<session>/<stream>/<seg>``  float64 ``[windows, C]``    :data:`COLUMNS`, then those that
                                                                the layout lists
``events/<session>``                string ``[events]``         JSON: the fields of an ``Event``,
                                                                the look of its mark, :data:`LOOKS`
==================================  ==========================  ===================================

All tags begin with ``gradwatch/``. The step of an Event is the first ``global_step`` that it
covers, or one more than the step of the previous Event, because steps must rise within a tag. A
resumed run hides all Events at or after its first step, but not a chunk that began earlier.

A session lists up to 10,000 events. An entry of the kind ``left_out`` after them says that there
were more. A second such entry, at the end of the session, replaces the first one. Its ``value`` is
how many were left out, and its ``message`` says how many of each kind.

A session replaces the data of earlier sessions for the same optimizer, from its own first step on,
because a run that is resumed from a checkpoint repeats some steps.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import NamedTuple

PLUGIN = "gradwatch"
"""Name of the plugin, in the metadata of the tags and in URLs."""

VERSION = 2
"""Version of the format; the plugin content of every tag is ``{"version": 2}``.

Version 1 had no further step columns, and its events had no look (color and shape).
"""

NO_GRADIENT = -1.0
"""The norm of a parameter that had no gradient in any step of the window."""

COLUMNS = (
    "first_step",
    "last_step",
    "global_step",
    "wall_time",
    "grad_norm",
    "grad_norm_clipped",
    "clip_threshold",
    "clip_coef",
    "bad_steps",
    "clipped_steps",
    "skipped_steps",
)
"""The first float64 columns of a window; the layout lists further ones.

``first_step`` and ``last_step`` are steps of the optimizer; ``global_step`` and ``wall_time`` are
those of the last step. The norms are the largest finite total norm before and after the clip (NaN
or Inf if none is finite). ``clip_threshold`` is that of the last step (NaN without a policy), and
``clip_coef`` the smallest coefficient. The last three columns count the steps with a non-finite
gradient, the clipped steps, and the steps that were not applied.
"""

REDUCTIONS = ("largest", "smallest", "newest")
"""How a further column reduces the steps of a window to one number."""

SHAPES = ("triangle", "square", "round")
"""Shapes that the mark of an event can have. Its color has the form ``#rrggbb``."""

LOOKS = {
    **dict.fromkeys(("nan", "inf"), ("#ff33ff", "triangle")),
    "overflow": ("#cc79a7", "triangle"),
    "exploding": ("#d55e00", "round"),
    "out_of_memory": ("#d55e00", "square"),
    "no_gradient": ("#56b4e9", "round"),
    "accumulate": ("#009e73", "round"),
    **dict.fromkeys(("skipped", "dropped"), ("#8a94a3", "square")),
}
"""Color and shape of version 1 events, by kind. Events of later versions carry their own look."""

OTHER_LOOK = ("#8a94a3", "round")
"""The look of other events that carry none."""

MAX_DIGITS = 9
"""Maximum digits of a number in a tag; tags with longer ones are not ours."""

_KINDS = ("layout", "norms", "bad", "steps", "events")


class Tag(NamedTuple):
    """The parts of a tag.

    Attributes:
        kind: ``"layout"``, ``"norms"``, ``"bad"``, ``"steps"`` or ``"events"``.
        session: When the process began to write, in milliseconds since 1970, as 12 hexadecimal
            digits, so that sessions sort as text.
        stream: Number of the stream in the session, from 0; 0 for events.
        segment: Number of the segment in the stream, from 0; 0 for layouts and events.
    """

    kind: str
    session: str
    stream: int = 0
    segment: int = 0

    def __str__(self) -> str:
        numbers = {"layout": f"/{self.stream}", "events": ""}
        return (
            f"{PLUGIN}/{self.kind}/{self.session}"
            f"{numbers.get(self.kind, f'/{self.stream}/{self.segment:04d}')}"
        )

    @classmethod
    def parse(cls, tag: str) -> Tag | None:
        """Parses a tag, which may be untrusted; None if it is not a tag of this format."""
        plugin, _, rest = tag.partition("/")
        kind, *parts = rest.split("/")
        if plugin != PLUGIN or kind not in _KINDS or not parts:
            return None
        numbers = parts[1:]
        if not all(n.isascii() and n.isdigit() and len(n) <= MAX_DIGITS for n in numbers):
            return None
        # Valid only if it formats back to the same text: "01" must not be a second name for "1".
        found = cls(kind, parts[0], *map(int, numbers)) if len(numbers) <= 2 else None
        return found if found is not None and str(found) == tag else None


@dataclass(frozen=True, slots=True)
class StreamLayout:
    """Describes the columns of a stream.

    Attributes:
        parameters: The ``P`` full parameter names.
        modules: For each parameter the name of the module that owns it.
        shapes: The shape of each parameter; empty if the writer did not know them.
        columns: Name and reduction of each further step column; see :data:`REDUCTIONS`.
    """

    optimizer: str
    parameters: tuple[str, ...]
    modules: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...] = ()
    columns: tuple[tuple[str, str], ...] = ()

    def to_json(self) -> str:
        """Returns the layout as a JSON object."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> StreamLayout:
        """Parses the JSON of :meth:`to_json`. The text may be untrusted.

        Raises:
            ValueError: If the text is not a valid layout.
        """
        try:
            content = json.loads(text)
            return cls(
                optimizer=checked_text(content["optimizer"]),
                parameters=tuple(map(checked_text, content["parameters"])),
                modules=tuple(map(checked_text, content["modules"])),
                shapes=tuple(tuple(map(int, shape)) for shape in content.get("shapes", ())),
                columns=tuple(
                    (checked_text(name), checked_text(reduction))
                    for name, reduction in content.get("columns", ())
                ),
            )
        except (LookupError, OverflowError, RecursionError, TypeError, ValueError) as error:
            raise ValueError(f"This is not the layout of a stream: {error!r}") from error


def plugin_content() -> bytes:
    """Returns the plugin content for the metadata of every tag."""
    return json.dumps({"version": VERSION}).encode()


def is_readable(content: bytes) -> bool:
    """Tells from the plugin content of a tag whether this reader knows its format."""
    try:
        version = json.loads(content)["version"]
    except (LookupError, RecursionError, TypeError, ValueError):
        return False
    # Not isinstance: True is an int in Python, but not a version.
    return type(version) is int and 1 <= version <= VERSION


def checked_text(value: object) -> str:
    """Returns a string from untrusted JSON.

    Raises:
        TypeError: If the value is not a string.
    """
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a string")
    return value
