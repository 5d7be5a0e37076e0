"""What several commands use: opening a run, text for terminals, JSON, files."""
