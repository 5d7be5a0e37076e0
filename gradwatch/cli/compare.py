"""``gradwatch compare``: two runs side by side, the largest differences first."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradwatch.cli.arguments import (
    FINE,
    RUN,
    CommandError,
    Commands,
    add_command,
    at_least_one,
    heading,
    run_folder,
    run_folders,
    run_name,
)
from gradwatch.cli.terminal import Output, as_json, or_dash, percent, shortened, text_table, times
from gradwatch.record.wording import counted, printable

if TYPE_CHECKING:
    from gradwatch.cli.differences import ColumnDifference, Compared, ParameterDifference


_NAME = 44  # width of a name: enough to tell the parameters of a deep model apart
_VALUE = 200
_SHORT = 40  # two values that together are no longer than this share a line

_LARGEST = ("largest at step", "A there", "B there")

_DESCRIPTION = """\
Shows two runs side by side: their settings, and the steps and parameters that both have.
The largest differences come first.

Steps are compared number by number, so two runs that began alike show where they diverge.
Of folders with several models, as "gradwatch run" writes them, models of the same name are
compared."""

_EXAMPLES = """\
gradwatch compare runs/a runs/b
gradwatch compare runs/a runs/b --top 30
gradwatch compare runs/a runs/b --json | jq .steps.first_step"""


def add_to(commands: Commands) -> None:
    """Adds the command to the parser."""
    summary = "two runs, and what differs most"
    parser = add_command(commands, "compare", run, summary, _DESCRIPTION, _EXAMPLES)
    parser.add_argument("a", metavar="A", help=RUN)
    parser.add_argument("b", metavar="B", help="folder of the run to compare it with")
    shown = "parameters and settings to show (default: %(default)s); --json has all"
    parser.add_argument("--top", type=at_least_one, default=10, metavar="N", help=shown)
    what = "print everything that was compared as JSON"
    parser.add_argument("--json", action="store_true", help=what)


def run(arguments: argparse.Namespace, out: Output) -> int:
    """Prints the comparison, of each model that both have; returns the exit code."""
    from gradwatch.cli.differences import compare  # NumPy comes with it

    a, b = run_folders(arguments.a) or {}, run_folders(arguments.b) or {}
    if not (a and b) or len(a) == len(b) == 1:
        found = compare(str(run_folder(arguments.a)), str(run_folder(arguments.b)))
        content, lines = asdict(found), _lines(found, arguments.top)
    else:
        pairs = {name: compare(str(a[name]), str(b[name])) for name in _in_both(a, b)}
        content = {
            "a": run_name(arguments.a),
            "b": run_name(arguments.b),
            "models": [{"model": name, **asdict(one)} for name, one in pairs.items()],
            "only_a": [name for name in a if name not in b],
            "only_b": [name for name in b if name not in a],
        }
        lines = _lines_of_models(content, pairs, arguments.top)
    if arguments.json:
        out.line(as_json(content, indent=2))
    else:
        for line in lines:
            out.line(line)
    return FINE


def _in_both(a: Mapping[str, Path], b: Mapping[str, Path]) -> list[str]:
    both = [name for name in a if name in b]
    if not both:
        of_a, of_b = (str(next(iter(models.values()))) for models in (a, b))
        raise CommandError(
            "A and B have no model of the same name. Name one in each of them, such as "
            f"{of_a!r} and {of_b!r}."
        )
    return both


def _lines_of_models(
    content: Mapping[str, Any], pairs: Mapping[str, Compared], top: int
) -> Iterator[str]:
    for place, (name, found) in enumerate(pairs.items()):
        yield "\n" * (place > 0) + heading(name)
        yield from _lines(found, top)
    for side in ("a", "b"):
        if names := content[f"only_{side}"]:
            yield f"\nModels only in {side.upper()}: {_named(names)}"


def _lines(found: Compared, top: int) -> Iterator[str]:
    yield f"A  {printable(found.a)}"
    yield f"B  {printable(found.b)}"
    yield _summary(found)
    yield from _setting_lines(found, top)
    yield from _total_lines(found)
    yield from _steps(found)
    yield from _parameters(found, top)


def _summary(found: Compared) -> str:
    steps = found.steps
    if not steps.common:
        return "The runs have no step in common."
    both = f"{counted(steps.common, 'step')} in both"
    if steps.first_step is None:
        return f"{both}, with the same numbers in each of them."
    columns = ", ".join(steps.first_columns)
    return f"{both}; they differ from step {steps.first_step:,} on, first in {columns}."


def _setting_lines(found: Compared, top: int) -> Iterator[str]:
    shown = list(found.settings.items())[:top]
    if shown:
        yield ""
        yield "Settings that differ"
    for name, pair in shown:
        a, b = map(_value, pair)
        if len(a) + len(b) <= _SHORT:
            yield f"  {shortened(printable(name), _NAME)}  {a} in A, {b} in B"
        else:
            yield from (f"  {shortened(printable(name), _NAME)}", f"    A  {a}", f"    B  {b}")
    yield from _more(len(found.settings) - len(shown), "setting")


def _total_lines(found: Compared) -> Iterator[str]:
    rows = [
        [printable(name), *(_total(name, value) for value in pair)]
        for name, pair in found.totals.items()
    ]
    yield from _section("Totals", ("", "A", "B"), rows)


def _steps(found: Compared) -> Iterator[str]:
    differing = [one for one in found.steps.columns if one.first_step is not None]
    header = ("", "A", "B", "B/A", "differs from", *_LARGEST)
    rows = [[one.column, *_middle(one), f"{one.first_step:,}", *_largest(one)] for one in differing]
    yield from _section("By step (medians)", header, rows)
    same = [one.column for one in found.steps.columns if one.first_step is None]
    if rows and same:
        yield f"The same in both: {', '.join(same)}"


def _parameters(found: Compared, top: int) -> Iterator[str]:
    differing = [one for one in found.parameters.parameters if one.largest_step is not None]
    header = ("", "A", "B", "B/A", *_LARGEST)
    rows = [
        [shortened(printable(one.parameter), _NAME), *_middle(one), *_largest(one)]
        for one in differing[:top]
    ]
    sampled = ", from some ranges of steps" if found.parameters.sampled else ""
    yield from _section(f"By parameter (typical gradient norm{sampled})", header, rows)
    yield from _more(len(differing) - len(rows), "parameter")
    for side, names in (("A", found.parameters.only_a), ("B", found.parameters.only_b)):
        if names:
            yield f"Only in {side}: {_named(names)}"


def _section(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    if rows:
        yield ""
        yield title
        yield from (f"  {line}" for line in text_table(header, rows))


def _more(amount: int, what: str) -> Iterator[str]:
    if amount > 0:
        yield f"  ... and {counted(amount, f'more {what}')}; --top shows more."


def _middle(one: ColumnDifference | ParameterDifference) -> list[str]:
    return [or_dash(one.a), or_dash(one.b), "-" if isnan(one.ratio) else times(one.ratio)]


def _largest(one: ColumnDifference | ParameterDifference) -> list[str]:
    return [f"{one.largest_step:,}", f"{one.largest_a:.4g}", f"{one.largest_b:.4g}"]


def _total(name: str, value: Any) -> str:
    # A count is an int and shown in full; a float is a measurement and shown with four digits.
    if name == "clipped":
        return percent(value)
    return or_dash(value) if isinstance(value, float) else f"{value:,}"


def _value(value: Any) -> str:
    return "nothing" if value is None else shortened(printable(str(value)), _VALUE)


def _named(names: Sequence[str], most: int = 3) -> str:
    shown = ", ".join(shortened(printable(name), _NAME) for name in names[:most])
    return shown + (f" and {len(names) - most:,} more" if len(names) > most else "")
