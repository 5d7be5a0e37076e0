"""Functions that several models use, in a file of their own."""

import functools
import math

import torch


def log_density(x, mean, scale):
    """Return the log of a normal density."""
    z = (x - mean) / scale.clamp(min=1e-3)
    return (
        -0.5 * z**2
        - torch.log(scale)  # <- born
        - 0.5 * math.log(2 * math.pi)
    )


def length(x):
    """Return the norm of each row, with an infinite gradient at 0."""
    squares = (x * x).sum(-1)
    return squares.sqrt()  # <- born


def checked(function):
    """Wrap a forward, as decorators do."""

    @functools.wraps(function)
    def inside(*args, **kwargs):
        output = function(*args, **kwargs)
        assert torch.is_tensor(output)
        return output

    return inside
