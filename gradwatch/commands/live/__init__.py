"""``gradwatch tail``: follows a run while it is written, in memory that does not grow with it."""
