"""Matrices whose spectrum is known."""

import numpy as np
import torch


def symmetric(eigenvalues, seed=0):
    """A symmetric matrix with these eigenvalues, in a random basis, in float64."""
    random = np.random.default_rng(seed)
    basis, _ = np.linalg.qr(random.normal(size=(len(eigenvalues), len(eigenvalues))))
    return torch.tensor(basis @ np.diag(eigenvalues) @ basis.T)
