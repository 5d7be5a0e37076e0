"""The history of a run, live or loaded from a folder, as pandas data frames."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from gradwatch.checks import described, shown, whole_number
from gradwatch.pickles import stable_name
from gradwatch.plots import need_matplotlib
from gradwatch.record.columns import (
    NORM_COLUMNS,
    STEP_COLUMNS,
    LiveSource,
    Source,
    Span,
    array_of,
    events_frame,
    explanations_frame,
    labels_in,
    table_frame,
    take_rows,
)
from gradwatch.record.folder.models import one_run, runs_in
from gradwatch.record.folder.reader import FolderSource
from gradwatch.record.records import Layout, RecordBatch

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from gradwatch.record.explanation import Explanation
    from gradwatch.report.report import Report
    from gradwatch.report.thresholds import Thresholds

Names = str | re.Pattern[str] | Iterable[str]
"""Parameters: one name, several names, or a compiled pattern that is searched for in the names."""


@stable_name
class History:
    """The steps and events of a run; reading never changes the run.

    For a live run it holds the newest ``buffer_size`` steps, for a folder all steps. Each call
    reads again, so it also returns what was added since. From a folder it reads only the files,
    columns and steps that it needs.

    It can be pickled and deep-copied. A copy of a live run's history holds the steps and events
    that were in memory then. That of a folder holds its path, and reads from there again.
    """

    def __init__(
        self,
        source: Callable[[], RecordBatch] | Source,
        explanations: Sequence[Explanation] = (),
    ) -> None:
        """Makes a history; users get one from ``watcher.history`` or :func:`load`.

        Args:
            source: A function that returns all steps and events so far, or a source that can be
                read in parts.
            explanations: Those that belong to what a function returns; a list may grow.
        """
        self._source: Source = LiveSource(source, explanations) if callable(source) else source

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
            columns: The columns to read; None for all.
            start: The first step to return; None for the beginning.
            stop: The step after the last one; None for the end.

        Returns:
            Index ``step`` (from 1 per optimizer); as columns the fields of
            :class:`~gradwatch.StepRecord`, except ``global_step``.

        Raises:
            TypeError: If a bound is not an integer, or ``columns`` is not a sequence of names.
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
        """Returns one row per step and parameter, for parameters that had a gradient.

        Args:
            names: Parameters to read: one name, several, or a compiled pattern
                (``re.compile("bias$")``) that is searched for in the names; None for all.
            columns: The columns to read besides ``step`` and ``parameter``; None for all.
            start: The first step to return; None for the beginning.
            stop: The step after the last one; None for the end.

        Returns:
            Columns ``step, parameter, grad_norm`` (before the clip), ``grad_norm_clipped`` (after
            it) and one for each statistic that ``watch(statistics=)`` asked for. If there are
            several optimizers, ``optimizer`` comes after ``parameter``: each counts its own steps.

        Raises:
            TypeError: If a bound is not an integer, or ``names`` or ``columns`` is not a sequence
                of names.
            ValueError: If a name or a column is unknown.
        """
        known = (*NORM_COLUMNS, *self._source.statistics())
        chosen = chosen_columns(columns, known, "parameters(columns=)")
        indices = None if names is None else chosen_parameters(names, self.names)
        span = chosen_span(start, stop, "parameters")
        if not self._has_several_optimizers():
            return table_frame(self._source.parameters(indices, chosen, span))
        steps, found = self._source.steps_and_parameters(("optimizer",), indices, chosen, span)
        table = dict(found)
        labels = {"optimizer": steps["optimizer"]}
        optimizers = take_rows(labels, array_of(table.pop("place")))
        first = {name: table.pop(name) for name in ("step", "parameter")}
        return table_frame({**first, **optimizers, **table})

    def _has_several_optimizers(self) -> bool:
        """Returns whether several optimizers have stepped."""
        if len({one.optimizer for one in self._source.groups()}) < 2:
            return False
        # A wrapper is called after what it wraps from its first step on.
        steps = self._source.steps(("optimizer",), chosen_span(None, None, "parameters"))
        return len(np.unique(labels_in(steps["optimizer"]).codes)) > 1

    def groups(self, *, start: int | None = None, stop: int | None = None) -> pd.DataFrame:
        """Returns one row per step and parameter group: its norms and its learning rate.

        Where an optimizer has several groups, their norms are computed from those of the
        parameters, so every number of the run is read, about 2 million per second from a folder.

        Args:
            start: The first step to return; None for the beginning.
            stop: The step after the last one; None for the end.

        Returns:
            Ordered by step, then by optimizer; columns

            - ``step``, ``optimizer``: as in :meth:`steps`
            - ``group``: the ``"name"`` that you gave the group, or else its index from 0
            - ``grad_norm``: norm of the group's gradients before the clip; ``grad_norm_clipped``:
              after it; 0 if the group had no gradient
            - ``lr``: learning rate of the group during the step; NaN if it has none

            Backwards that no optimizer steps are in no group.

        Raises:
            TypeError: If a bound is not an integer.
            ValueError: If the run was recorded by a version that did not note the groups.
        """
        from gradwatch.report.parameter_groups import groups_frame

        return groups_frame(self._source, chosen_span(start, stop, "groups"))

    def events(self) -> pd.DataFrame:
        """Returns one row per event, oldest first.

        Returns:
            As columns the fields of :class:`~gradwatch.Event`, except ``global_step``.
        """
        return events_frame(self._source.events())

    def explanations(self) -> pd.DataFrame:
        """Returns one row per explanation of a bad step, oldest first.

        ``watch(on_nonfinite="explain")`` makes them. A loaded run has those of all ranks, by step;
        a live one those of its own rank.

        Returns:
            As columns the fields of :class:`~gradwatch.Explanation` that are numbers or text, and
            ``summary``. ``phase`` is empty where there is none, and so is ``module_class`` outside
            of the model. ``examples`` holds tuples of indices, ``largest_parameters`` and
            ``largest_examples`` tuples of names. The dtypes are the same where there is no row.
        """
        return explanations_frame(self._source.explanations())

    def clip_rate(self, window: int = 1_000) -> float:
        """Returns the share of the newest applied steps in which a clip changed the gradient.

        Args:
            window: How many of the newest steps to count. A live run keeps at most
                ``watch(buffer_size=)`` of them.

        Returns:
            A number from 0 to 1; NaN before the first step.

        Raises:
            TypeError: If ``window`` is not an integer.
            ValueError: If it is below 1.
        """
        from gradwatch.report.rules.clipping import clip_rate

        window = whole_number("clip_rate(window=)", window, 1, "Write clip_rate(window=1000).")
        return clip_rate(self._source, window)

    def advice(self) -> list[str]:
        """Returns one line for each optimizer whose clip acts on most steps, or on none."""
        from gradwatch.report.rules.clipping import clip_advice

        return clip_advice(self._source)

    def report(self, thresholds: Thresholds | None = None, **changes: float) -> Report:
        """Reports what the run shows: findings with evidence, why they matter and what to try.

        Args:
            thresholds: The limits of the rules; None for the defaults.
            **changes: Limits to change, by name: ``report(spike=20)``.

        Returns:
            The findings, most serious first. Print it, show it in a notebook, or call
            ``.to_dict()``.
        """
        from gradwatch.report.report import make_report

        return make_report(self._source, thresholds, **changes)

    def flow(self, start: int | None = None, stop: int | None = None) -> pd.DataFrame:
        """Returns a table that shows where gradients vanish, explode or stop.

        If the run holds more than a few million numbers, the table is made from steps sampled
        evenly over the run.

        Args:
            start: The first step to use; None for the beginning.
            stop: The step after the last one; None for the end.

        Returns:
            Index ``parameter`` in model order; columns

            - ``module``: the module that owns it; ``elements``: 0 if the shape is not known
            - ``steps``: number of sampled steps in which it had a gradient
            - ``grad_norm``: median of the finite norms before the clip; ``rms_grad``: that divided
              by the square root of ``elements``
            - ``weight_norm``: median norm of the weights; ``relative_grad``: median of gradient
              norm divided by weight norm; NaN if the statistic was not measured
            - ``zeros``: median share of elements that are exactly 0; NaN if not measured
            - ``zero_steps``, ``nonfinite_steps``: number of steps in which the whole gradient was
              exactly 0, and in which it held a NaN or an Inf
            - ``no_gradient``: share of the sampled steps without a gradient; with several
              optimizers, of the steps of the optimizer that fits best

        Raises:
            TypeError: If a bound is not an integer.
        """
        from gradwatch.report.flow import flow

        return flow(self._source, chosen_span(start, stop, "steps"))

    def plot_norms(
        self, ax: Axes | None = None, *, start: int | None = None, stop: int | None = None
    ) -> Axes:
        """Draws the total gradient norm by step, before and after the clip, with events above.

        Steps with a NaN or an Inf are marked at the upper edge, norms of exactly 0 at the lower
        edge. For a long run, the smallest and largest norm in each pixel column are drawn, so that
        no spike is lost, and the running median.

        Args:
            ax: Where to draw; None for a new figure.
            start: The first step to draw; None for the beginning.
            stop: The step after the last one; None for the end.

        Returns:
            The axes; ``child_axes`` holds the lanes of the events, if there were any.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
            TypeError: If ``ax`` is not an Axes, or a bound is not an integer.
        """
        need_matplotlib("plot_norms()")
        from gradwatch.plots.norms import draw_norms

        return draw_norms(self._source, ax, chosen_span(start, stop, "steps"))

    def plot_flow(
        self, ax: Axes | None = None, *, start: int | None = None, stop: int | None = None
    ) -> Axes:
        """Draws the gradient norm of each parameter, in model order from top to bottom.

        A dot is the median over the steps; a bar spans the 5th to the 95th percentile. If there are
        more parameters than fit, they are grouped by module, with the norm of all gradients in it.
        Steps of runs with many millions of numbers are sampled evenly.

        Args:
            ax: Where to draw; None for a new figure, as tall as the names need.
            start: The first step to draw; None for the beginning.
            stop: The step after the last one; None for the end.

        Returns:
            The axes that were drawn on.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
            TypeError: If ``ax`` is not an Axes, or a bound is not an integer.
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
        """Draws the gradient norm of every parameter at every step as a heatmap.

        Each cell shows the largest norm of its steps, on a logarithmic scale. Cells with a NaN or
        an Inf, and cells of exactly 0, have colors of their own and are at least 3 pixels wide. If
        there are more parameters than fit, they are grouped by module, with the norm of all
        gradients in it. Every number of the run is read, about 2 million per second from a folder;
        pass ``start`` and ``stop`` to read less.

        Args:
            ax: Where to draw; None for a new figure, as tall as the names need.
            relative: Whether the color shows the norm divided by the parameter's own median norm.
            start: The first step to draw; None for the beginning.
            stop: The step after the last one; None for the end.

        Returns:
            The axes; ``child_axes`` holds the strip with the total norm, and the color bar.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
            TypeError: If ``ax`` is not an Axes, or a bound is not an integer.
        """
        need_matplotlib("plot_heatmap()")
        from gradwatch.plots.heatmap import draw_heatmap

        return draw_heatmap(self._source, ax, chosen_span(start, stop, "steps"), relative)

    def plot_clipping(
        self, ax: Axes | None = None, *, start: int | None = None, stop: int | None = None
    ) -> Axes:
        """Draws how often and how hard the clip acts, and where its threshold lies among the norms.

        Args:
            ax: Where to draw; None for a new figure.
            start: The first step to draw; None for the beginning.
            stop: The step after the last one; None for the end.

        Returns:
            The axes, of which only the title is used; ``child_axes`` holds the two panels: clip
            coefficient and clip rate by step, and the distribution of the norms.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
            TypeError: If ``ax`` is not an Axes, or a bound is not an integer.
        """
        need_matplotlib("plot_clipping()")
        from gradwatch.plots.clipping import draw_clipping

        return draw_clipping(self._source, ax, chosen_span(start, stop, "steps"))


