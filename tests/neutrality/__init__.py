"""A watcher that only watches leaves every bit of the training as it would have been.

pytest knows no package above this one, so the launcher of ranks is looked for in its folder.
"""

from pathlib import Path

__path__.append(str(Path(__file__).parents[1] / "distributed"))
