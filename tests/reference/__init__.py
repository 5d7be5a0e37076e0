"""The recorded numbers are those of one process that computes in float64 with the data of all ranks.

The trainings are those of `tests/neutrality`, on the ranks of `tests/distributed`: pytest knows no
package above this one, so both folders are looked through.
"""

from pathlib import Path

__path__ += [str(Path(__file__).parents[1] / name) for name in ("neutrality", "distributed")]
