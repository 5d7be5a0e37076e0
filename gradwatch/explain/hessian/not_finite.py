"""NotFiniteError: there is no curvature here, as against there will never be one."""

from __future__ import annotations


class NotFiniteError(ValueError):
    """A loss or its Hessian is not finite at these weights; at others it may be."""
