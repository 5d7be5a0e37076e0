"""Runs a program in this process as ``python`` would; nothing but the standard library is needed.

The program gets a ``__main__`` module of its own, so that its pickles, its children and ``inspect``
find what they would find without us. Its last exception leaves through our frames to Python itself,
which prints it and sets the exit status.
"""

from __future__ import annotations

import builtins
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.machinery import BuiltinImporter, SourceFileLoader, SourcelessFileLoader
from types import CodeType, ModuleType
from typing import Any, Literal

from gradwatch.cli import frames

Kind = Literal["file", "folder", "module", "code", "stdin"]


@dataclass(frozen=True)
class Program:
    """A program as Python's own command line names it.

    Attributes:
        kind: ``"folder"`` is a folder or an archive with a ``__main__.py``.
        name: The path, the name of the module, or the code.
        arguments: What follows in ``sys.argv``.
    """

    kind: Kind
    name: str
    arguments: Sequence[str] = ()


def execute(program: Program) -> None:
    """Runs a program to its end.

    Raises:
        BaseException: What the program ends with. Let it leave the process: tracebacks that Python
            prints from then on are without our frames.
    """
    main = _new_main()
    # Python puts one entry there before it starts a program: ours goes.
    safe = _safe_path()
    if not safe:
        del sys.path[0]
    if not safe or program.kind == "folder":  # which is found through the path, whatever the flags
        sys.path.insert(0, _first_entry(program))
    sys.argv = [_zeroth_argument(program), *program.arguments]
    sys.modules["__main__"] = main
    try:
        _run(program, main)
    except BaseException:
        frames.hide()
        raise


def _run(program: Program, main: ModuleType) -> None:
    if program.kind in ("module", "folder"):
        _run_module(program)
        return
    try:
        _launch(_code(program, main), main.__dict__)
    finally:
        # Python takes them away again: what runs at the exit does not see them. But first it prints
        # an exception, see `frames.hide`.
        if program.kind != "code":
            frames.after_the_traceback(lambda: _forget_file(main))


def _new_main() -> ModuleType:
    main = ModuleType("__main__")
    # In the order in which Python sets them, for programs that print their globals().
    if sys.version_info < (3, 14):
        main.__annotations__ = {}
    main.__dict__["__builtins__"] = builtins
    main.__loader__ = BuiltinImporter
    return main


def _forget_file(main: ModuleType) -> None:
    main.__dict__.pop("__file__", None)
    main.__dict__.pop("__cached__", None)


def _safe_path() -> bool:
    return bool(getattr(sys.flags, "safe_path", sys.flags.isolated))  # `-P` is new in Python 3.11


def _first_entry(program: Program) -> str:
    if program.kind == "file":
        return os.path.dirname(os.path.realpath(program.name))
    if program.kind == "folder":
        return _absolute(program.name)
    return os.getcwd() if program.kind == "module" else ""


def _absolute(path: str) -> str:
    # Not abspath(), which would tidy the path up: Python shows it as it was written.
    if path == "." and sys.version_info >= (3, 11):
        return os.getcwd()
    return os.path.join(os.getcwd(), path)


def _zeroth_argument(program: Program) -> str:
    return {"module": "-m", "code": "-c", "stdin": "-"}.get(program.kind, program.name)


def _code(program: Program, main: ModuleType) -> CodeType:
    if program.kind == "code":
        return _code_of_text(program.name)
    if program.kind == "stdin":
        main.__file__, main.__dict__["__cached__"] = "<stdin>", None
        return _compiled(sys.stdin.buffer.read(), "<stdin>")
    path = _absolute(program.name)
    main.__file__, main.__dict__["__cached__"] = path, None
    if path.endswith(".pyc"):
        loader: Any = SourcelessFileLoader("__main__", path)
    else:
        loader = SourceFileLoader("__main__", path)
    main.__loader__ = loader
    if path.endswith(".pyc"):
        code: CodeType = loader.get_code("__main__")
        return code
    # Not the loader's get_code(), which would leave a .pyc file of the script behind.
    return _compiled(loader.get_data(path), path)


def _code_of_text(text: str) -> CodeType:
    text += "\n"
    code = _compiled(text, "<string>")
    if sys.version_info >= (3, 13):  # tracebacks show the lines of -c from then on
        import linecache

        register: Any = getattr(linecache, "_register_code", None)
        if register is not None:
            register(code, text, "<string>")
    return code


def _compiled(source: str | bytes, name: str) -> CodeType:
    # dont_inherit: this file's `from __future__ import annotations` is none of the program's.
    code: CodeType = compile(source, name, "exec", dont_inherit=True)
    return code


def _launch(code: CodeType, namespace: dict[str, Any]) -> None:
    _deepen(execs=1)
    exec(code, namespace)


def _run_module(program: Program) -> None:
    # What Python itself calls for -m: its frames are in the tracebacks of plain Python, too.
    import runpy

    run: Any = runpy._run_module_as_main  # type: ignore[attr-defined]
    _deepen()
    if program.kind == "module":
        run(program.name)
    else:
        run("__main__", False)


def _deepen(execs: int = 0) -> None:
    """Leaves the program as many frames below the recursion limit as it has without us.

    Args:
        execs: The calls of ``exec()`` between the caller and the program.
    """
    depth, frame = execs if _EXECS_COUNT else 0, sys._getframe(1)
    while frame is not None:
        inside = frame.f_back is not None
        # What another module has started came through exec() as well.
        depth += 1 + (_EXECS_COUNT and inside and frame.f_code.co_name == "<module>")
        frame = frame.f_back  # type: ignore[assignment]
    sys.setrecursionlimit(sys.getrecursionlimit() + depth)


_EXECS_COUNT = sys.version_info < (3, 12)
"""Whether a call of exec() counts for the recursion limit, like a frame."""

frames.add_launchers(*(one.__code__ for one in (_code, _compiled, _launch, _run_module)))
