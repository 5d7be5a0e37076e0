"""Beginnings: where each session of a run begins, read from its parts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gradwatch.record.columns import array_of, labels_in
from gradwatch.record.folder.arrow import open_parquet, reading
from gradwatch.record.folder.parts import Part
from gradwatch.record.folder.query import read_columns
from gradwatch.record.folder.resume import first_steps
from gradwatch.record.folder.steps_table import LABELS


class Beginnings:
    """The first step of each session and optimizer; a part is read once."""

    def __init__(self, folder: Path) -> None:
        """Reads from a folder.

        Args:
            folder: The one with the parts of the steps.
        """
        self._folder = folder
        self._of_part: dict[Part, dict[str, int]] = {}

    def of(self, parts: Sequence[Part]) -> dict[int, dict[str, int]]:
        """Finds where sessions begin.

        Args:
            parts: The parts that there are.

        Returns:
            By session the lowest step of each optimizer; nothing where there is one session only,
            of which no step is void.
        """
        if len({part.session for part in parts}) < 2:
            return {}
        first: dict[int, dict[str, int]] = {}
        for part in parts:
            mine = first.setdefault(part.session, {})
            for label, lowest in self._read(part).items():
                mine[label] = min(lowest, mine.get(label, lowest))
        return first

    def _read(self, part: Part) -> dict[str, int]:
        if part not in self._of_part:
            path = self._folder / part.name
            file = open_parquet(path, LABELS)
            with reading(path):
                groups = range(file.metadata.num_row_groups)
                table = read_columns(file, groups, ("step", "optimizer"))
                steps, optimizers = array_of(table["step"]), labels_in(table["optimizer"])
            sessions = np.full(len(steps), part.session)
            first = first_steps(sessions, optimizers, steps)
            self._of_part[part] = first.get(part.session, {})
        return self._of_part[part]
