"""Pure numbers: norms, statistics, and the search for gradients that are not finite."""
