"""Binning as the specification says it, step by step, for comparison."""

import math

NOTHING, NO_GRADIENT = -2.0, -1.0


def column_of_step(step, first, last, columns):
    """The formula of the specification."""
    return (step - first) * columns // (last - first + 1)


def columns_of_window(window, first, last, columns):
    """The columns that the steps of a window fall into."""
    steps = range(max(window["first"], first), min(window["last"], last) + 1)
    return sorted({column_of_step(step, first, last, columns) for step in steps})


def cell(values):
    """What one cell shows of the norms in it."""
    finite = [v for v in values if math.isfinite(v) and v >= 0]
    if finite:
        return max(finite)
    if any(math.isnan(v) for v in values):
        return math.nan
    if any(math.isinf(v) for v in values):
        return math.inf
    return NO_GRADIENT if values else NOTHING


def slow_heatmap(windows, parameters, first, last, columns):
    """The norms and the bad steps of each cell, lists ``[P][columns]``."""
    norms = [[[] for _ in range(columns)] for _ in range(parameters)]
    bad = [[0] * columns for _ in range(parameters)]
    for window in windows:
        for column in columns_of_window(window, first, last, columns):
            for parameter in range(parameters):
                if window["norms"][parameter] != NOTHING:
                    norms[parameter][column].append(window["norms"][parameter])
                bad[parameter][column] += window["bad"][parameter]
    return [[cell(values) for values in row] for row in norms], bad