@stable_name
def load(path: str | os.PathLike[str]) -> History:
    """Opens a run folder, also while the run still writes to it.

    Nothing in the folder is executed, so it is safe to open a run from an unknown source.

    Args:
        path: The folder that ``watch(run_dir=)`` or :class:`~gradwatch.RunFolder` was given. Or the
            one that ``watch_all(run_dir=)`` or ``gradwatch run`` was given, if it holds one model.

    Returns:
        The history of the run. A run that was resumed reads as one run.

    Raises:
        TypeError: If it is not a path.
        FileNotFoundError: If there is no such folder.
        ValueError: If it is not a run folder, is in a newer format, or parts are missing; if it
            holds several models.
        ModuleNotFoundError: If pyarrow is not installed.
    """
    _expect_path("load", path)
    return History(FolderSource(one_run(path)))


@stable_name
def load_all(path: str | os.PathLike[str]) -> dict[str, History]:
    """Opens the runs of all models that one process has trained, also while it still trains.

    Args:
        path: The folder that ``watch_all(run_dir=)`` or ``gradwatch run`` was given. A run folder
            counts as that of one model, with the name of the folder.

    Returns:
        By name of the model, its history, in the order of the first steps; those models that have
        steps on disk.

    Raises:
        TypeError: If it is not a path.
        FileNotFoundError: If there is no such folder.
        ValueError: If it is neither a folder of models nor a run folder, is in a newer format, or
            parts are missing; if no model has steps on disk yet.
        ModuleNotFoundError: If pyarrow is not installed.
    """
    _expect_path("load_all", path)
    return {name: History(FolderSource(folder)) for name, folder in runs_in(path).items()}


