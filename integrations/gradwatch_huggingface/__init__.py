"""gradwatch for Hugging Face: a callback for ``Trainer``, and a sink for Accelerate's trackers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOMES = {
    "AcceleratorSink": "gradwatch_huggingface.accelerator",
    "GradientMonitorCallback": "gradwatch_huggingface.callback",
}
"""The public names, and the modules that have them: Accelerate does without transformers."""

if TYPE_CHECKING:
    from gradwatch_huggingface.accelerator import AcceleratorSink as AcceleratorSink
    from gradwatch_huggingface.callback import GradientMonitorCallback as GradientMonitorCallback
else:
    __all__ = list(_HOMES)

    def __getattr__(name: str) -> Any:
        """Imports a public name."""
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(_HOMES[name]), name)
        return value

    def __dir__() -> list[str]:
        """Returns the public names, whether they have been imported or not."""
        return sorted({*globals(), *__all__})
