"""What a run left behind, live or loaded, as pandas frames."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING

import numpy as np

from gradwatch.pickles import stable_name
from gradwatch.plots import need_matplotlib
from gradwatch.record.columns import (
    NORM_COLUMNS,
    STEP_COLUMNS,
    LiveSource,
    Source,
    Span,
    events_frame,
    table_frame,
)
from gradwatch.record.folder.reader import FolderSource
from gradwatch.record.records import Layout, RecordBatch

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from gradwatch.report.report import Report
    from gradwatch.report.thresholds import Thresholds

Names = str | re.Pattern[str] | Iterable[str]
"""Parameters: one by its name, several, or those in whose name a compiled pattern is found."""


@stable_name
class History:
    """The steps of a run and its events; reading it never changes the run.

    Of a live run it holds the newest ``buffer_size`` steps, of a folder all of them. Each call
    reads anew, so that what has come since is there, and from a folder reads only the files,
    columns and steps that it needs.
    """

    def __init__(self, source: Callable[[], RecordBatch] | Source) -> None:
        """Reads from a source.

        Args:
            source: Gives what is there when it is called, or can be read in parts.
        """
        self._source: Source = LiveSource(source) if callable(source) else source

    def __len__(self) -> int:
        return len(self._source.steps(("step",), Span())["step"])

    def __repr__(self) -> str:
        return (
            f"History({len(self)} steps, {len(self.layout.names)} parameters, "
            f"{len(self._source.events())} events)"
        )

    @property
    def layout(self) -> Layout:
        """The parameters: names, modules, shapes and aliases, in model order."""
        return self._source.layout()

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the parameters in model order."""
        return self.layout.names

    def steps(
        self,
        columns: Iterable[str] | None = None,
        *,
        start: int | None = None,
        stop: int | None = None,
    ) -> pd.DataFrame:
        """Returns one row per optimizer step.

        Args:
            columns: The columns to read; all if left out.
            start: The first step.
            stop: One after the last step.

        Returns:
            Index ``step`` (from 1 per optimizer); as columns the fields of
            :class:`~gradwatch.StepRecord`, but for ``global_step``.

        Raises:
            TypeError: If a bound is no integer, or the columns are no sequence of names.
            ValueError: If a column is unknown.
        """
        chosen = chosen_columns(columns, STEP_COLUMNS, "steps(columns=)")
        span = chosen_span(start, stop, "steps")
        return table_frame(self._source.steps(("step", *chosen), span), index="step")

    def parameters(
        self,
        names: Names | None = None,
        *,
        columns: Iterable[str] | None = None,
        start: int | None = None,
        stop: int | None = None,
    ) -> pd.DataFrame:
        """Returns one row per step and parameter that had a gradient in it.

        Args:
            names: Parameters to read: a name, several, or a compiled pattern
                (``re.compile("bias$")``) that is searched for in them; all if left out.
            columns: The columns to read besides ``step`` and ``parameter``; all if left out.
            start: The first step.
            stop: One after the last step.

        Returns:
            Columns ``step, parameter, grad_norm`` (before the clip), ``grad_norm_clipped`` (after
            it) and one per further statistic that ``watch(statistics=)`` asked for.

        Raises:
            TypeError: If a bound is no integer, or names or columns are no sequences of names.
            ValueError: If a name or a column is unknown.
        """
        known = (*NORM_COLUMNS, *self._source.statistics())
        chosen = chosen_columns(columns, known, "parameters(columns=)")
        indices = None if names is None else chosen_parameters(names, self.names)
        span = chosen_span(start, stop, "parameters")
        return table_frame(self._source.parameters(indices, chosen, span))

    def events(self) -> pd.DataFrame:
        """Returns one row per event, oldest first.

        Returns:
            As columns the fields of :class:`~gradwatch.Event`, but for ``global_step``.
        """
        return events_frame(self._source.events())

    def clip_rate(self, window: int = 1_000) -> float:
        """Returns the share of the newest applied steps that a clip has changed.

        Args:
            window: How many steps count at most; no more than ``watch(buffer_size=)`` are kept
                of a live run.

        Returns:
            A number from 0 to 1; NaN before the first step.
        """
        from gradwatch.report.rules.clipping import clip_rate

        return clip_rate(self._source, window)

    def advice(self) -> list[str]:
        """Returns a line for each optimizer whose clip acts on most steps, or on none."""
        from gradwatch.report.rules.clipping import clip_advice

        return clip_advice(self._source)

    def report(self, thresholds: Thresholds | None = None, **changes: float) -> Report:
        """Says what the run shows: findings with evidence, why they matter and what to try.

        Args:
            thresholds: The limits of the rules; the published ones if left out.
            **changes: Limits to change, by name: ``report(spike=20)``.

        Returns:
            The findings, the weightiest first: print it, show it in a notebook, or take
            ``.to_dict()``.
        """
        from gradwatch.report.report import make_report

        return make_report(self._source, thresholds, **changes)

    def flow(self, start: int | None = None, stop: int | None = None) -> pd.DataFrame:
        """Makes the table that shows where gradients vanish, explode or stop.

        Where the run holds more than some million numbers, steps are sampled evenly over it;
        ``steps`` says in how many of those there was a gradient.

        Args:
            start: The first step.
            stop: One after the last step.

        Returns:
            Index ``parameter`` in model order; columns

            - ``module`` that owns it, ``elements`` (0 where the shape is not known)
            - ``steps``: with a gradient, of the steps that were looked at
            - ``grad_norm``: median norm before the clip of the finite ones; ``rms_grad``: that over
              the root of ``elements``
            - ``weight_norm``, ``relative_grad``: median norm of the weights, and of gradient norm
              over weight norm; NaN where that statistic was not taken
            - ``zeros``: median share of elements that are exactly 0; NaN where it was not taken
            - ``zero_steps``, ``nonfinite_steps``: steps in which the whole gradient was exactly 0,
              and in which it held a NaN or an Inf
            - ``no_gradient``: share of the steps that were looked at without a gradient; where
              there are several optimizers, of the steps of the one that fits best

        Raises:
            TypeError: If a bound is no integer.
        """
        from gradwatch.report.flow import flow

        return flow(self._source, chosen_span(start, stop, "steps"))

    def plot_norms(
        self, ax: Axes | None = None, *, start: int | None = None, stop: int | None = None
    ) -> Axes:
        """Draws the total gradient norm by step, before and after the clip, and events above it.

        Steps with a NaN or an Inf are marked at the upper edge, norms of exactly 0 at the lower
        one. Of a long run the smallest and the largest norm of each pixel column are drawn, so that
        every spike is there, and the running median.

        Args:
            ax: Where to draw; a new figure if left out.
            start: The first step.
            stop: One after the last step.

        Returns:
            The axes; ``child_axes`` holds the lanes of the events, if there were any.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
            TypeError: If ``ax`` is not an Axes, or a bound is no integer.
        """
        need_matplotlib("plot_norms()")
        from gradwatch.plots.norms import draw_norms

        return draw_norms(self._source, ax, chosen_span(start, stop, "steps"))

    def plot_flow(
        self, ax: Axes | None = None, *, start: int | None = None, stop: int | None = None
    ) -> Axes:
        """Draws the gradient norm of each parameter, in model order from above to below.

        A dot is the median over the steps, a bar reaches from the 5th to the 95th percentile. Where
        there are more parameters than fit, they are rolled up by module (the norm of all gradients
        in it). Runs of many million numbers are sampled evenly.

        Args:
            ax: Where to draw; a new figure, as high as the names need, if left out.
            start: The first step.
            stop: One after the last step.

        Returns:
            The axes.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
            TypeError: If ``ax`` is not an Axes, or a bound is no integer.
        """
        need_matplotlib("plot_flow()")
        from gradwatch.plots.flow import draw_flow

        return draw_flow(self._source, ax, chosen_span(start, stop, "steps"))

    def plot_heatmap(
        self,
        ax: Axes | None = None,
        relative: bool = False,
        *,
        start: int | None = None,
        stop: int | None = None,
    ) -> Axes:
        """Draws the gradient norm of every parameter at every step as one picture.

        Each cell is the largest norm of its steps, on a logarithmic scale. Cells with a NaN or an
        Inf, and such that are exactly 0, have colours of their own and are never narrower than 3
        pixels. Where there are more parameters than fit, they are rolled up by module (the norm of
        all gradients in it). Every number of the run is read: some 2 million per second from a
        folder; ``start`` and ``stop`` shorten that.

        Args:
            ax: Where to draw; a new figure, as high as the names need, if left out.
            relative: Whether the colour is the norm over the parameter's own typical (median) norm.
            start: The first step.
            stop: One after the last step.

        Returns:
            The axes; ``child_axes`` holds the strip of the total norm and the scale of the colours.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
            TypeError: If ``ax`` is not an Axes, or a bound is no integer.
        """
        need_matplotlib("plot_heatmap()")
        from gradwatch.plots.heatmap import draw_heatmap

        return draw_heatmap(self._source, ax, chosen_span(start, stop, "steps"), relative)

    def plot_clipping(
        self, ax: Axes | None = None, *, start: int | None = None, stop: int | None = None
    ) -> Axes:
        """Draws how often and how hard the clip acts, and where its threshold lies among the norms.

        Args:
            ax: Where to draw; a new figure if left out.
            start: The first step.
            stop: One after the last step.

        Returns:
            The axes, of which only the title is used; ``child_axes`` holds the two panels: clip
            coefficient and clip rate by step, and the distribution of the norms.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
            TypeError: If ``ax`` is not an Axes, or a bound is no integer.
        """
        need_matplotlib("plot_clipping()")
        from gradwatch.plots.clipping import draw_clipping

        return draw_clipping(self._source, ax, chosen_span(start, stop, "steps"))


