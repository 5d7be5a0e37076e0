"""check_gradients(): analytic gradients beside numeric ones, and where they differ."""

from __future__ import annotations
