"""``gradwatch run``: runs a training script as Python would, and watches every model it trains."""

from __future__ import annotations

import argparse
import atexit
import importlib.util
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from gradwatch.cli.launch import (
    default_folder,
    give_back,
    rank_and_size,
    reserve,
    writable,
)
from gradwatch.cli.locate import UsageError, locate
from gradwatch.cli.on_import import after_import
from gradwatch.cli.program import Program, execute
from gradwatch.cli.settings import SETTINGS, add_options, is_off, settle
from gradwatch.imports import no_collection

if TYPE_CHECKING:
    from gradwatch.process.watchers import ProcessWatch
    from gradwatch.record.records import Sink
    from gradwatch.report.report import Report
    from gradwatch.watcher import Watcher

SUMMARY = "run a training script, and watch every model that it trains"

_USAGE = """\
gradwatch run [options] SCRIPT [ARGUMENT ...]
       gradwatch run [options] -m MODULE [ARGUMENT ...]
       gradwatch run [options] COMMAND [ARGUMENT ...]"""

_DESCRIPTION = """\
Runs a program as python would, and watches every model that it trains. The program needs no
change, and nothing about the training changes unless --clip or --on-nonfinite asks for it.
SCRIPT is a file, a folder or an archive with a __main__.py, or - for the standard input;
-c CODE works as well. COMMAND is one on the path that is written in Python. All that follows
the program belongs to it."""

_EPILOG = """\
examples:
  gradwatch run train.py --epochs 3
  gradwatch run --on-nonfinite explain train.py      your loss is NaN?
  gradwatch run -m my.package.train
  gradwatch run yolo train data=coco8.yaml
  torchrun --nproc-per-node 2 -m gradwatch run train.py
  accelerate launch -m gradwatch run train.py

Each option is an environment variable, too: GRADWATCH_RUN_DIR, GRADWATCH_ON_NONFINITE, ...
The command line comes before the environment, and that before the file.
GRADWATCH_OFF=1 runs the program without gradwatch."""

PROBLEM = 2
"""Exit code: wrong usage."""

NO_PYARROW = (
    "{option} needs pyarrow, which is not installed. Run: pip install 'gradwatch[runs]' (or leave "
    "the option out: the report is printed at the end)."
)
NO_TENSORBOARD = (
    "{option} needs TensorBoard, which is not installed. Run: pip install 'gradwatch[tensorboard]'."
)
NOT_KEPT = (
    "The run is not kept, as pyarrow is not installed. To keep it: pip install 'gradwatch[runs]'."
)
NO_FOLDER = "The run is not kept: {error}. To keep it elsewhere: --run-dir DIR."
NO_TORCH = "Nothing was watched: the program did not import torch in this process."
NO_BOARD = "Nothing is written for TensorBoard: {error}"
CHILDREN = (
    "Other processes that it started are not watched. If they train, start them with `python -m "
    "gradwatch run`, or call gradwatch.watch_all() in the function that they run."
)
CANNOT = "Nothing is watched: {error}"
LOOK = (
    "The run is in {folder}: gradwatch report {folder} (while it trains: gradwatch tail {folder})."
)
LOOK_BOARD = "TensorBoard: tensorboard --logdir {folder}"
EXPLAIN = (
    "For the line of code that made the {kind}: gradwatch run --on-nonfinite explain, which skips "
    "such steps, too."
)
MORE = "... and {count} models more."

MOST_TOLD = 8
"""Models, and findings of one, that are told at the end."""
_KINDS = {"nan": "NaN", "inf": "Inf"}
_CHILDREN_S = 0.5
"""Processor time of children from which on they may have trained: importing torch takes more."""


def main(words: Sequence[str]) -> int:
    """Runs the command; returns the exit code.

    Args:
        words: What the user typed after ``gradwatch run``.

    Raises:
        BaseException: What the program ends with.
    """
    own, rest = _split(words)
    typed = vars(_parser().parse_args(own))
    try:
        program = locate(rest)
        run = None if is_off(os.environ) else Run(program, settle(typed, os.environ))
    except UsageError as error:
        _complain(str(error))
        return PROBLEM
    if run is not None:
        run.begin()
    try:
        execute(program)
    except KeyboardInterrupt as error:
        if run is not None and type(error) is KeyboardInterrupt:
            run.interrupted()
        raise
    return 0


