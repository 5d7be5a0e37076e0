"""The curvature in TensorBoard: a scalar at the steps at which it was taken, and only there."""

import math

from gradwatch_tensorboard import TensorBoardWriter


def test_curvature_is_written_at_the_steps_at_which_it_was_taken(run, read, tmp_path):
    """A step without it is left out, and one at which it was not finite as well."""
    taken = {1: (4.0, 9.0), 3: (5.0, -1.0), 4: (math.inf, math.nan)}
    records = []
    for step in range(1, 6):
        eigenvalue, trace = taken.get(step, (math.nan, math.nan))
        records.append(run.record(step, hessian_eigenvalue=eigenvalue, hessian_trace=trace))
    writer = TensorBoardWriter(tmp_path)
    writer.write(run.batch(records))
    writer.close()

    assert read(tmp_path).series("gradwatch/hessian_eigenvalue") == [(1, 4.0), (3, 5.0)]
    assert read(tmp_path).series("gradwatch/hessian_trace") == [(1, 9.0), (3, -1.0)]
