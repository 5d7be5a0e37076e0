"""The local variables of running functions, read without leaving references behind."""

from __future__ import annotations

import inspect
import sys
from types import FrameType
from typing import Any

_OURS = 3  # references to a snapshot: by the frame, by a variable here, by the call that counts


def local_variables(frame: FrameType) -> dict[str, Any]:
    """Returns the variables of a frame as they are now: those of a function, a module or a class.

    Up to Python 3.12 ``frame.f_locals`` of a function makes a dict that stays in the frame, and
    keeps whatever the variables hold now until the function returns: a training loop's first model,
    when it has gone on to the next. Such a dict is emptied again, unless somebody else has it.
    """
    found = frame.f_locals
    variables = dict(found)
    # Elsewhere it is the namespace itself. A tracing function writes what is in the dict back into
    # the variables; since Python 3.13 there is a proxy, which holds nothing.
    is_snapshot = frame.f_code.co_flags & inspect.CO_OPTIMIZED and type(found) is dict
    if is_snapshot and frame.f_trace is None and sys.getrefcount(found) == _OURS:
        found.clear()
    return variables
