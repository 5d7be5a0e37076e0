"""A watcher that only watches leaves every bit of the training as it would have been."""
