"""Tables as aligned text, for any terminal, file or pipe."""

from __future__ import annotations

from collections.abc import Sequence

from gradwatch.commands.shared.printable import width

GAP = "  "


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Aligns cells: the first column to the left, the others to the right.

    Args:
        header: The names of the columns.
        rows: Cells of printable text.

    Returns:
        One line per row, the header first.
    """
    lines = [header, *rows]
    widths = [max(width(row[place]) for row in lines) for place in range(len(header))]
    return [_line(row, widths) for row in lines]


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    padding = [" " * (wide - width(cell)) for cell, wide in zip(row, widths, strict=True)]
    cells = [row[0] + padding[0]]
    cells += [gap + cell for cell, gap in zip(row[1:], padding[1:], strict=True)]
    return GAP.join(cells).rstrip()
