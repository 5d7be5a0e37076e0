"""Arguments that several commands share."""

from __future__ import annotations

import argparse
from typing import Any

Commands = Any
"""What ``ArgumentParser.add_subparsers()`` returns."""

RUN = "folder of the run, as given to watch(run_dir=)"


def add_command(
    commands: Commands, name: str, summary: str, description: str, examples: str
) -> argparse.ArgumentParser:
    """Adds a command.

    Args:
        commands: The commands of the parser.
        name: What the user types.
        summary: A few words for the list of commands.
        description: Some sentences for its own help.
        examples: Lines to be copied.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog="examples:\n" + "".join(f"  {line}\n" for line in examples.splitlines()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    return parser


def add_run(parser: argparse.ArgumentParser) -> None:
    """Adds the run folder.

    Args:
        parser: Of a command.
    """
    parser.add_argument("run", metavar="RUN", help=RUN)


def add_json(parser: argparse.ArgumentParser, what: str) -> None:
    """Adds ``--json``.

    Args:
        parser: Of a command.
        what: What it prints.
    """
    parser.add_argument("--json", action="store_true", help=f"print {what} as JSON")


def at_least_one(text: str) -> int:
    """Reads a number of things.

    Args:
        text: What the user typed.

    Raises:
        argparse.ArgumentTypeError: If it is no integer of at least 1.
    """
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)
