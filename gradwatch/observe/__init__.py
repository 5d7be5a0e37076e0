"""What happened: arrival marks on parameters, the end of a backward, norms and statistics."""
