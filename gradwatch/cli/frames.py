"""Tracebacks without gradwatch's frames: a program ends with the words of plain Python."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import CodeType, TracebackType
from typing import Any

SHOWN = "GRADWATCH_TRACEBACK"
"""Environment variable; if set to 1, our frames stay in the tracebacks."""

_OURS = f"{Path(__file__).absolute().parent.parent}{os.sep}"
_TORCH = f"{os.sep}torch{os.sep}"

_launchers: list[CodeType] = []
_afterwards: list[Callable[[], None]] = []


def add_launchers(*codes: CodeType) -> None:
    """Names functions that start a program: they and all outside of them are not the program's."""
    _launchers.extend(codes)


def after_the_traceback(act: Callable[[], None]) -> None:
    """Has something done once Python has printed the exception that is on its way; else now."""
    error = sys.exc_info()[1]
    # Python ends at once on SystemExit, without an excepthook.
    if error is None:
        act()
    elif not isinstance(error, SystemExit):
        _afterwards.append(act)


def hide() -> None:
    """Has Python, or the program's own ``sys.excepthook``, show exceptions without our frames."""
    # Only now, at the end of the program: while it ran, it saw and set the hook that it had.
    theirs = getattr(sys, "excepthook", sys.__excepthook__)

    def excepthook(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        sys.excepthook = theirs
        if os.environ.get(SHOWN, "0") in ("", "0"):
            strip(error)
            sys.last_traceback = error.__traceback__
        _show(theirs, kind, error)
        for act in _afterwards:
            act()

    sys.excepthook = excepthook


def _show(hook: Any, kind: type[BaseException], error: BaseException) -> None:
    try:
        hook(kind, error, error.__traceback__)
    except SystemExit:
        raise
    except BaseException as broken:
        # What Python does about a hook that fails. It would show this frame.
        strip(broken)
        broken.__context__ = None
        _say("Error in sys.excepthook:\n")
        sys.__excepthook__(type(broken), broken, broken.__traceback__)
        _say("\nOriginal exception was:\n")
        sys.__excepthook__(kind, error, error.__traceback__)


def _say(text: str) -> None:
    if sys.stderr is not None:
        sys.stderr.write(text)


def strip(error: BaseException) -> None:
    """Takes our frames out of an exception, and out of all that it is chained to or a group of."""
    seen: dict[int, BaseException] = {}
    left: list[Any] = [error]
    while left:
        one = left.pop()
        if isinstance(one, BaseException) and id(one) not in seen:
            seen[id(one)] = one
            one.__traceback__ = _theirs(one.__traceback__)
            left += one.__cause__, one.__context__
            parts = getattr(one, "exceptions", ())  # of an ExceptionGroup, of Python or backported
            left += parts if isinstance(parts, tuple) else ()


def _theirs(traceback: TracebackType | None) -> TracebackType | None:
    entries = list(_entries(traceback))
    start = [at + 1 for at, one in enumerate(entries) if one.tb_frame.f_code in _launchers]
    kept: TracebackType | None = None
    for one in reversed(_without_ours(entries[max(start, default=0) :])):
        kept = TracebackType(kept, one.tb_frame, one.tb_lasti, one.tb_lineno)
    return kept


def _entries(traceback: TracebackType | None) -> Iterator[TracebackType]:
    while traceback is not None:
        yield traceback
        traceback = traceback.tb_next


def _without_ours(entries: Sequence[TracebackType]) -> list[TracebackType]:
    ours: list[bool] = []
    for entry in entries:
        name = entry.tb_frame.f_code.co_filename
        # A dataclass's __init__ is "<string>", and belongs to what has called it.
        ours.append(ours[-1] if ours and name == "<string>" else name.startswith(_OURS))
    inner = len(entries)
    while inner and ours[inner - 1]:
        inner -= 1
    kept = [entry for entry, hidden in zip(entries[:inner], ours, strict=False) if not hidden]
    # Where the innermost frames are ours, torch has called us (a hook, the entry of its engine),
    # and plain Python shows torch's frame last; or the program has called us, and sees our error.
    if kept and not _is_torch(kept[-1]):
        kept += entries[inner:]
    return kept


def _is_torch(entry: TracebackType) -> bool:
    return _TORCH in entry.tb_frame.f_code.co_filename
