"""gradwatch in TensorBoard: a sink that writes event files."""

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
