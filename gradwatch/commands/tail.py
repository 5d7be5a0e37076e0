"""``gradwatch tail``: watches a run while it trains."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from typing import TYPE_CHECKING

from gradwatch.commands.live.begin import begun
from gradwatch.commands.live.plain import Plain
from gradwatch.commands.shared.arguments import (
    Commands,
    add_command,
    add_json,
    add_run,
    at_least_one,
)
from gradwatch.commands.shared.command_error import CommandError
from gradwatch.commands.shared.exit_code import FINE
from gradwatch.commands.shared.opened import run_name
from gradwatch.commands.shared.output import Output

if TYPE_CHECKING:
    from gradwatch.commands.live.follower import Follower
    from gradwatch.commands.live.screen import Screen

STEPS = 10
INTERVAL_S = 1.0
SHORTEST_S = 0.1
LONGEST_S = 3600.0

NO_RICH = "gradwatch tail: plain lines, as rich is not installed: pip install 'gradwatch[runs]'\n"

DESCRIPTION = """\
Shows the newest steps of a run, the curve of the gradient norm, how often the clip acts,
and the events, and follows the run while it is written (a watcher writes every 64 steps,
or 5 seconds). Ctrl-C ends it, with exit code 0.

Into a file or a pipe it writes a line per step and event instead of a screen."""

EXAMPLES = """\
gradwatch tail runs/a
gradwatch tail runs/a --once -n 50
gradwatch tail runs/a --json | jq 'select(.type == "event")'"""


def add_to(commands: Commands) -> None:
    """Adds the command.

    Args:
        commands: The commands of the parser.
    """
    parser = add_command(commands, "tail", "watch a run while it trains", DESCRIPTION, EXAMPLES)
    add_run(parser)
    parser.add_argument(
        "-n",
        "--steps",
        type=at_least_one,
        default=STEPS,
        metavar="N",
        help="steps to show at first (default: %(default)s, at most 1024)",
    )
    parser.add_argument("--once", action="store_true", help="show what is there, and end")
    parser.add_argument("--wait", action="store_true", help="wait for a run that is not there yet")
    parser.add_argument(
        "--interval",
        type=_seconds,
        default=INTERVAL_S,
        metavar="S",
        help="seconds between two looks (default: %(default)g)",
    )
    add_json(parser, "one line per step and event")
    parser.set_defaults(run_command=run)


def run(arguments: argparse.Namespace, out: Output) -> int:
    """Runs the command.

    Args:
        arguments: What the user typed.
        out: Where to write.

    Returns:
        The exit code.
    """
    try:
        with _view(arguments, out) as view:
            _follow(arguments, out, view)
    except KeyboardInterrupt:
        if arguments.once:
            raise
    except FileNotFoundError as error:
        raise CommandError(str(error)) from error
    return FINE


def _follow(arguments: argparse.Namespace, out: Output, view: Plain | Screen) -> None:
    def pause() -> None:
        view.waiting()
        time.sleep(arguments.interval)

    follower: Follower = begun(arguments.run, arguments.wait, arguments.once, pause)
    while not out.closed:
        view.show(follower, follower.look())
        if arguments.once:
            return
        time.sleep(arguments.interval)


def _view(arguments: argparse.Namespace, out: Output) -> Plain | Screen:
    plain = arguments.json or arguments.once or not out.is_terminal
    if not plain and importlib.util.find_spec("rich") is None:
        sys.stderr.write(NO_RICH)
        plain = True
    name = run_name(arguments.run)
    if plain:
        return Plain(out, name, arguments.steps, json=arguments.json)
    from gradwatch.commands.live.screen import Screen

    return Screen(out, name, arguments.steps)


def _seconds(text: str) -> float:
    """Reads a time.

    Raises:
        argparse.ArgumentTypeError: If it is no number of seconds, or out of bounds.
    """
    try:
        seconds = float(text)
    except ValueError:
        seconds = float("nan")
    if not SHORTEST_S <= seconds <= LONGEST_S:
        raise argparse.ArgumentTypeError(
            f"must be {SHORTEST_S:g} to {LONGEST_S:g} seconds, got {text!r}"
        )
    return seconds
