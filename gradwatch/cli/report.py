"""``gradwatch report``: what is wrong with a run, why it matters, and what to try."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from gradwatch.cli.arguments import (
    FINDINGS,
    FINE,
    RUN,
    CommandError,
    Commands,
    add_command,
    heading,
    in_models,
    open_run,
    run_folders,
    run_name,
)
from gradwatch.cli.terminal import Output, as_json, printable_lines
from gradwatch.record.wording import printable

if TYPE_CHECKING:
    from gradwatch.report import Finding, Report

_ANY = "any"

_DESCRIPTION = """\
Reads a run and prints its findings, most serious first: what was seen, why it matters,
and what to try.

Of a folder with several models, as "gradwatch run" writes it, each has its report.

With --fail-on the exit code is 1 if there is one of the named findings, so that a script
or a CI job can stop on it."""

_EXAMPLES = """\
gradwatch report runs/a
gradwatch report runs/a --fail-on nan,exploding
gradwatch report runs/a --fail-on critical --json | jq '.findings[].kind'"""


def add_to(commands: Commands) -> None:
    """Adds the command to the parser."""
    summary = "what went wrong in a run"
    parser = add_command(commands, "report", run, summary, _DESCRIPTION, _EXAMPLES)
    parser.add_argument("run", metavar="RUN", help=RUN)
    kinds = "exit with 1 on findings of these kinds or severities, separated by commas; "
    kinds += "'any' for all of them"
    parser.add_argument("--fail-on", metavar="KINDS", action="append", default=[], help=kinds)
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")


def run(arguments: argparse.Namespace, out: Output) -> int:
    """Prints the findings, of each model of the run; returns the exit code."""
    wanted = _wanted(arguments.fail_on)
    models = run_folders(arguments.run)
    folders: Mapping[str, str | Path] = {"": arguments.run} if models is None else models
    reports = {name: open_run(folder).report() for name, folder in folders.items()}
    failing = {name: _failing(report.findings, wanted) for name, report in reports.items()}
    if arguments.json:
        parts = [
            {"run": run_name(str(folders[name])), **report.to_dict(), "failed_on": failing[name]}
            for name, report in reports.items()
        ]
        content = parts[0] if models is None else in_models(arguments.run, models, parts)
        out.line(as_json(content, indent=2))
    else:
        for place, (name, report) in enumerate(reports.items()):
            if models is not None:
                out.line("\n" * (place > 0) + heading(name))
            _print(report, failing[name], out)
    return FINDINGS if any(failing.values()) else FINE


def _wanted(given: Sequence[str]) -> set[str]:
    """Checks the names: a misspelled one would let every run pass."""
    # Imported here, because --help does not need the rules of the report.
    from gradwatch.report import KINDS
    from gradwatch.report.finding import SEVERITIES

    known = (*KINDS, *SEVERITIES, _ANY)
    names = {name.strip() for part in given for name in part.split(",")}
    for name in sorted(names.difference(known)):
        close = get_close_matches(name, known, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise CommandError(f"--fail-on got {name!r}.{hint} It takes {', '.join(known)}.")
    return names


def _failing(findings: Sequence[Finding], wanted: set[str]) -> list[str]:
    """Returns the kinds of the findings that ``--fail-on`` names, most serious first."""
    found = (one.kind for one in findings if wanted.intersection((one.kind, one.severity, _ANY)))
    return list(dict.fromkeys(found))


def _print(report: Report, failing: Sequence[str], out: Output) -> None:
    if out.is_terminal and importlib.util.find_spec("rich") is not None:
        from rich.console import Console

        Console(file=out.stream).print(report)
    else:
        # Names come from the run and could hold control characters; rich escapes them itself.
        out.line(printable_lines(str(report)).rstrip("\n"))
    if failing:
        out.line()
        out.line(f"Failed on: {', '.join(map(printable, failing))}")
