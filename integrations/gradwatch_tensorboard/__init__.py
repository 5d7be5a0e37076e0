"""gradwatch for TensorBoard: a sink that writes event files."""

from gradwatch.adapters import add_aliases

try:
    from gradwatch_tensorboard.writer import TensorBoardWriter
except ModuleNotFoundError as exc:
    if exc.name != "tensorboard":
        raise
    raise ModuleNotFoundError(
        "gradwatch_tensorboard needs TensorBoard, which is not installed. "
        "Run: pip install 'gradwatch[tensorboard]'",
        name="tensorboard",
    ) from exc

__all__ = ["TensorBoardWriter"]

add_aliases({"gradwatch_tensorboard.protos": "ScalarEvents"}, "gradwatch_tensorboard.messages")
add_aliases({"gradwatch_tensorboard.text": "EventText"}, "gradwatch_tensorboard.events")
