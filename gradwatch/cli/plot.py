"""``gradwatch plot``: a picture of a run."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradwatch.cli.arguments import (
    FINE,
    CommandError,
    Commands,
    add_command,
    add_json,
    add_run,
    at_least_one,
    open_run,
    run_name,
    written_whole,
)
from gradwatch.cli.terminal import Output, as_json
from gradwatch.wording import printable

if TYPE_CHECKING:
    from gradwatch.history import History


KINDS = ("norms", "flow", "heatmap", "clipping")
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
gradwatch plot runs/a -o layers.svg --kind heatmap --start 1000 --stop 2000"""


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
    parser.add_argument("--start", type=at_least_one, metavar="STEP", help="first step to draw")
    parser.add_argument(
        "--stop", type=at_least_one, metavar="STEP", help="step to stop before; default: all"
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
    span = {"start": arguments.start, "stop": arguments.stop}
    if not len(history.steps((), **span)):
        raise CommandError(_nothing(history, arguments))
    figure = getattr(history, f"plot_{arguments.kind}")(**span).figure
    with written_whole(arguments.output, arguments.run) as path:
        figure.savefig(path, format=suffix, dpi=arguments.dpi)
    _pyplot().close(figure)
    _tell(arguments, out)
    return FINE


def _nothing(history: History, arguments: argparse.Namespace) -> str:
    """Says why there is nothing to draw."""
    steps = history.steps(()).index
    if not len(steps):
        return f"{arguments.run!r} has no steps yet, so there is nothing to draw."
    first, stop = arguments.start or 1, arguments.stop or "the end"
    return (
        f"{arguments.run!r} has no step from {first} to {stop}: it has steps {steps.min()} to "
        f"{steps.max()}."
    )


def _suffix(target: str) -> str:
    """Checks the format before anything is read."""
    known = sorted(_pyplot().gcf().canvas.get_supported_filetypes())
    _pyplot().close()
    suffix = Path(target).suffix.lower().removeprefix(".")
    if suffix not in known:
        raise CommandError(
            f"-o must end with the format of the picture, .png for example, got {target!r}. "
            f"Formats: {', '.join(known)}."
        )
    return suffix


def _pyplot() -> Any:
    """Loads matplotlib with the backend that needs no screen."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise CommandError(MISSING) from error
    matplotlib.use("agg")
    return importlib.import_module("matplotlib.pyplot")


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
