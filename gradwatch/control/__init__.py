"""What to do: clipping policies, accumulation, skipping, and the optimizer-step boundary."""
