"""The life of one optimizer step: from the first backward of its window to its record."""
