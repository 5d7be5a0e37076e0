"""``--tensorboard DIR``: a run in TensorBoard for each model of a program."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from gradwatch.cli.arguments import CommandError

if TYPE_CHECKING:
    from gradwatch.record.records import Sink

_INTEGRATION = "gradwatch_tensorboard"
_MISSING = (
    "--tensorboard needs TensorBoard, which is not installed. Run: pip install "
    "'gradwatch[tensorboard]'"
)


def tensorboard_sinks(folder: str) -> Callable[[str], list[Sink]]:
    """Returns what to pass to ``watch_all(sinks=)``; imports neither TensorBoard nor torch yet.

    Args:
        folder: The folder for ``tensorboard --logdir``, or an address such as ``gs://...``; each
            model writes to a folder in it that has its name.

    Raises:
        CommandError: If TensorBoard is not installed, or the folder is empty or a file.
    """
    # Not imported here: the program must be the first to import torch. And not as a module of ours:
    # the core knows no integration.
    if find_spec("tensorboard") is None or find_spec(_INTEGRATION) is None:
        raise CommandError(_MISSING)
    if not folder or Path(folder).is_file():
        got = f"{folder!r}, which is a file" if folder else "an empty path"
        raise CommandError(f"--tensorboard must name a folder, got {got}.")

    def sinks(model: str) -> list[Sink]:
        return [import_module(_INTEGRATION).TensorBoardWriter(f"{folder.rstrip('/')}/{model}")]

    return sinks
