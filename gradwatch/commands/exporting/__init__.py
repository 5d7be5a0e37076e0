"""``gradwatch export``: a table of a run as CSV, JSON or Parquet, piece by piece."""
