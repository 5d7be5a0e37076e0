"""What W&B shows besides charts: the heat map, the report and the events of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import wandb

from gradwatch import Watcher
from gradwatch.adapters import warn_safely

MOST_EVENTS = 1_000
"""Most events in the table, the newest ones."""

FAILED = (
    "gradwatch: {what} could not be drawn for W&B, because of {kind}: {error} All numbers are "
    "written all the same. Leave it out: WandbSink(media=False)."
)


def media_of(watcher: Watcher, group: str) -> dict[str, Any]:
    """Returns what a watcher has to show now, by tag.

    Args:
        watcher: Its history is read: at most its newest ``buffer_size`` steps.
        group: What tags begin with.

    Returns:
        ``heatmap`` (an image, if matplotlib is installed), ``report`` (HTML) and ``events`` (a
        table, if there are any). What fails is left out, with a warning.
    """
    media = {}
    if len(watcher.history):
        for name, make in (("heatmap", _heatmap), ("report", _report), ("events", _events)):
            if (one := _made(make, watcher, f"{group}/{name}")) is not None:
                media[f"{group}/{name}"] = one
    return media


def _made(make: Callable[[Watcher], Any], watcher: Watcher, tag: str) -> Any:
    try:
        return make(watcher)
    except Exception as error:
        warn_safely(FAILED.format(what=tag, kind=type(error).__name__, error=error))
        return None


def _heatmap(watcher: Watcher) -> wandb.Image | None:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:  # an extra of its own, gradwatch[plot]
        return None
    # Not one of pyplot, which may have a window.
    figure = Figure(figsize=(11, 6), dpi=120, layout="constrained")
    watcher.history.plot_heatmap(figure.add_subplot())
    return wandb.Image(figure)


def _report(watcher: Watcher) -> wandb.Html:
    return wandb.Html(watcher.report()._repr_html_())


def _events(watcher: Watcher) -> wandb.Table | None:
    columns: list[str | int] = ["step", "optimizer", "kind", "parameter", "value", "message"]
    rows: list[Iterable[Any]] = [
        [getattr(one, str(name)) for name in columns] for one in watcher.events[-MOST_EVENTS:]
    ]
    return wandb.Table(columns=columns, data=rows) if rows else None
