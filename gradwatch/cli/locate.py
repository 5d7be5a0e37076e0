"""Finds the program that a command line names: a script, a module, code, a command on the path."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence

from gradwatch.cli.program import Program


class UsageError(Exception):
    """What the user typed cannot be run; the text says what to write instead."""


NO_PROGRAM = "Name a program: gradwatch run train.py, or gradwatch run -m my.module."
NO_FILE = "There is no program {name!r}: no such file, and no such command on the path."
NO_MAIN = "The folder {name!r} has no __main__.py, so Python cannot run it."
NEEDS_VALUE = "-{letter} needs {what} behind it."
INTERPRETER = "gradwatch run is in the place of python: write {better}."
LAUNCHER = (
    "{name} starts the training in other processes, where gradwatch has to be: write {better}."
)
NOT_PYTHON = (
    "{path} is no Python script, so gradwatch cannot look into it. If it starts Python, put "
    "gradwatch there: {name} ... gradwatch run train.py."
)
OTHER_PYTHON = (
    "{path} belongs to another Python, {python}. Install gradwatch there, and write "
    "{python} -m gradwatch run {name}."
)

_INTERPRETERS = re.compile(r"(python|pypy)[\d.]*w?(\.exe)?")
_LAUNCHERS = {
    "torchrun": "torchrun {before}-m gradwatch run {after}",
    "accelerate": "accelerate launch {before}-m gradwatch run {after}",
    "deepspeed": "deepspeed --no_local_rank --module {before}gradwatch run {after}",
}
_LAUNCHER_MODULES = {
    "torch.distributed.run": "torchrun",
    "torch.distributed.launch": "torchrun",
    "accelerate.commands.launch": "accelerate",
    "deepspeed.launcher.runner": "deepspeed",
}
_MODULE = {"deepspeed": "gradwatch run -m my.module"}
_SHELL_LINE = re.compile(rb"^'''exec' (.+) \"\$0\" \"\$@\"$")
"""Line 2 of a script whose path to Python is too long, or has a space, for the first line."""


def locate(words: Sequence[str]) -> Program:
    """Finds a program.

    Args:
        words: What the user typed from the program on.

    Raises:
        UsageError: If it is no program, or none that can be watched.
    """
    if not words:
        raise UsageError(NO_PROGRAM)
    first, *rest = words
    for letter, kind, what in (("m", "module", "a module"), ("c", "code", "a program")):
        if first.startswith(f"-{letter}"):
            value, rest = _value(first[2:], rest, letter, what)
            if kind == "module":
                _refuse_launcher(_LAUNCHER_MODULES.get(value, ""), rest)
                return Program("module", value, rest)
            return Program("code", value, rest)
    if first == "-":
        return Program("stdin", "-", rest)
    return _file(first, rest)


def _value(joined: str, rest: Sequence[str], letter: str, what: str) -> tuple[str, list[str]]:
    if joined:  # Python takes -mmodule as well
        return joined, list(rest)
    if not rest:
        raise UsageError(NEEDS_VALUE.format(letter=letter, what=what))
    return rest[0], list(rest[1:])


def _file(name: str, arguments: Sequence[str]) -> Program:
    if os.path.isfile(name) or _is_pipe(name):
        return Program("folder" if _is_archive(name) else "file", name, arguments)
    if os.path.isdir(name) and any(
        os.path.exists(os.path.join(name, f"__main__.py{compiled}")) for compiled in ("", "c")
    ):
        return Program("folder", name, arguments)
    _refuse_interpreter(name, arguments)
    path = None if os.path.dirname(name) else _on_path(name)
    if path is None:
        raise UsageError((NO_MAIN if os.path.isdir(name) else NO_FILE).format(name=name))
    _refuse_launcher(name, arguments)
    _refuse_foreign(path, name)
    return Program("folder" if _is_archive(path) else "file", path, arguments)


def _is_pipe(name: str) -> bool:
    # <(...) of a shell, /dev/stdin
    return os.path.exists(name) and not os.path.isdir(name)


def _is_archive(name: str) -> bool:
    # As Python asks: the import system knows how to look into it.
    if not os.path.isfile(name):
        return False
    with open(name, "rb") as file:
        start = file.read(4096)
    if start[:2] != b"PK" and start[:2] != b"#!" and not name.endswith((".pyz", ".zip", ".egg")):
        return False  # most are scripts: zipfile is not loaded for them
    import zipfile

    return zipfile.is_zipfile(name)


def _refuse_interpreter(name: str, arguments: Sequence[str]) -> None:
    if _INTERPRETERS.fullmatch(os.path.basename(name)):
        import shlex

        words = ("gradwatch", "run", *(arguments or ("train.py",)))
        raise UsageError(INTERPRETER.format(better=shlex.join(words)))


def _refuse_launcher(name: str, arguments: Sequence[str]) -> None:
    if name not in _LAUNCHERS:
        return
    words = list(arguments)
    if name == "accelerate" and words[:1] == ["launch"]:
        del words[0]
    elif name == "accelerate" and words:
        return  # `accelerate config` and others train nothing
    import shlex

    # Which word is the program cannot be known without the launcher's own list of options.
    start = next((at for at, word in enumerate(words) if word.endswith(".py")), len(words))
    before = "".join(f"{shlex.quote(word)} " for word in words[:start])
    after = shlex.join(words[start:]) or "train.py"
    raise UsageError(
        LAUNCHER.format(name=name, better=_LAUNCHERS[name].format(before=before, after=after))
    )


def _refuse_foreign(path: str, name: str) -> None:
    python = _python_of(path)
    if python is None:
        raise UsageError(NOT_PYTHON.format(path=path, name=name))
    if not _is_this_python(python):
        raise UsageError(OTHER_PYTHON.format(path=path, python=python, name=name))


def _python_of(path: str) -> str | None:
    """Returns the interpreter that a command on the path is run with; None if it is no Python."""
    with open(path, "rb") as file:
        first, second = file.readline(4096).strip(), file.readline(4096).strip()
    if not first.startswith(b"#!"):
        return None
    words = os.fsdecode(first[2:]).split()
    if words and os.path.basename(words[0]) == "env":
        words = [word for word in words[1:] if word[0] != "-" and "=" not in word]
    elif words and os.path.basename(words[0]) == "sh" and (shell := _SHELL_LINE.match(second)):
        words = [_in_shell(os.fsdecode(shell[1]), path)]
    if not words or not _INTERPRETERS.fullmatch(os.path.basename(words[0])):
        return None
    return words[0] if os.path.dirname(words[0]) else _on_path(words[0])


def _on_path(name: str) -> str | None:
    import shutil  # few programs are commands

    return shutil.which(name)


def _in_shell(python: str, path: str) -> str:
    import shlex

    # uv's scripts that can be moved look beside themselves:
    # "$(dirname -- "$(realpath -- "$0")")"/'python'
    if python.startswith('"$(dirname'):
        name = shlex.split(python.rpartition("/")[2])[0]
        return os.path.join(os.path.dirname(os.path.realpath(path)), name)
    return shlex.split(python)[0]


def _is_this_python(python: str) -> bool:
    # The folder, and not only the file: the Pythons of virtual environments are links to one file.
    ours = sys.executable
    return os.path.realpath(python) == os.path.realpath(ours) and os.path.realpath(
        os.path.dirname(python)
    ) == os.path.realpath(os.path.dirname(ours))
