"""``gradwatch compare``: two runs by settings, by step and by parameter."""
