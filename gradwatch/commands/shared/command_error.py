"""CommandError: what a command cannot do, told to the user in one line."""

from __future__ import annotations


class CommandError(Exception):
    """Wrong usage, or a run or a file that cannot be used; the command ends with exit code 2."""
