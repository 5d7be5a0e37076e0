"""What a run of MLflow shows besides metrics: the report, the events and the heat map."""

from __future__ import annotations

import io
from collections.abc import Callable

from gradwatch import Watcher
from gradwatch.adapters import warn_safely
from gradwatch_loggers.strict_json import event_object, json_line

MOST_EVENTS = 1_000
"""Most events in the file, the newest ones."""

FAILED = (
    "gradwatch: {name} could not be made for MLflow, because of {kind}: {error} All numbers are "
    "logged all the same. Leave it out: MLflowSink(artifacts=False)."
)


def artifacts_of(watcher: Watcher) -> dict[str, bytes]:
    """Returns what a watcher has to show at the end, by the name of the file.

    Args:
        watcher: Its history is read: at most its newest ``buffer_size`` steps.

    Returns:
        ``report.txt``, ``events.jsonl`` if there are any, and ``norms.png``, a heat map, if
        matplotlib is installed. What fails is left out, with a warning.
    """
    makers: dict[str, Callable[[Watcher], bytes]] = {"events.jsonl": _events}
    if len(watcher.history):
        makers |= {"report.txt": _report, "norms.png": _heat_map}
    made = {name: _made(name, make, watcher) for name, make in makers.items()}
    return {name: data for name, data in made.items() if data}


def _made(name: str, make: Callable[[Watcher], bytes], watcher: Watcher) -> bytes:
    try:
        return make(watcher)
    except Exception as error:
        warn_safely(FAILED.format(name=name, kind=type(error).__name__, error=error))
        return b""


def _events(watcher: Watcher) -> bytes:
    return b"".join(json_line(event_object(event)) for event in watcher.events[-MOST_EVENTS:])


def _report(watcher: Watcher) -> bytes:
    return f"{watcher.report()}\n".encode()


def _heat_map(watcher: Watcher) -> bytes:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:  # an extra of its own, gradwatch[plot]
        return b""
    figure = Figure(figsize=(10, 6), layout="constrained")  # not one of pyplot, with its windows
    watcher.history.plot_heatmap(figure.add_subplot())
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100)
    return file.getvalue()
