"""Clipping policies: norms in, a decision out; one rule per file."""
