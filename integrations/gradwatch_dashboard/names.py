"""Names: of optimizers, parameters and modules, as they may stand in an answer."""

from __future__ import annotations

MAX_CHARACTERS = 1000
"""Longer names are cut: a browser has to lay them out."""


def fit_name(name: str) -> str:
    """Cuts what is too long and replaces what no UTF-8 text can hold.

    Args:
        name: Any text.

    >>> fit_name("layer.weight")
    'layer.weight'
    """
    if len(name) > MAX_CHARACTERS:
        name = f"{name[:MAX_CHARACTERS]}..."
    return name.encode("utf-8", "replace").decode()
