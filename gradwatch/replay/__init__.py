"""Running a bad micro-batch again, and finding the operation that its NaN or Inf came from."""
