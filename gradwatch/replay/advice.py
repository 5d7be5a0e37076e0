"""To be replaced."""

from gradwatch.record.explanation import Explanation


def advice_for(explanation: Explanation) -> str:
    """To be replaced."""
    return ""
