"""Writes docs/reference.md from the lists that the code declares: ``make reference``."""

import inspect
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

import gradwatch
from gradwatch.adapters import EVENT_KINDS, SCALARS, STATISTICS, STEP_COLUMNS
from gradwatch.record.columns import EVENT_COLUMNS, EVENT_DTYPES, STEP_DTYPES
from gradwatch.record.columns import STEP_COLUMNS as SHOWN_STEP_COLUMNS
from gradwatch.record.schema import Column, columns_of
from gradwatch_tensorboard.scalars import (
    BLOCK_MEANING,
    DERIVED_SCALARS,
    NONFINITE_EVENT,
    NONFINITE_MEANING,
)

PAGE = Path(__file__).with_suffix(".md")

INTRODUCTION = """\
# Reference

Every option, column, statistic, kind of event and tag. This page is made from the lists that the code declares
(`make reference`); a test fails when it is older than they are.

A *micro-batch* is one backward, a *step* is one optimizer step, and a *window* is the micro-batches of one step.
"""

OPTIONS = """
## Options of `watch()`

`gradwatch.watch(model, optimizer=None, *, ...)`. `GradientMonitor` takes the same options, apart from `scaler`, which is the
Trainer's, and with [a meaning of its own](lightning.md) for `accumulate`.
"""

STEPS = """
## Columns of `history.steps()`

One row per optimizer step. The index is `step`, counted from 1 per optimizer.
"""

PARAMETERS = """
## Columns of `history.parameters()`

One row per step and parameter that had a gradient, with `step`, `parameter`, `grad_norm` (L2 norm before the clip) and
`grad_norm_clipped` (after it). `watch(statistics=)` adds a column for each statistic it names:
"""

GROUPS = """
## Columns of `history.groups()`

One row per step and parameter group of an optimizer, ordered by step: `step`, `optimizer`, `group` (its key `"name"`, where you gave it
one, or else its index from 0), `grad_norm` (norm of its gradients before the clip), `grad_norm_clipped` (after it) and `lr` (its
learning rate during the step). A run folder keeps the rates as `group_lr` in `steps/`, where an optimizer has several groups.
"""

EVENTS = """
## Columns of `history.events()`

One row per event, oldest first.
"""

KINDS = """
## Kinds of events
"""

TENSORBOARD = """
## Tags in TensorBoard

`TensorBoardWriter` writes all scalars of a step as one event, and no tag per parameter. Further optimizers have groups of their
own, `gradwatch-Adam-1/...` and `gradwatch-Adam-1_blocks/...`. With `every=` above 1, one point stands for several steps, and
the last column says which of their values it has.
"""

LOGGERS = """
## Tags in other loggers

`GradientMonitor` logs these to every logger of the Trainer, as `LoggerScalars` gives them to any other adapter:
"""


def page() -> str:
    """Returns the page, as Markdown."""
    return INTRODUCTION + "".join(
        (
            *(OPTIONS, _table(("option", "default", "meaning"), _options())),
            *(STEPS, _columns(gradwatch.StepRecord, SHOWN_STEP_COLUMNS)),
            *(PARAMETERS, _statistics()),
            GROUPS,
            *(EVENTS, _columns(gradwatch.Event, EVENT_COLUMNS)),
            *(KINDS, _kinds()),
            *(TENSORBOARD, _table(("tag", "meaning", "written", "of several steps"), _tags())),
            *(LOGGERS, _table(("tag", "logged"), _logger_tags())),
        )
    )


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n" + "".join(f"| {' | '.join(line)} |\n".replace("|  |", "| |") for line in lines)


def _options() -> Iterable[Sequence[str]]:
    documentation = inspect.getdoc(gradwatch.watch) or ""
    arguments = documentation.partition("Args:\n")[2].partition("\nReturns:")[0]
    meanings = dict(re.findall(r"^    (\w+): (.*(?:\n        .*)*)", arguments, re.MULTILINE))
    for name, parameter in inspect.signature(gradwatch.watch).parameters.items():
        required = parameter.default is parameter.empty
        default = "required" if required else f"`{parameter.default!r}`".replace("'", '"')
        if name not in meanings:
            raise ValueError(f"The docstring of watch() does not explain {name!r} in its Args.")
        yield f"`{name}`", default, _markdown(meanings[name])


def _markdown(text: str) -> str:
    """Turns the markup of docstrings into Markdown, on one line."""
    text = " ".join(text.split())
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"`\1`", text)
    return text.replace("``", "`").replace("|", r"\|")


def _meaning(column: Column) -> str:
    more = f" ([more]({column.page}))" if column.page else ""
    return column.meaning.replace("|", r"\|") + more


def _columns(record: type, names: Iterable[str]) -> str:
    columns = columns_of(record)
    dtypes = STEP_DTYPES if record is gradwatch.StepRecord else EVENT_DTYPES
    rows = (
        (f"`{name}`", _dtype(dtypes[name]), _meaning(columns[name]), columns[name].unit)
        for name in names
    )
    return _table(("column", "dtype", "meaning", "unit"), rows)


def _dtype(dtype: type | None) -> str:
    if dtype is np.bool_:
        return "boolean"  # pandas' nullable one
    return "str" if dtype is None else np.dtype(dtype).name


def _statistics() -> str:
    rows = ((f"`{name}`", one.meaning, one.unit) for name, one in STATISTICS.items())
    return _table(("statistic", "meaning", "unit"), rows)


def _kinds() -> str:
    rows = ((f"`{name}`", one.meaning, one.value) for name, one in EVENT_KINDS.items())
    return _table(("kind", "meaning", "`value`"), rows)


def _tags() -> Iterable[Sequence[str]]:
    for name, scalar in SCALARS.items():
        if scalar.tensorboard:
            meaning = _meaning(STEP_COLUMNS[name])
            yield f"`gradwatch/{name}`", meaning, scalar.condition, scalar.reduction
    for name, derived in DERIVED_SCALARS.items():
        yield f"`gradwatch/{name}`", _phrase(derived.meaning), "", derived.reduction
    yield f"`gradwatch/{NONFINITE_EVENT}`", _phrase(NONFINITE_MEANING), "at such steps", "largest"
    where = "every `block_every` steps"
    yield "`gradwatch_blocks/<module>`", _phrase(BLOCK_MEANING), where, "largest"
    taken = "what `watch(statistics=)` takes, of the parameter of this part where it is largest in magnitude"
    yield "`gradwatch_<statistic>/<module>`", taken, where, "largest"
    yield "`gradwatch/events`", "text: the first 20 events", "", ""
    tab = "the norms of all parameters and all events, for the [Gradients tab](gradients-tab.md)"
    yield "`gradwatch/norms/...`, `bad`, `steps`, `layout`, `events`", tab, "in chunks", ""


def _phrase(sentence: str) -> str:
    return (
        sentence[0].lower() + sentence[1:].rstrip(".") if sentence[1].islower() else sentence[:-1]
    )


def _logger_tags() -> Iterable[Sequence[str]]:
    for name, scalar in SCALARS.items():
        if scalar.loggers:
            yield f"`gradwatch/{name}`", scalar.condition or "always"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
