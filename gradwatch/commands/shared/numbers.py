"""Numbers as text for people."""

from __future__ import annotations

import math


def number(value: float) -> str:
    """Writes a measured number with four digits.

    Args:
        value: Any number.

    Example:
        >>> number(0.123456), number(1234567.0), number(float("nan"))
        ('0.1235', '1.235e+06', 'nan')
    """
    return f"{value:.4g}"


def or_dash(value: float) -> str:
    """Writes a number, and a dash where there is none.

    Args:
        value: A number; NaN where it is not known.
    """
    return "-" if math.isnan(value) else number(value)


def times(ratio: float) -> str:
    """Writes a ratio.

    Args:
        ratio: What one number is, divided by the other.

    Example:
        >>> times(0.5), times(1234.0)
        ('x0.5', 'x1234')
    """
    return f"x{ratio:.4g}"


def percent(share: float) -> str:
    """Writes a share from 0 to 1; a dash where it is NaN.

    Args:
        share: The share.
    """
    return "-" if math.isnan(share) else f"{100 * share:.3g} %"


def counted(amount: int, one: str, many: str = "") -> str:
    """Writes a number of things.

    Args:
        amount: How many.
        one: The word for one of them.
        many: The word for several; ``one`` with an s if left out.

    Example:
        >>> counted(1, "step"), counted(12000, "step")
        ('1 step', '12,000 steps')
    """
    return f"{amount:,} {one if amount == 1 else many or one + 's'}"
