"""Training in several processes: torch.distributed over gloo on CPUs, with nothing imported from the package but its public names."""
