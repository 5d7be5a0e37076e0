"""Every model that a process trains, found without a line in its code."""
