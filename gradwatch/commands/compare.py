"""``gradwatch compare``: two runs beside each other, what differs most first."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from gradwatch.commands.comparing.text import lines
from gradwatch.commands.shared.arguments import (
    RUN,
    Commands,
    add_command,
    add_json,
    at_least_one,
)
from gradwatch.commands.shared.as_json import as_json
from gradwatch.commands.shared.exit_code import FINE
from gradwatch.commands.shared.output import Output

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
    from gradwatch.commands.comparing.compared import compare

    found = compare(arguments.a, arguments.b)
    if arguments.json:
        out.line(as_json(asdict(found), indent=2))
    else:
        for line in lines(found, arguments.top):
            out.line(line)
    return FINE
