"""Plain: tail as lines that stay."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from gradwatch.commands.live.follower import KEPT, Follower, New
from gradwatch.commands.live.lines import json_lines, text_lines
from gradwatch.commands.shared.printable import printable

if TYPE_CHECKING:
    from gradwatch.commands.shared.output import Output


class Plain:
    """Writes what has come, a line per step and event."""

    def __init__(self, out: Output, run: str, most: int, *, json: bool) -> None:
        """Writes nothing yet.

        Args:
            out: Where to write.
            run: How the run is called.
            most: Steps to write of those that are there at the first look.
            json: Whether to write JSON.
        """
        self._out, self._run, self._most, self._json = out, printable(run), most, json
        self._told = False

    def __enter__(self) -> Plain:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def waiting(self) -> None:
        """Says once that the run has not begun."""
        if not self._told and not self._json:
            self._out.line(f"Waiting for {self._run} to begin ...")
            self._out.flush()
        self._told = True

    def show(self, follower: Follower, new: New) -> None:
        """Writes what has come.

        Args:
            follower: What is known.
            new: What has come.
        """
        for line in self._lines(follower, new):
            self._out.line(line)
        self._out.flush()
        if follower.rows:
            self._most = KEPT

    def _lines(self, follower: Follower, new: New) -> Iterator[str]:
        if self._json:
            return json_lines(new, self._most)
        if not follower.rows and not self._told:
            self._told = True
            return iter([f"{self._run} has no steps yet."])
        several = len({row.optimizer for row in follower.rows}) > 1
        return text_lines(new, self._most, several)
