"""gradwatch for Lightning: a callback that watches the gradients of ``Trainer.fit``."""

from gradwatch.adapters import add_aliases

try:
    from gradwatch_lightning.monitor import GradientMonitor
except ModuleNotFoundError as exc:
    if exc.name != "lightning":
        raise
    raise ModuleNotFoundError(
        "gradwatch_lightning needs Lightning, which is not installed. "
        "Run: pip install 'gradwatch[lightning]'",
        name="lightning",
    ) from exc

__all__ = ["GradientMonitor"]

add_aliases(
    {"gradwatch_lightning.accumulation": "TrainerAccumulation"}, "gradwatch_lightning.trainer"
)
