"""``gradwatch tail``: shows a run while it trains, on a screen or as a line per step and event."""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from gradwatch.cli.arguments import (
    FINE,
    RUN,
    CommandError,
    Commands,
    add_command,
    at_least_one,
    open_run,
    run_folders,
    run_name,
)
from gradwatch.cli.terminal import Output

if TYPE_CHECKING:
    from gradwatch.cli.follower import Follower
    from gradwatch.cli.lines import Lines
    from gradwatch.cli.screen import Screen

_SHORTEST_S, _LONGEST_S = 0.1, 3600.0

_OF_A_RUN = ""
"""Stands for the name of the model where the folder is a run folder itself."""

_ADD_WAIT = " Add --wait to wait for it to begin."
_NO_RICH = (
    "gradwatch tail: showing plain lines, because rich is not installed. "
    "Run: pip install 'gradwatch[runs]'\n"
)

_DESCRIPTION = """\
Shows the newest steps of a run, the curve of the gradient norm, how often the clip acts
and the events, and follows the run while it trains (a watcher writes every 64 steps or
5 seconds). Ctrl-C ends it, with exit code 0.

To a file or a pipe it writes a line per step and event instead of a screen. Of a folder
with several models, as "gradwatch run" writes it, all are shown."""

_EXAMPLES = """\
gradwatch tail runs/a
gradwatch tail runs/a --once -n 50
gradwatch tail runs/a --json | jq 'select(.type == "event")'"""


def add_to(commands: Commands) -> None:
    """Adds the command to the parser."""
    summary = "watch a run while it trains"
    parser = add_command(commands, "tail", run, summary, _DESCRIPTION, _EXAMPLES)
    parser.add_argument("run", metavar="RUN", help=RUN)
    steps = "steps to show at first (default: %(default)s, at most 1024)"
    parser.add_argument("-n", "--steps", type=at_least_one, default=10, metavar="N", help=steps)
    parser.add_argument("--once", action="store_true", help="show the current state, and end")
    parser.add_argument("--wait", action="store_true", help="wait for a run that has not begun yet")
    looks = "seconds between two looks (default: %(default)g)"
    parser.add_argument("--interval", type=_seconds, default=1.0, metavar="S", help=looks)
    what = "print one line per step and event as JSON"
    parser.add_argument("--json", action="store_true", help=what)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not _SHORTEST_S <= seconds <= _LONGEST_S:  # NaN too
        bounds = f"{_SHORTEST_S:g} to {_LONGEST_S:g} seconds"
        raise argparse.ArgumentTypeError(f"must be {bounds}, got {text!r}")
    return seconds


def run(arguments: argparse.Namespace, out: Output) -> int:
    """Shows the run until it is interrupted; returns the exit code."""
    try:
        with _view(arguments, out) as view:
            _follow(arguments, out, view)
    except KeyboardInterrupt:  # the normal way to end, except with --once
        if arguments.once:
            raise
    except FileNotFoundError as error:
        raise CommandError(str(error)) from error
    return FINE


def _view(arguments: argparse.Namespace, out: Output) -> Lines | Screen:
    lines = arguments.json or arguments.once or not out.is_terminal
    if not lines and importlib.util.find_spec("rich") is None:
        sys.stderr.write(_NO_RICH)
        lines = True
    name = run_name(arguments.run)
    if lines:
        from gradwatch.cli.lines import Lines  # here, as below: torch comes with it

        return Lines(out, name, arguments.steps, json=arguments.json)
    # Imported here, because rich need not be installed.
    from gradwatch.cli.screen import Screen

    return Screen(out, name, arguments.steps)


def _follow(arguments: argparse.Namespace, out: Output, view: Lines | Screen) -> None:
    from gradwatch.record.folder.models import begun_in  # torch comes with it

    def pause() -> None:
        view.waiting()
        time.sleep(arguments.interval)

    followers = _begin(arguments.run, arguments.wait, arguments.once, pause)
    # Also stop when nobody reads the pipe any more: Python gets no signal for that.
    while not out.closed:
        view.show({name: (one, one.look()) for name, one in followers.items()})
        if arguments.once:
            return
        time.sleep(arguments.interval)
        if _OF_A_RUN not in followers:
            _join(followers, begun_in(arguments.run) or {})


def _begin(run: str, wait: bool, once: bool, pause: Callable[[], object]) -> dict[str, Follower]:
    """Opens a run to follow; waits if its folder exists but is empty, for it is about to begin.

    Args:
        run: Path of the run folder, or of a folder of models.
        wait: Whether to wait if the folder does not exist.
        once: True never to wait.
        pause: Shows that it is waiting, and sleeps for the interval.

    Returns:
        What follows each model, by name; for a run folder itself there is no name.

    Raises:
        CommandError: If the folder does not exist or is not a run folder.
    """
    folder = Path(run)
    while not once and _may_begin(folder, wait):
        pause()
    try:
        models = run_folders(run)
        if models is None:
            open_run(run)
    except CommandError as problem:
        may_come = bool(run) and not once and not folder.exists()
        raise CommandError(f"{problem}{_ADD_WAIT if may_come else ''}") from problem
    followers: dict[str, Follower] = {}
    _join(followers, {_OF_A_RUN: folder} if models is None else models)
    return followers


def _join(followers: dict[str, Follower], folders: Mapping[str, Path]) -> None:
    """Follows the models that have begun since."""
    from gradwatch.cli.follower import Follower  # torch comes with it

    for name, folder in folders.items():
        if name not in followers:
            followers[name] = Follower(folder)


def _may_begin(folder: Path, wait: bool) -> bool:
    """Tells whether a run may still begin: no folder (if ``wait``), or no visible file in it."""
    from gradwatch.record.folder.explanations import NONFINITE  # torch comes with it
    from gradwatch.record.folder.meta import NAME
    from gradwatch.record.folder.models import begun_in
    from gradwatch.record.folder.ranks import RANKS

    if not folder.exists():
        return wait
    if not folder.is_dir() or (folder / NAME).exists():
        return False
    models = begun_in(folder)
    if models is not None:
        return not models
    # A watcher writes files under hidden names before it renames them, and what is not finite at
    # once, before the first steps.
    names = (path.name for path in folder.iterdir())
    return all(name.startswith(".") or name in (NONFINITE, RANKS) for name in names)
