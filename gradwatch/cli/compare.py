"""``gradwatch compare``: two runs beside each other, what differs most first."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from math import isnan
from typing import TYPE_CHECKING, Any

from gradwatch.cli.arguments import FINE, RUN, Commands, add_command, add_json, at_least_one
from gradwatch.cli.terminal import Output, as_json, or_dash, percent, shortened, text_table, times
from gradwatch.wording import counted, printable

if TYPE_CHECKING:
    from gradwatch.cli.differences import ColumnDifference, Compared, ParameterDifference


NAME = 44
VALUE = 200
SHORT = 40
"""Two values that are no longer together share a line."""

WORST = ("largest at step", "A there", "B there")


def lines(found: Compared, top: int) -> Iterator[str]:
    """Writes a comparison for people.

    Args:
        found: What was compared.
        top: Parameters and settings to show.

    Yields:
        Lines of printable text.
    """
    yield f"A  {printable(found.a)}"
    yield f"B  {printable(found.b)}"
    yield _verdict(found)
    yield from _settings(found, top)
    yield from _totals(found)
    yield from _steps(found)
    yield from _parameters(found, top)


def _verdict(found: Compared) -> str:
    steps = found.steps
    if not steps.common:
        return "The runs have no step in common."
    both = f"{counted(steps.common, 'step')} in both"
    if steps.first_step is None:
        return f"{both}, and the same numbers in each of them."
    columns = ", ".join(steps.first_columns)
    return f"{both}; they differ from step {steps.first_step:,} on, first in {columns}."


def _settings(found: Compared, top: int) -> Iterator[str]:
    shown = list(found.settings.items())[:top]
    if shown:
        yield ""
        yield "Settings that differ"
    for name, pair in shown:
        a, b = map(_value, pair)
        if len(a) + len(b) <= SHORT:
            yield f"  {shortened(printable(name), NAME)}  {a} in A, {b} in B"
        else:
            yield from (f"  {shortened(printable(name), NAME)}", f"    A  {a}", f"    B  {b}")
    yield from _more(len(found.settings) - len(shown), "setting")


def _totals(found: Compared) -> Iterator[str]:
    rows = [
        [printable(name), *(_total(name, value) for value in pair)]
        for name, pair in found.totals.items()
    ]
    yield from _section("Totals", ("", "A", "B"), rows)


def _steps(found: Compared) -> Iterator[str]:
    differing = [one for one in found.steps.columns if one.first_step is not None]
    header = ("", "A", "B", "B/A", "differs from", *WORST)
    rows = [[one.column, *_middle(one), f"{one.first_step:,}", *_worst(one)] for one in differing]
    yield from _section("By step (medians)", header, rows)
    same = [one.column for one in found.steps.columns if one.first_step is None]
    if rows and same:
        yield f"The same in both: {', '.join(same)}"


def _parameters(found: Compared, top: int) -> Iterator[str]:
    differing = [one for one in found.parameters.parameters if one.largest_step is not None]
    header = ("", "A", "B", "B/A", *WORST)
    rows = [
        [shortened(printable(one.parameter), NAME), *_middle(one), *_worst(one)]
        for one in differing[:top]
    ]
    sampled = ", of some ranges of steps" if found.parameters.sampled else ""
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


def _worst(one: ColumnDifference | ParameterDifference) -> list[str]:
    return [f"{one.largest_step:,}", f"{one.largest_a:.4g}", f"{one.largest_b:.4g}"]


def _total(name: str, value: Any) -> str:
    if name == "clipped":
        return percent(value)
    return or_dash(value) if isinstance(value, float) else f"{value:,}"


def _value(value: Any) -> str:
    return "nothing" if value is None else shortened(printable(str(value)), VALUE)


def _named(names: Sequence[str], most: int = 3) -> str:
    shown = ", ".join(shortened(printable(name), NAME) for name in names[:most])
    return shown + (f" and {len(names) - most:,} more" if len(names) > most else "")


TOP = 10

DESCRIPTION = """\
Puts two runs beside each other: their settings, the steps that both have, and the
parameters that both have. What differs most comes first.

Steps are compared number by number, so two runs that began alike show where they part."""

EXAMPLES = """\
gradwatch compare runs/a runs/b
gradwatch compare runs/a runs/b --top 30
gradwatch compare runs/a runs/b --json | jq .steps.first_step"""


def add_to(commands: Commands) -> None:
    """Adds the command.

    Args:
        commands: The commands of the parser.
    """
    parser = add_command(
        commands, "compare", "two runs, and what differs most", DESCRIPTION, EXAMPLES
    )
    parser.add_argument("a", metavar="A", help=RUN)
    parser.add_argument("b", metavar="B", help="the one to compare it with")
    parser.add_argument(
        "--top",
        type=at_least_one,
        default=TOP,
        metavar="N",
        help="parameters and settings to show (default: %(default)s); --json has all",
    )
    add_json(parser, "everything that was compared")
    parser.set_defaults(run_command=run)


def run(arguments: argparse.Namespace, out: Output) -> int:
    """Runs the command.

    Args:
        arguments: What the user typed.
        out: Where to write.

    Returns:
        The exit code.
    """
    from gradwatch.cli.differences import compare

    found = compare(arguments.a, arguments.b)
    if arguments.json:
        out.line(as_json(asdict(found), indent=2))
    else:
        for line in lines(found, arguments.top):
            out.line(line)
    return FINE
