"""How many micro-batches make a step, and the noise scale that tells how many should."""
