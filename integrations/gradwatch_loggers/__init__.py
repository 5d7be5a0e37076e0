"""gradwatch on the boards that people look at: sinks for loggers, text logs and scrapers."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOMES = {
    "JSONLinesSink": "gradwatch_loggers.json_lines",
    "LogSink": "gradwatch_loggers.text_log",
    "MLflowSink": "gradwatch_loggers.mlflow_sink",
    "PrometheusSink": "gradwatch_loggers.prometheus",
    "ScalarSink": "gradwatch_loggers.scalar_sink",
    "WandbSink": "gradwatch_loggers.wandb_sink",
}
"""The public names, and the modules that have them: imported when somebody asks for a name.

So nobody needs a board that he does not use.
"""

if TYPE_CHECKING:
    from gradwatch_loggers.json_lines import JSONLinesSink as JSONLinesSink
    from gradwatch_loggers.mlflow_sink import MLflowSink as MLflowSink
    from gradwatch_loggers.prometheus import PrometheusSink as PrometheusSink
    from gradwatch_loggers.scalar_sink import ScalarSink as ScalarSink
    from gradwatch_loggers.text_log import LogSink as LogSink
    from gradwatch_loggers.wandb_sink import WandbSink as WandbSink
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