def add_to(commands: Any) -> None:
    """Adds the command to the list in ``gradwatch --help``."""
    commands.add_parser("run", help=SUMMARY, add_help=False)


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns our options, and all from the program on."""
    at = 0
    while at < len(words):
        word = words[at]
        if word == "--":
            return list(words[:at]), list(words[at + 1 :])
        if word[:1] != "-" or word == "-" or word[:2] in ("-m", "-c"):
            break
        takes = word[:2] == "--" and "=" not in word and _takes_value(word[2:].replace("-", "_"))
        at += 2 if takes else 1
    return list(words[:at]), list(words[at:])


def _takes_value(name: str) -> bool:
    return name == "config" or (name in SETTINGS and bool(SETTINGS[name].metavar))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Says on one line what is wrong with our options, and ends the command."""
        _complain(f"{message}. Try 'gradwatch run --help'.")
        self.exit(PROBLEM)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="gradwatch run",
        usage=_USAGE,
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    add_options(parser)
    return parser


def _complain(text: str) -> None:
    with suppress(AttributeError, OSError, ValueError):  # it is closed
        sys.stderr.write(f"gradwatch run: {text}\n")


class Run:
    """A program under ``gradwatch run``: from its import of torch to the exit of the process."""

    def __init__(self, program: Program, settings: Mapping[str, Any]) -> None:
        """Checks what can be checked without torch.

        Args:
            program: What will run.
            settings: By name, checked; those that are left out have their defaults.

        Raises:
            UsageError: If a package is missing that a setting needs, or a folder that it names
                cannot be written to.
        """
        self._options = dict(settings)
        self._quiet = self._options.pop("quiet", False)
        self._board = self._options.pop("tensorboard", None)
        self._rank, self._size = rank_and_size(os.environ)
        self._process = os.getpid()
        # The program may go elsewhere, or put something else in the place of the stream.
        self._cwd, self._stderr = Path.cwd(), sys.stderr
        self._reserved: Path | None = None
        self._keeps = importlib.util.find_spec("pyarrow") is not None
        self._watch: ProcessWatch | None = None
        self._error = ""
        self._interrupted = False
        asked = self._options.get("explain", False)
        self._explains = asked or self._options.get("on_nonfinite") == "explain"
        self._unexplained = ""
        self._boards: list[Any] = []  # the TensorBoardWriter of each model
        if self._board is not None:
            if importlib.util.find_spec("tensorboard") is None:
                raise UsageError(NO_TENSORBOARD.format(option="--tensorboard"))
            self._board = writable("--tensorboard", self._board)
        if "run_dir" in self._options and not self._keeps:
            raise UsageError(NO_PYARROW.format(option="--run-dir"))
        if "run_dir" in self._options:
            self._options["run_dir"] = writable("--run-dir", self._options["run_dir"])
            self._default = None
        else:
            self._default = self._cwd / default_folder(program, os.environ)

    def begin(self) -> None:
        """Has the models watched once the program has imported torch, and told at the exit."""
        # First of all, so that it runs last: a program may train in a function called at the exit.
        atexit.register(self._end)
        after_import("torch", self._attach)

    def interrupted(self) -> None:
        """Notes that Ctrl-C has ended the program, which Python tells in its exit status."""
        self._interrupted = True

    # -- with torch ------------------------------------------------------------------------------

    def _attach(self) -> None:
        try:
            with no_collection():
                from gradwatch import lifetime
                from gradwatch.process.watchers import ProcessWatch

            options = {**self._options, **self._places()}
            try:
                watch = ProcessWatch(options, say=self._say, is_first=True)
            except (TypeError, ValueError) as error:  # what the settings' own checks do not know
                _complain(str(error))
                raise SystemExit(PROBLEM) from None
            watch.attach()
            lifetime.left_to_owner(watch)  # _end() closes it, after the program's own functions
            self._watch = watch
        except Exception as error:  # nothing of ours may end the program
            self._error = CANNOT.format(error=f"{type(error).__name__}: {error}")
            self._say(self._error)

    def _places(self) -> dict[str, Any]:
        """Returns the options that say where the run goes."""
        places: dict[str, Any] = {}
        if self._default is not None and self._keeps:
            try:
                places["run_dir"] = self._reserve(self._default)
            except OSError as error:
                self._keeps = False
                self._say(NO_FOLDER.format(error=error))
        if self._board is not None:
            places["sinks"] = self._sinks
        return places

    def _reserve(self, folder: Path) -> Path:
        if self._size == 1:  # otherwise another rank may have made it
            folder = self._reserved = reserve(folder)
        self._options["run_dir"] = folder
        return folder

    def _sinks(self, label: str) -> Iterable[Sink]:
        # By name, as the core imports no integration: only here, a user asks for one.
        try:
            package = importlib.import_module("gradwatch_tensorboard")
            sink: Sink = package.TensorBoardWriter(f"{self._board}/{label}")
        except Exception as error:
            self._say(NO_BOARD.format(error=f"{type(error).__name__}: {error}"))
            return []
        self._boards.append(sink)
        return [sink]

    # -- lines -----------------------------------------------------------------------------------

    def _say(self, line: str) -> None:
        if self._quiet or self._rank != 0 or os.getpid() != self._process:
            return
        text = line.removeprefix("gradwatch: ").replace(f"{self._cwd}{os.sep}", "")
        with suppress(AttributeError, OSError, ValueError):  # it was closed, or nobody reads it
            # Each line begins alike, so that a log of the program can be told apart.
            self._stderr.write("".join(f"gradwatch: {one}\n" for one in text.split("\n")))
            self._stderr.flush()

    def _end(self) -> None:
        """Ends the watching and says what it has found; called at the exit of the process."""
        if os.getpid() != self._process:  # a child that was forked has inherited this
            return
        try:
            if self._watch is not None:
                self._watch.close()
            self._tell()
        except Exception as error:
            self._say(f"The end could not be told: {type(error).__name__}: {error}")
        finally:
            if self._reserved is not None:
                give_back(self._reserved)
            if self._interrupted:
                # Python forgets that a Ctrl-C ended the program, and with it the exit status, when
                # source is executed since, as the classes of a late import do.
                with suppress(KeyboardInterrupt):
                    exec("raise KeyboardInterrupt")

    def _tell(self) -> None:
        if self._quiet or self._rank != 0:
            return
        watchers = [] if self._watch is None else self._watch.watchers
        if self._watch is None or not watchers:
            self._tell_why()
            return
        kept = [one for one in watchers if one.folder is not None]
        for watcher in watchers[:MOST_TOLD]:
            self._tell_findings(watcher, self._watch.report_of(watcher))
        if self._unexplained:
            self._say(EXPLAIN.format(kind=self._unexplained))
        if len(watchers) > MOST_TOLD:
            self._say(MORE.format(count=len(watchers) - MOST_TOLD))
        if kept:
            self._say(LOOK.format(folder=self._options["run_dir"]))
        elif not importlib.util.find_spec("pyarrow"):
            self._say(NOT_KEPT)
        if any(board.has_written for board in self._boards):
            self._say(LOOK_BOARD.format(folder=self._board))

    def _tell_findings(self, watcher: Watcher, report: Report) -> None:
        from gradwatch.record.wording import printable

        if not self._explains:
            bad = (one for one in report.findings if one.kind in ("nan", "inf"))
            found = next((_KINDS[one.kind] for one in bad if one.explanation is None), "")
            self._unexplained = self._unexplained or found
        head, *lines = str(report).splitlines()
        if watcher.folder is not None:  # the rest can be read there
            lines = [
                f"  [{one.severity}] {one.kind}: {printable(one.title)}"
                for one in report.findings[:MOST_TOLD]
            ]
        self._say(f"{printable(watcher.label)}: {head.removeprefix('gradwatch report: ')}")
        for line in lines:
            self._say(line)

    def _tell_why(self) -> None:
        if self._error:
            return
        why = NO_TORCH if self._watch is None else self._watch.nothing_watched()
        times = os.times()
        if times.children_user + times.children_system > _CHILDREN_S:
            why = f"{why} {CHILDREN}"
        self._say(why)
