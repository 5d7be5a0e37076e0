"""What is written down: records, events, the memory of the newest steps, sinks and files."""