def _expect_path(caller: str, path: object) -> None:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(NOT_A_PATH.format(caller=caller, value=described(path)))


# A run may have 100,000 names, and comparing with each of them takes seconds.
MOST_COMPARED = 5_000

NOT_A_PATH = (
    '{caller}(path=) must be a run folder (str or PathLike), got {value}. Write {caller}("runs/a").'
)
NOT_COLUMNS = '{what} must be a sequence of names, got {value}. Write ["{example}"].'
UNKNOWN_COLUMN = "{what} must be names among {known}, got {name}."
NOT_A_STEP = "{what} must be a step number or None, got {value}."
NOT_NAMES = (
    "parameters(names=) must be names or a compiled pattern, got {value}. Write "
    'history.parameters("{example}"); history.names lists them.'
)
UNKNOWN_PARAMETER = (
    "parameters(names=) got {name!r}, which is not a parameter of this run.{hint} "
    "history.names lists them; re.compile(...) finds names by a pattern."
)


def chosen_columns(
    columns: Iterable[str] | None, known: Sequence[str], what: str
) -> tuple[str, ...]:
    """Checks the wanted columns, None for all; ``what`` names the argument in messages."""
    if columns is None:
        return tuple(known)
    # A string is iterable too: "lr" would ask for the columns "l" and "r", where ["lr"] is meant.
    if isinstance(columns, (str, Tensor)) or not isinstance(columns, Iterable):
        # A tensor compares its elements, so only strings are looked up.
        close = get_close_matches(columns, known, n=1) if isinstance(columns, str) else []
        example = close[0] if close else "grad_norm"
        raise TypeError(NOT_COLUMNS.format(what=what, value=shown(columns), example=example))
    chosen = tuple(dict.fromkeys(columns))
    for name in chosen:
        if name not in known:
            words = ", ".join(known)
            raise ValueError(UNKNOWN_COLUMN.format(what=what, known=words, name=shown(name)))
    return chosen


