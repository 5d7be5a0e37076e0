"""``gradwatch plot``: a picture of a run."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradwatch.commands.shared.arguments import (
    Commands,
    add_command,
    add_json,
    add_run,
    at_least_one,
)
from gradwatch.commands.shared.as_json import as_json
from gradwatch.commands.shared.command_error import CommandError
from gradwatch.commands.shared.exit_code import FINE
from gradwatch.commands.shared.opened import open_run, run_name
from gradwatch.commands.shared.output import Output
from gradwatch.commands.shared.printable import printable
from gradwatch.commands.shared.target import written_whole

if TYPE_CHECKING:
    from gradwatch.history import History

KINDS = ("norms", "flow", "heatmap", "clipping")
SIZE_INCHES = (10.0, 5.5)
DPI = 150

MISSING = "plot needs matplotlib, which is not installed. Run: pip install 'gradwatch[plot]'"

DESCRIPTION = """\
Draws a run into a picture; the suffix of FILE says which format: .png, .svg, .pdf, ...

kinds:
  norms     gradient norm by step, with the clip's threshold and the events
  flow      gradients layer by layer
  heatmap   every layer by step
  clipping  how often the clip acts, and how hard"""

EXAMPLES = """\
gradwatch plot runs/a -o norms.png
gradwatch plot runs/a -o layers.svg --kind heatmap"""


def add_to(commands: Commands) -> None:
    """Adds the command.

    Args:
        commands: The commands of the parser.
    """
    parser = add_command(commands, "plot", "a picture of a run", DESCRIPTION, EXAMPLES)
    add_run(parser)
    parser.add_argument(
        "-o", "--output", metavar="FILE", required=True, help="picture to write, such as norms.png"
    )
    parser.add_argument("--kind", choices=KINDS, default=KINDS[0], help="default: %(default)s")
    parser.add_argument(
        "--dpi", type=at_least_one, default=DPI, help="dots per inch (default: %(default)s)"
    )
    add_json(parser, "what was written")
    parser.set_defaults(run_command=run)


def run(arguments: argparse.Namespace, out: Output) -> int:
    """Runs the command.

    Args:
        arguments: What the user typed.
        out: Where to write.

    Returns:
        The exit code.
    """
    suffix = _suffix(arguments.output)
    history = open_run(arguments.run)
    if not len(history):
        raise CommandError(f"{arguments.run!r} has no steps yet, so there is nothing to draw.")
    figure = _drawn(history, arguments.kind)
    with written_whole(arguments.output, arguments.run) as path:
        figure.savefig(path, format=suffix, dpi=arguments.dpi, bbox_inches="tight")
    _tell(arguments, out)
    return FINE


def _suffix(target: str) -> str:
    """Checks the format before anything is read."""
    figure = _figure()
    known = sorted(figure.canvas.get_supported_filetypes())
    suffix = Path(target).suffix.lower().removeprefix(".")
    if suffix not in known:
        raise CommandError(
            f"-o must end with the format of the picture, .png for example, got {target!r}. "
            f"Formats: {', '.join(known)}."
        )
    return suffix


def _drawn(history: History, kind: str) -> Any:
    """Draws; what a plot sets up by itself, such as its size, is kept."""
    figure = _figure()
    _plots()[kind](history, ax=figure.add_subplot())
    return figure


def _figure() -> Any:
    """Makes a figure that belongs to no window."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise CommandError(MISSING) from error
    return Figure(figsize=SIZE_INCHES)


def _plots() -> dict[str, Callable[..., Any]]:
    from gradwatch.explain import plots

    return {kind: getattr(plots, f"plot_{kind}") for kind in KINDS}


def _tell(arguments: argparse.Namespace, out: Output) -> None:
    if arguments.json:
        content = {
            "run": run_name(arguments.run),
            "kind": arguments.kind,
            "file": arguments.output,
            "bytes": Path(arguments.output).stat().st_size,
        }
        out.line(as_json(content, indent=2))
    else:
        out.line(f"Wrote {printable(arguments.output)} ({arguments.kind})")
