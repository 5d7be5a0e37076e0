"""Every model that a process trains: found, watched and reported without a line in its loop."""
