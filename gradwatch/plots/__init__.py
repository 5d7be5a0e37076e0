"""Plots of a run with matplotlib. Importing this module does not import matplotlib."""

from __future__ import annotations

from importlib.util import find_spec

MISSING = "{what} needs matplotlib, which is not installed. Run: pip install 'gradwatch[plot]'"


def need_matplotlib(what: str) -> None:
    """Checks that matplotlib is installed.

    Args:
        what: The call that needs it, for the message: ``"plot_norms()"``.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    # Looked for, not imported: an error inside matplotlib must keep its own message.
    if find_spec("matplotlib") is None:
        raise ModuleNotFoundError(MISSING.format(what=what), name="matplotlib")
