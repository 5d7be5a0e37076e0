"""``%load_ext gradwatch``: ``%%gradwatch`` watches every model that a notebook's cell trains.

The line ``%%gradwatch`` becomes a call that begins to watch, and the rest of the cell is run by
IPython as any other: its output, its last expression, its ``await``, its errors and the numbers of
its lines are what they would be without. The watching ends with the cell.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from gradwatch.cli.launch import writable
from gradwatch.cli.locate import UsageError
from gradwatch.cli.settings import add_options, settle

if TYPE_CHECKING:
    from gradwatch.process.watchers import ProcessWatch
    from gradwatch.record.records import Sink

NAME = "gradwatch"

_DESCRIPTION = """\
%%gradwatch at the top of a cell watches every model that the cell trains, and shows the report
below its output; %gradwatch does so from its line to the end of the cell. Models and optimizers of
earlier cells are watched as well. Nothing about the training changes unless --clip or
--on-nonfinite asks for it."""

WATCHING = "This cell is being watched already. Write %%gradwatch once, at the top of the cell."

Shell = Any
"""IPython's ``InteractiveShell``; IPython is there if somebody calls what is in here."""


def load_ipython_extension(ipython: Shell) -> None:
    """Adds ``%%gradwatch`` and ``%gradwatch``: what ``%load_ext gradwatch`` calls."""
    if _of(ipython) is None:
        magic = Magic(ipython)
        ipython.register_magic_function(magic.begin, "line", NAME)
        ipython.register_magic_function(magic.run, "cell", NAME)
        ipython.input_transformers_cleanup.append(magic.as_line)
        ipython.events.register("post_execute", magic.end)


def unload_ipython_extension(ipython: Shell) -> None:
    """Takes them away again: what ``%unload_ext gradwatch`` calls."""
    magic = _of(ipython)
    if magic is not None:
        magic.end()
        ipython.events.unregister("post_execute", magic.end)
        ipython.input_transformers_cleanup.remove(magic.as_line)
        for kind in ("line", "cell"):
            del ipython.magics_manager.magics[kind][NAME]


def _of(ipython: Shell) -> Magic | None:
    known = ipython.magics_manager.magics["line"].get(NAME)
    magic = getattr(known, "__self__", None)
    return magic if isinstance(magic, Magic) else None


class Magic:
    """The magics of one shell."""

    def __init__(self, ipython: Shell) -> None:
        self._ipython = ipython
        self._watch: ProcessWatch | None = None
        self._quiet = False

    def as_line(self, lines: list[str]) -> list[str]:
        """Makes ``%gradwatch`` of ``%%gradwatch``, as IPython reads a cell; it keeps its place."""
        words = lines[0].split(maxsplit=1) if lines else []
        # Another cell magic has to be the first thing in what is run.
        if words[:1] == [f"%%{NAME}"] and not any(one.startswith("%%") for one in lines[1:2]):
            return [lines[0][1:], *lines[1:]]
        return lines

    def begin(self, line: str) -> None:
        """Watches every model that is trained until the end of the cell; --help lists options."""
        from IPython.core.error import UsageError as RefusedError  # shown without a traceback

        if self._watch is not None:
            raise RefusedError(WATCHING)
        try:
            options = _options(line)
            if options is None:
                return
            self._attach(options)
        except (UsageError, TypeError, ValueError) as error:
            raise RefusedError(f"%{NAME}: {error}") from None

    def run(self, line: str, cell: str) -> None:
        """Watches every model that the cell trains; --help lists options."""
        # Only where as_line() could not act: before another magic, or called by its name.
        self.begin(line)
        try:
            self._ipython.run_cell(cell)
        finally:
            self.end()

    def end(self) -> None:
        """Ends what was begun in this cell, and shows the report."""
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.close()
            if not self._quiet:
                self._show(watch)

    def _show(self, watch: ProcessWatch) -> None:
        report = watch.report()
        # Not the object: a terminal would show its repr(), which is one line.
        data = {"text/plain": str(report), "text/html": report._repr_html_()}
        self._ipython.display_pub.publish(data)

    def _attach(self, options: dict[str, Any]) -> None:
        from gradwatch.imports import no_collection

        with no_collection():  # here, as it imports torch
            from gradwatch.process.watchers import ProcessWatch

        self._quiet = options.pop("quiet", False)
        board = options.pop("tensorboard", None)
        if board is not None:
            options["sinks"] = _boards(writable("--tensorboard", board))
        if "run_dir" in options:
            options["run_dir"] = writable("--run-dir", options["run_dir"])
        say = _silent if self._quiet else partial(_say, str(Path.cwd()))
        watch = ProcessWatch(options, say=say)
        watch.attach()
        self._watch = watch


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}. Try %{NAME} --help")


def _options(line: str) -> dict[str, Any] | None:
    """Returns the options that are typed, checked; None if only the help was asked for."""
    parser = _Parser(
        prog=f"%%{NAME}",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    add_options(parser, kept="it is not kept")
    try:
        typed = vars(parser.parse_args(shlex.split(line)))
    except SystemExit:  # of --help
        return None
    return settle(typed, {})  # the environment's settings are those of `gradwatch run`


def _boards(folder: str) -> Callable[[str], Iterable[Sink]]:
    # By name, as the core imports no integration: only here, a user asks for one.
    try:
        package = importlib.import_module("gradwatch_tensorboard")
    except ModuleNotFoundError as error:
        raise UsageError(str(error)) from None
    return lambda label: [package.TensorBoardWriter(f"{folder}/{label}")]


def _say(folder: str, line: str) -> None:
    text = line.removeprefix("gradwatch: ").replace(f"{folder}{os.sep}", "")
    sys.stderr.write(f"gradwatch: {text}\n")


def _silent(line: str) -> None:
    """Says nothing."""
