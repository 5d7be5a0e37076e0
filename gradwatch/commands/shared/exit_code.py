"""The exit codes of every command."""

from __future__ import annotations

FINE = 0
FINDINGS = 1
"""The report has findings that ``--fail-on`` names."""
PROBLEM = 2
"""Wrong usage, a run that cannot be read, or a file that cannot be written."""
INTERRUPTED = 130
"""Ctrl-C, but for ``tail``, which ends so: 0."""
TERMINATED = 143
