"""Wire: how the matrix of parameters by steps lies in TensorBoard's event files.

The writer (:mod:`gradwatch_tensorboard`) and the reader (this package) agree here. All tags belong
to the plugin :data:`PLUGIN` and hold tensors.

A *session* is one process that writes a run, and a *stream* is one optimizer of it with one set of
parameters. A *window* is one or more consecutive steps of a stream, a row of its tensors. Windows
go out in chunks, one Event each; a *segment* is the tag of up to a hundred chunks, so that a reader
that comes back reads the newest segment only.

==================================  ==========================  ===================================
tag                                 tensor                      content
==================================  ==========================  ===================================
``layout/<session>/<stream>``       string ``[]``               JSON, see :class:`StreamLayout`
``norms/<session>/<stream>/<seg>``  float32 ``[windows, P]``    largest finite pre-clip norm; where
                                                                none is finite the NaN or Inf
``bad/<session>/<stream>/<seg>``    uint16 ``[windows, P]``     steps whose norm is NaN or Inf;
                                                                ``[0, P]`` where there are none
``steps/<session>/<stream>/<seg>``  float64 ``[windows, C]``    :data:`COLUMNS`, then those that
                                                                the layout lists
``events/<session>``                string ``[events]``         JSON: the fields of an ``Event``,
                                                                the look of its mark, :data:`LOOKS`
==================================  ==========================  ===================================

All begin with ``gradwatch/``. The step of an Event is the first ``global_step`` that it covers, or
one more than that of the Event before, as it has to rise within a tag. A run that is resumed hides
what begins at its first step or later, and leaves the chunk that it cuts in two.

Events are listed up to 10,000 in a session. An entry of the kind ``left_out`` behind them says that
there were more; a second one, at the end of the session, stands in its place and says in its
``value`` how many, and in its ``message`` how many of each kind.

A session replaces what earlier ones of the run hold of the same optimizer from its first step on: a
run that was resumed from a checkpoint repeats some steps.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import NamedTuple

PLUGIN = "gradwatch"
"""Name of the plugin: in the metadata of the tags and in addresses."""

VERSION = 2
"""Version of the format; the plugin content of every tag is ``{"version": 2}``.

Version 1 had no further columns of steps, and its events had no look.
"""

NO_GRADIENT = -1.0
"""Stands for the norm of a parameter that had no gradient in any step of the window."""

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
"""What the first float64 columns of a window say; further ones are listed by the layout.

The first and the last step of the optimizer, the ``global_step`` and the wall time of the last one;
the largest finite total norm before and after the clip (where none is finite the NaN or Inf), the
threshold of the last step (NaN without a policy), the smallest clip coefficient; and the steps with
a non-finite gradient, those that were clipped, and those that were not applied.
"""

REDUCTIONS = ("largest", "smallest", "newest")
"""How a further column puts the steps of a window together: by the largest number, or the last."""

SHAPES = ("triangle", "square", "round")
"""Shapes of the mark of an event; its color is ``#rrggbb``."""

LOOKS = {
    **dict.fromkeys(("nan", "inf"), ("#ff33ff", "triangle")),
    "overflow": ("#cc79a7", "triangle"),
    "exploding": ("#d55e00", "round"),
    "out_of_memory": ("#d55e00", "square"),
    "no_gradient": ("#56b4e9", "round"),
    "accumulate": ("#009e73", "round"),
    **dict.fromkeys(("skipped", "dropped"), ("#8a94a3", "square")),
}
"""How events of version 1 look, by kind; an event of a later version says it itself."""

OTHER_LOOK = ("#8a94a3", "round")
"""How an event looks that does not say it."""

MAX_DIGITS = 9
"""Of a number in a tag: longer ones are not ours."""

_KINDS = ("layout", "norms", "bad", "steps", "events")


class Tag(NamedTuple):
    """The parts of a tag.

    Attributes:
        kind: ``"layout"``, ``"norms"``, ``"bad"``, ``"steps"`` or ``"events"``.
        session: Milliseconds since 1970 when the process began to write, 12 hexadecimal digits:
            their order is that of the alphabet.
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
        """Reads the parts of a tag, of a stranger's file too; None where it is none of ours."""
        plugin, _, rest = tag.partition("/")
        kind, *parts = rest.split("/")
        if plugin != PLUGIN or kind not in _KINDS or not parts:
            return None
        numbers = parts[1:]
        if not all(n.isascii() and n.isdigit() and len(n) <= MAX_DIGITS for n in numbers):
            return None
        # Whole only where it reads back the same: "01" and "1" must not be two names of a stream.
        found = cls(kind, parts[0], *map(int, numbers)) if len(numbers) <= 2 else None
        return found if found is not None and str(found) == tag else None


@dataclass(frozen=True, slots=True)
class StreamLayout:
    """What the columns of a stream stand for.

    Attributes:
        optimizer: Label of the optimizer.
        parameters: Full parameter names, ``P`` of them.
        modules: Name of the module that owns each parameter.
        shapes: Shape of each parameter.
        columns: Name and reduction of each further column of the steps; see :data:`REDUCTIONS`.
    """

    optimizer: str
    parameters: tuple[str, ...]
    modules: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...] = ()
    columns: tuple[tuple[str, str], ...] = ()

    def to_json(self) -> str:
        """Writes it."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> StreamLayout:
        """Reads it.

        Args:
            text: Of :meth:`to_json`, or a stranger's.

        Raises:
            ValueError: If it is something else.
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
            raise ValueError(f"This is no layout of a stream: {error!r}") from error


def plugin_content() -> bytes:
    """Returns what the metadata of every tag holds."""
    return json.dumps({"version": VERSION}).encode()


def is_readable(content: bytes) -> bool:
    """Tells whether this reader knows the format of a tag, by the plugin content of it."""
    try:
        version = json.loads(content)["version"]
    except (LookupError, RecursionError, TypeError, ValueError):
        return False
    # Not isinstance: True is an int in Python, and no version.
    return type(version) is int and 1 <= version <= VERSION


def checked_text(value: object) -> str:
    """Returns a text out of a stranger's JSON; a TypeError if it is something else."""
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value
