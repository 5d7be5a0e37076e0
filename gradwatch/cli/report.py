"""``gradwatch report``: what is wrong with a run, why it matters, and what to try."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from gradwatch.cli.arguments import (
    FINDINGS,
    FINE,
    CommandError,
    Commands,
    add_command,
    add_json,
    add_run,
    open_run,
    run_name,
)
from gradwatch.cli.terminal import Output, as_json, printable_lines
from gradwatch.wording import printable

if TYPE_CHECKING:
    from gradwatch.report import Finding, Report


ANY = "any"

DESCRIPTION = """\
Reads a run and prints its findings, the heaviest first: what was seen, why it matters,
and what to try.

With --fail-on the exit code is 1 if one of the named findings is there, so that a script
or a CI job can stop on it."""

EXAMPLES = """\
gradwatch report runs/a
gradwatch report runs/a --fail-on nan,exploding
gradwatch report runs/a --fail-on critical --json | jq '.findings[].kind'"""


def add_to(commands: Commands) -> None:
    """Adds the command.

    Args:
        commands: The commands of the parser.
    """
    parser = add_command(commands, "report", "what went wrong in a run", DESCRIPTION, EXAMPLES)
    add_run(parser)
    parser.add_argument(
        "--fail-on",
        metavar="KINDS",
        action="append",
        default=[],
        help="exit with 1 on findings of these kinds or severities, separated by commas; "
        "'any' for each of them",
    )
    add_json(parser, "the findings")
    parser.set_defaults(run_command=run)


def run(arguments: argparse.Namespace, out: Output) -> int:
    """Runs the command.

    Args:
        arguments: What the user typed.
        out: Where to write.

    Returns:
        The exit code.
    """
    wanted = _wanted(arguments.fail_on)
    report = open_run(arguments.run).report()
    failing = _failing(report.findings, wanted)
    if arguments.json:
        out.line(as_json(_content(arguments.run, report.to_dict(), failing), indent=2))
    else:
        _print(report, failing, out)
    return FINDINGS if failing else FINE


def _wanted(given: Sequence[str]) -> set[str]:
    """Checks the names: a misspelt one would let every run pass."""
    names = {name.strip() for part in given for name in part.split(",")}
    known = _known()
    for name in sorted(names.difference(known)):
        close = get_close_matches(name, known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise CommandError(f"--fail-on got {name!r}.{hint} It takes {', '.join(known)}.")
    return names


def _known() -> tuple[str, ...]:
    from gradwatch.report import KINDS
    from gradwatch.report.finding import SEVERITIES

    return (*KINDS, *SEVERITIES, ANY)


def _failing(findings: Sequence[Finding], wanted: set[str]) -> list[str]:
    """Returns the kinds that the user does not want and that are there, the heaviest first."""
    return list(
        dict.fromkeys(
            finding.kind
            for finding in findings
            if wanted.intersection((finding.kind, finding.severity, ANY))
        )
    )


def _content(run: str, report: Mapping[str, Any], failing: Sequence[str]) -> Mapping[str, Any]:
    return {"run": run_name(run), **report, "failed_on": failing}


def _print(report: Report, failing: Sequence[str], out: Output) -> None:
    if out.is_terminal and importlib.util.find_spec("rich") is not None:
        from rich.console import Console

        Console(file=out.stream).print(report)
    else:
        out.line(printable_lines(str(report)).rstrip("\n"))
    if failing:
        out.line()
        out.line(f"Failed on: {', '.join(map(printable, failing))}")