def chosen_span(start: object, stop: object, what: str) -> Span:
    """Checks the wanted range of steps; ``what`` is the method name in messages."""
    return Span(_bound(start, f"{what}(start=)"), _bound(stop, f"{what}(stop=)"))


def _bound(value: object, what: str) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(NOT_A_STEP.format(what=what, value=shown(value)))
    return int(value)


def chosen_parameters(names: Names, known: Sequence[str]) -> list[int]:
    """Returns the indices of parameters in ascending order: rows come in model order."""
    if isinstance(names, re.Pattern):
        return [index for index, name in enumerate(known) if names.search(name)]
    several: object = [names] if isinstance(names, str) else names
    if isinstance(names, Tensor) or not isinstance(several, Iterable):
        raise TypeError(NOT_NAMES.format(value=shown(names), example=next(iter(known), "")))
    wanted = set(several)
    for name in wanted:
        if not isinstance(name, str):
            raise TypeError(NOT_NAMES.format(value=shown(name), example=next(iter(known), "")))
    for unknown in map(str, wanted.difference(known)):
        close = get_close_matches(unknown, known[:MOST_COMPARED], n=3, cutoff=0.5)
        hint = f" Did you mean {', '.join(map(repr, close))}?" if close else ""
        raise ValueError(UNKNOWN_PARAMETER.format(name=unknown, hint=hint))
    return [index for index, name in enumerate(known) if name in wanted]
