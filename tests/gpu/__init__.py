"""What only a real GPU can settle: `python tests/gpu/check.py`. Here it runs dry."""
