"""Settings as pytest's parameters: every choice once in the usual run, every pair in the slow one."""

from collections.abc import Sequence

import pytest
import torch

from .covering import Axes, Forbidden, Row, covering_array, name_of

NEEDS_SHARDS = pytest.mark.skipif(
    torch.__version__ < (2, 9), reason="FSDP2 on CPUs needs torch 2.9 or newer"
)

NEEDS_COMPLEX_GROUPS = pytest.mark.skipif(
    torch.__version__ < (2, 9), reason="gloo carries complex numbers in newer versions only"
)


def every_row(rows: Sequence[Row], *marks: pytest.MarkDecorator) -> list[object]:
    """Return parameters that are named after their choices."""
    return [pytest.param(row, id=name_of(row), marks=[*marks, *_marks_of(row)]) for row in rows]


def pairs_slowly(axes: Axes, forbidden: Forbidden = ()) -> list[object]:
    """Return settings with every choice in one of them, and slow ones with every pair."""
    few = covering_array(axes, forbidden, strength=1)
    pairs = [row for row in covering_array(axes, forbidden) if row not in few]
    return [*every_row(few), *every_row(pairs, pytest.mark.slow)]


def _marks_of(row: Row) -> list[pytest.MarkDecorator]:
    if row.get("layout", "").startswith(("fsdp", "tensor")):
        return [NEEDS_SHARDS]
    return [NEEDS_COMPLEX_GROUPS] if "layout" in row and row["model"] == "complex" else []
