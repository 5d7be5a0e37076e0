"""What more than one suite needs."""
