"""check_gradients(): compares analytic with numeric gradients, and says where they differ."""
