"""What to keep: step records, events, the ring buffer, pandas frames and sinks."""