@stable_name
def load(path: str | os.PathLike[str]) -> History:
    """Opens the folder of a run, also while the run still writes to it.

    Nothing in the folder is executed: a stranger's run is safe to open.

    Args:
        path: The folder that ``watch(run_dir=)`` or :class:`~gradwatch.RunFolder` was given.

    Returns:
        The history of the run; a resumed one is one run.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it is no run folder, is written in a newer format, or parts are missing.
        ModuleNotFoundError: If pyarrow is not installed.
    """
    return History(FolderSource(path))


# A run may have 100,000 names, and to compare with each takes seconds.
MOST_COMPARED = 5_000

NOT_COLUMNS = '{what} must be a sequence of names, got {value!r}. Write ["{example}"].'
UNKNOWN_COLUMN = "{what} must be of {known}, got {name!r}."
NOT_A_STEP = "{what} must be a step number or None, got {value!r}."
NOT_NAMES = "parameters(names=) must be names or a compiled pattern, got {value!r}."
UNKNOWN_PARAMETER = (
    "parameters(names=) got {name!r}, which is no parameter of this run.{hint} "
    "history.names lists them; re.compile(...) finds names by a pattern."
)


def chosen_columns(
    columns: Iterable[str] | None, known: Sequence[str], what: str
) -> tuple[str, ...]:
    """Checks the columns that are asked for, None for all; ``what`` is what the user wrote."""
    if columns is None:
        return tuple(known)
    # A string is iterable too: ["lr"] is meant, where "lr" would be the columns "l" and "r".
    if isinstance(columns, str) or not isinstance(columns, Iterable):
        example = columns if columns in known else known[0]
        raise TypeError(NOT_COLUMNS.format(what=what, value=columns, example=example))
    chosen = tuple(dict.fromkeys(columns))
    for name in chosen:
        if name not in known:
            raise ValueError(UNKNOWN_COLUMN.format(what=what, known=", ".join(known), name=name))
    return chosen


def chosen_span(start: object, stop: object, what: str) -> Span:
    """Checks the steps that are asked for; ``what`` is the method that the user called."""
    return Span(_bound(start, f"{what}(start=)"), _bound(stop, f"{what}(stop=)"))


def _bound(value: object, what: str) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(NOT_A_STEP.format(what=what, value=value))
    return int(value)


def chosen_parameters(names: Names, known: Sequence[str]) -> list[int]:
    """Finds the indices of parameters, rising: rows come in the order of the model."""
    if isinstance(names, re.Pattern):
        return [index for index, name in enumerate(known) if names.search(name)]
    if not isinstance(names, Iterable):
        raise TypeError(NOT_NAMES.format(value=names))
    wanted = {names} if isinstance(names, str) else set(names)
    for unknown in map(str, wanted.difference(known)):
        close = get_close_matches(unknown, known[:MOST_COMPARED], n=3, cutoff=0.5)
        hint = f" Did you mean {', '.join(map(repr, close))}?" if close else ""
        raise ValueError(UNKNOWN_PARAMETER.format(name=unknown, hint=hint))
    return [index for index, name in enumerate(known) if name in wanted]
