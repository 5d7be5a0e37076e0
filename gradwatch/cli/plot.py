"""``gradwatch plot``: draws a picture of a run."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradwatch.cli.arguments import (
    FINE,
    RUN,
    CommandError,
    Commands,
    add_command,
    at_least_one,
    open_run,
    run_folder,
    tell_written,
    written_whole,
)
from gradwatch.cli.terminal import Output

if TYPE_CHECKING:
    from gradwatch.history import History

KINDS = ("norms", "flow", "heatmap", "clipping")

_MISSING = "plot needs matplotlib, which is not installed. Run: pip install 'gradwatch[plot]'"

_DESCRIPTION = """\
Draws a picture of a run; the suffix of FILE sets the format: .png, .svg, .pdf, ...

kinds:
  norms     gradient norm by step, with the clip threshold and the events
  flow      gradient norm by layer
  heatmap   gradient norm by layer and step
  clipping  how often and how hard the clip acts"""

_EXAMPLES = """\
gradwatch plot runs/a -o norms.png
gradwatch plot runs/a -o layers.svg --kind heatmap --start 1000 --stop 2000"""


def add_to(commands: Commands) -> None:
    """Adds the command to the parser."""
    parser = add_command(commands, "plot", run, "a picture of a run", _DESCRIPTION, _EXAMPLES)
    parser.add_argument("run", metavar="RUN", help=RUN)
    file = "picture to write, such as norms.png"
    parser.add_argument("-o", "--output", metavar="FILE", required=True, help=file)
    parser.add_argument("--kind", choices=KINDS, default=KINDS[0], help="default: %(default)s")
    dots = "dots per inch (default: %(default)s)"
    parser.add_argument("--dpi", type=at_least_one, default=150, help=dots)
    parser.add_argument("--start", type=at_least_one, metavar="STEP", help="first step to draw")
    stop = "step to stop before; default: all"
    parser.add_argument("--stop", type=at_least_one, metavar="STEP", help=stop)
    parser.add_argument("--json", action="store_true", help="print what was written as JSON")


def run(arguments: argparse.Namespace, out: Output) -> int:
    """Draws the picture; returns the exit code."""
    suffix = _suffix(arguments.output)
    history = open_run(arguments.run)
    span = {"start": arguments.start, "stop": arguments.stop}
    if not len(history.steps((), **span)):
        raise CommandError(_no_steps(history, arguments))
    figure = getattr(history, f"plot_{arguments.kind}")(**span).figure
    with written_whole(arguments.output, run_folder(arguments.run)) as path:
        figure.savefig(path, format=suffix, dpi=arguments.dpi)
    _pyplot().close(figure)
    file, kind = arguments.output, arguments.kind
    content = {"kind": kind, "file": file, "bytes": Path(file).stat().st_size}
    tell_written(arguments, out, content, kind)
    return FINE


def _no_steps(history: History, arguments: argparse.Namespace) -> str:
    steps = history.steps(()).index
    if not len(steps):
        return f"{arguments.run!r} has no steps yet, so there is nothing to draw."
    first, stop = arguments.start or 1, arguments.stop or "the end"
    return (
        f"{arguments.run!r} has no step from {first} to {stop}: it has steps {steps.min()} to "
        f"{steps.max()}."
    )


def _suffix(target: str) -> str:
    """Returns the picture format; checked before anything is read."""
    # Only the canvas of a figure knows the formats that it can write, so make one to ask.
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
    """Imports matplotlib.pyplot with a backend that needs no screen."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise CommandError(_MISSING) from error
    # Before pyplot is imported, which would otherwise look for a screen.
    matplotlib.use("agg")
    return importlib.import_module("matplotlib.pyplot")
