"""Every model that a process trains, watched without a line in its loop."""
