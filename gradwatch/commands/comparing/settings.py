"""What two runs were told, where that differs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gradwatch.commands.shared.as_json import as_json
from gradwatch.record.folder.meta import read_meta

PARTS = ("optimizers", "options", "versions")


def differing_settings(a: str, b: str) -> dict[str, tuple[Any, Any]]:
    """Compares optimizers, options of ``watch()`` and versions, those of the newest session.

    Args:
        a: A run folder.
        b: Another.

    Returns:
        By the path of a setting, ``optimizers.0.lr``, its two values; None where one has none.
    """
    mine, other = (dict(_flat("", _newest(run))) for run in (a, b))
    names = dict.fromkeys((*mine, *other))
    pairs = {name: (mine.get(name), other.get(name)) for name in names}
    return {name: pair for name, pair in pairs.items() if as_json(pair[0]) != as_json(pair[1])}


def _newest(run: str) -> Mapping[str, Any]:
    sessions = read_meta(Path(run)).sessions
    newest = sessions[-1] if sessions else {}
    return {name: newest.get(name) for name in PARTS}


def _flat(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Takes nested settings apart."""
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, Mapping) or not value:
        yield path, value
        return
    for name, one in value.items():
        yield from _flat(f"{path}.{name}" if path else str(name), one)
