"""The life of an optimizer step: from the first backward of its window to its record."""
