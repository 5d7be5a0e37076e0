"""UnreadableError: why a run folder, or a file in it, cannot be read."""

from __future__ import annotations


class UnreadableError(ValueError):
    """No run folder, half of one, one in a newer format, or a file in it that is damaged."""
