"""The command line: ``gradwatch COMMAND``."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from gradwatch.cli.terminal import Output

TRACEBACK = "GRADWATCH_TRACEBACK"
"""Environment variable; if set to 1, an error is shown with its traceback."""

DESCRIPTION = """\
Runs a training script and watches it, and reads runs: those of gradwatch run, and what
gradwatch.watch(run_dir=) has written or is still writing.

RUN is the folder of a run. Nothing in it is ever executed or changed."""

EPILOG = """\
examples:
  gradwatch run train.py                   train under gradwatch
  gradwatch tail runs/a                    watch it train
  gradwatch report runs/a                  what went wrong, and what to try
  gradwatch explain runs/a                 what made a NaN, to the line of code
  gradwatch plot runs/a -o norms.png
  gradwatch compare runs/a runs/b
  gradwatch export runs/a -o steps.csv

exit codes:
  0  fine
  1  the report has findings that --fail-on names
  2  wrong usage, or a run that cannot be read

For details: gradwatch COMMAND --help. GRADWATCH_TRACEBACK=1 shows where an error came from."""


class _Parser(argparse.ArgumentParser):
    """A parser that reports errors on one line."""

    def error(self, message: str) -> NoReturn:
        """Says what is wrong with the arguments, and ends the program."""
        from gradwatch.cli.arguments import PROBLEM
        from gradwatch.cli.terminal import one_line

        hint = f"Try '{self.prog} --help'."
        self.exit(PROBLEM, f"{self.prog}: {one_line(message).rstrip('.')}. {hint}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code.

    Args:
        arguments: What the user typed after ``gradwatch``; None for ``sys.argv``.
    """
    typed = sys.argv[1:] if arguments is None else arguments
    if typed[:1] == ["run"]:
        # Before all else: the program shall find the process as Python starts it, and its signals,
        # its output and its errors are its own. No other command is loaded, nor torch.
        from gradwatch.cli.run import main as run_program

        return run_program(typed[1:])
    return _read_runs(typed)


def _read_runs(typed: Sequence[str]) -> int:
    from gradwatch.cli.arguments import PROBLEM
    from gradwatch.cli.terminal import Output

    out = Output(sys.stdout)
    try:
        chosen = _parser().parse_args(typed or ["--help"])
    except SystemExit as end:  # help and version are output too
        _finish(out)
        return end.code if typed and isinstance(end.code, int) else PROBLEM
    with _ended_by_sigterm():
        return _run(chosen, out)


def _run(chosen: argparse.Namespace, out: Output) -> int:
    from gradwatch.cli.arguments import INTERRUPTED, PROBLEM
    from gradwatch.cli.terminal import one_line

    try:
        code: int = chosen.run_command(chosen, out)
        out.flush()
    except KeyboardInterrupt:
        _finish(out)
        return INTERRUPTED
    except Exception as error:
        if os.environ.get(TRACEBACK, "0") not in ("", "0"):
            raise
        _finish(out)
        _say(f"gradwatch {chosen.command}: {one_line(_reason(error))}\n")
        return PROBLEM
    return code


def _reason(error: Exception) -> str:
    from gradwatch.cli.arguments import CommandError
    from gradwatch.record.folder.files import UnreadableError

    # str() of an OSError begins with "[Errno 13]", which does not help the user.
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename!r}" if error.filename else error.strerror
    if isinstance(error, CommandError | UnreadableError | OSError | ModuleNotFoundError):
        return str(error)
    return f"{type(error).__name__}: {error} ({TRACEBACK}=1 shows more)"


def _say(text: str) -> None:
    # sys.stderr is None if the stream was closed before Python started: 2>&- in a shell.
    if sys.stderr is not None:
        with suppress(OSError):
            sys.stderr.write(text)
            sys.stderr.flush()


def _finish(out: Output) -> None:
    """Flushes the output; a disk error has been reported already, or does not matter here."""
    try:
        out.flush()
    except OSError:
        out.close()


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Lets a command restore the terminal on SIGTERM."""
    # By default SIGTERM ends Python without running any finally. SystemExit runs them, and with
    # them rich's Live shows the cursor again.

    from gradwatch.cli.arguments import TERMINATED

    def end(*_: object) -> NoReturn:
        sys.exit(TERMINATED)

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread can handle signals
        return
    # Restored at the end, because a program with its own handler may call main().
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _parser() -> argparse.ArgumentParser:
    from gradwatch import __version__
    from gradwatch.cli import compare, explain, export, plot, report, run, tail

    parser = _Parser(
        prog="gradwatch",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    version = f"gradwatch {__version__}"
    parser.add_argument("--version", action="version", version=version, help="print it and exit")
    commands = parser.add_subparsers(metavar="COMMAND", dest="command", required=True)
    for command in (run, report, explain, tail, plot, compare, export):
        command.add_to(commands)
    return parser
