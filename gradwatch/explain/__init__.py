"""What it means: events made from measured numbers."""
