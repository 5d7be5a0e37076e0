"""Pure numbers: norms, statistics and where gradients are not finite."""
