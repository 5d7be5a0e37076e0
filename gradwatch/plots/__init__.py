"""Plots of a run with matplotlib, which the first of them loads: this module itself does not."""

from __future__ import annotations

from importlib.util import find_spec

MISSING = "{what} needs matplotlib, which is not installed. Run: pip install 'gradwatch[plot]'"


def need_matplotlib(what: str) -> None:
    """Refuses a plot where matplotlib is missing.

    Args:
        what: What the user called, ``"plot_norms()"``.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    # Looked for, not imported: a failure inside of matplotlib keeps its own message.
    if find_spec("matplotlib") is None:
        raise ModuleNotFoundError(MISSING.format(what=what), name="matplotlib")
