"""How many micro-batches make a step, and the noise scale that suggests how many should."""
