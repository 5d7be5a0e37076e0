"""MetricKeys: names of metrics that MLflow accepts."""

from __future__ import annotations

import posixpath
import re

MOST_CHARACTERS = 250

_FORBIDDEN = re.compile(r"[^\w.\- /]")  # a colon too: MLflow on Windows refuses it


class MetricKeys:
    """Turns tags into names of metrics: letters, digits, ``_``, ``-``, ``.``, blanks and slashes.

    Other characters become underscores. Two tags never get one name: the second is numbered.

    Example:
        >>> keys = MetricKeys()
        >>> keys["gradwatch_blocks/heads[0]"], keys["gradwatch_blocks/heads(0)"]
        ('gradwatch_blocks/heads_0_', 'gradwatch_blocks/heads_0_-2')
    """

    def __init__(self) -> None:
        """Starts without a tag."""
        self._keys: dict[str, str] = {}
        self._taken: set[str] = set()

    def __getitem__(self, tag: str) -> str:
        if tag not in self._keys:
            # MLflow takes a name for a path: "a//b" and "a/../b" are refused.
            key = _FORBIDDEN.sub("_", tag).replace("..", "_.")
            key = posixpath.normpath(key).lstrip("/")[:MOST_CHARACTERS].rstrip("/")
            key = "_" if key in ("", ".") else key
            unique, number = key, 1
            while unique in self._taken:
                number += 1
                end = f"-{number}"
                unique = key[: MOST_CHARACTERS - len(end)] + end
            self._taken.add(unique)
            self._keys[tag] = unique
        return self._keys[tag]
