"""The recorded numbers are those of one process that computes in float64 with the data of all ranks.

The trainings are those of `tests/neutrality`.
"""
