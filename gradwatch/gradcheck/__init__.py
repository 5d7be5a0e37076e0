"""check_gradients(): analytic gradients beside numeric ones, and where they differ."""
