"""Missing: the parameters that received no gradient in a window, each told once in a run."""

from __future__ import annotations

from gradwatch.control.window import Window
from gradwatch.run import Run


class Missing:
    """Remembers which parameters of one optimizer have been told of."""

    def __init__(self, run: Run) -> None:
        """Starts with none told.

        Args:
            run: The run.
        """
        self._run = run
        self._told: set[int] = set()

    def of(self, window: Window) -> list[int]:
        """Lists the parameters that required a gradient and received none, for the first time.

        Args:
            window: The window of a step that is over.

        Returns:
            Their indices, ascending.
        """
        filled, indices = window.filled, window.indices
        if not filled or len(filled[0][0]) >= len(indices):
            return []
        arrived = window.arrived
        tensors, hooked = self._run.table.tensors, self._run.hooks.hooked
        missing = [
            index
            for index in indices
            if index not in arrived
            and index not in self._told
            and tensors[index].requires_grad
            and hooked(index)
        ]
        self._told.update(missing)
        return missing
