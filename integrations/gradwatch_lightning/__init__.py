"""gradwatch for Lightning: a callback for ``Trainer.fit``, and a sink for the loggers of Fabric."""

from gradwatch.adapters import add_aliases

try:
    from gradwatch_lightning.fabric import FabricSink
    from gradwatch_lightning.monitor import GradientMonitor
except ModuleNotFoundError as exc:
    if exc.name != "lightning":
        raise
    raise ModuleNotFoundError(
        "gradwatch_lightning needs Lightning, which is not installed. "
        "Run: pip install 'gradwatch[lightning]'",
        name="lightning",
    ) from exc

__all__ = ["FabricSink", "GradientMonitor"]

add_aliases(
    {"gradwatch_lightning.accumulation": "TrainerAccumulation"}, "gradwatch_lightning.trainer"
)
