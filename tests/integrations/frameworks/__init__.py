"""Frameworks that own the loop, where the plain `watch()` is all that is needed."""
