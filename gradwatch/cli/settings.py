"""The settings of ``gradwatch run``: command line, environment, file, and default, in this order.

They are checked before the program starts, and without torch, which the program is to import.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from gradwatch.cli.locate import UsageError

PREFIX = "GRADWATCH_"
"""Of the environment variables: ``GRADWATCH_RUN_DIR`` is ``--run-dir``."""
OFF = "GRADWATCH_OFF"
"""Environment variable; if set to 1, the program runs without gradwatch."""

ON_NONFINITE = ("record", "skip", "raise", "explain")
STATISTICS = ("norm", "max", "mean", "std", "zeros", "weight_norm", "update_ratio")


class Setting(NamedTuple):
    """One setting.

    Attributes:
        check: Returns the value for ``watch_all``, or raises a ``ValueError`` that says what it
            must be. Values of files have their types; all others are text.
        help: For ``gradwatch run --help``.
        metavar: What stands for the value there; None if the option has none; empty if only a file
            can set it.
    """

    check: Callable[[Any], Any]
    help: str = ""
    metavar: str | None = ""


def _folder(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("the path of a folder, such as runs/a")
    return value


def _local_folder(value: Any) -> str:
    folder = _folder(value)
    if "://" in folder:
        raise ValueError("the path of a folder on this machine, such as runs/a")
    return folder


def _choice(value: Any) -> str:
    if value not in ON_NONFINITE:
        raise ValueError(f"one of {', '.join(ON_NONFINITE)}")
    return str(value)


def _positive(value: Any, wanted: str) -> float:
    number = math.nan
    if isinstance(value, (int, float, str)) and not isinstance(value, bool):
        with suppress(ValueError):
            number = float(value)
    if not number > 0:  # so written, it refuses NaN
        raise ValueError(wanted)
    return number


def _number_or_auto(value: Any) -> float | str:
    return "auto" if value == "auto" else _positive(value, 'a number greater than 0, or "auto"')


def _limit(value: Any) -> float:
    return _positive(value, "a number greater than 0")


def _count(value: Any) -> int:
    if isinstance(value, str) and value.isascii() and value.isdigit():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError("a whole number of at least 1")
    return value


def _statistics(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        value = [name.strip() for name in value.split(",")]
    if not isinstance(value, list) or not all(name in STATISTICS for name in value):
        raise ValueError(f"names out of {', '.join(STATISTICS)}")
    return tuple(value)


_WORDS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


def _flag(value: Any) -> bool:
    known = _WORDS.get(value.lower()) if isinstance(value, str) else value
    if not isinstance(known, bool):
        raise ValueError("true or false")
    return known


SETTINGS: dict[str, Setting] = {
    "run_dir": Setting(
        _local_folder,
        "keep the run there (default: {kept}); a folder for each model",
        "DIR",
    ),
    "tensorboard": Setting(_folder, "write for TensorBoard, too", "DIR"),
    "on_nonfinite": Setting(
        _choice,
        "what to do about NaN and Inf in gradients: record (the default), skip the step, raise an "
        "error, or explain (skip it and find the line of code)",
        "|".join(ON_NONFINITE),
    ),
    "clip": Setting(
        _number_or_auto, "clip gradients to this norm, or to one that is found", "NUMBER|auto"
    ),
    "statistics": Setting(
        _statistics, f"numbers per parameter: {', '.join(STATISTICS)}", "NAME,NAME"
    ),
    "every": Setting(_count, "take statistics every N steps (default: 1)", "N"),
    "quiet": Setting(_flag, "print nothing", None),
    "buffer_size": Setting(_count),
    "exploding_norm": Setting(_limit),
    "skip_spikes": Setting(_number_or_auto),
    "max_consecutive_skips": Setting(_count),
    "explain": Setting(_flag),
    "keep_batches": Setting(_flag),
}
"""By name, as ``watch_all`` takes it. Those without a metavar of their own are for files."""

MUST_BE = "{where} must be {wanted}, got {value!r}."
UNKNOWN = "{path} has {key!r}, which is no option.{close} It takes {known}."
NO_TOML = "{path} is TOML, which Python reads from 3.11 on. Write it as JSON, to a file *.json."
NOT_READ = "{path} cannot be read: {error}."
NO_TABLE = "{path} must hold options and their values, got {value!r}."


def add_options(parser: argparse.ArgumentParser, kept: str = "runs/SCRIPT-TIME") -> None:
    """Adds the settings, and ``--config``, to a parser that leaves out what is not typed.

    ``kept`` says where a run is kept that is given no folder.
    """
    for name, setting in SETTINGS.items():
        option, text = f"--{name.replace('_', '-')}", setting.help.replace("{kept}", kept)
        if setting.metavar:
            parser.add_argument(option, metavar=setting.metavar, help=text)
        elif setting.metavar is None:
            parser.add_argument(option, action="store_const", const="true", help=text)
    listed = ", ".join(name for name, setting in SETTINGS.items() if setting.metavar == "")
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="options of gradwatch.watch_all() in a TOML or JSON file: those above, by their names "
        f"in Python, and {listed}",
    )


def settle(typed: Mapping[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
    """Returns all settings that somebody has made, checked.

    Args:
        typed: By name what the command line has, as text; with ``config``, the path of a file.
        environment: The environment variables; an empty one counts as not set.

    Raises:
        UsageError: If a value is wrong, or the file cannot be read.
    """
    settled: dict[str, Any] = {}
    config = typed.get("config") or environment.get(f"{PREFIX}CONFIG")
    if config:
        settled |= _of_file(config)
    for name, setting in SETTINGS.items():
        variable = PREFIX + name.upper()
        if name in typed:
            settled[name] = _checked(name, f"--{name.replace('_', '-')}", typed[name])
        elif environment.get(variable) and setting.metavar != "":
            settled[name] = _checked(name, variable, environment[variable])
    return settled


def is_off(environment: Mapping[str, str]) -> bool:
    """Whether the program shall run without gradwatch."""
    return bool(environment.get(OFF)) and _checked("quiet", OFF, environment[OFF])


def _checked(name: str, where: str, value: Any) -> Any:
    try:
        return SETTINGS[name].check(value)
    except ValueError as error:
        raise UsageError(MUST_BE.format(where=where, wanted=error, value=value)) from None


def _of_file(path: str) -> dict[str, Any]:
    content = _read(path)
    if not isinstance(content, dict):
        raise UsageError(NO_TABLE.format(path=path, value=content))
    for key in content:
        if key not in SETTINGS:
            from difflib import get_close_matches

            close = get_close_matches(key.replace("-", "_"), SETTINGS, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            known = ", ".join(SETTINGS)
            raise UsageError(UNKNOWN.format(path=path, key=key, close=hint, known=known))
    # None is JSON's null: the default.
    return {
        key: _checked(key, f"{key} in {path}", value)
        for key, value in content.items()
        if value is not None
    }


def _read(path: str) -> Any:
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UsageError(NOT_READ.format(path=path, error=error.strerror)) from None
    try:
        if Path(path).suffix == ".json":
            import json

            return json.loads(content)
        if sys.version_info >= (3, 11):
            import tomllib

            return tomllib.loads(content.decode())
        raise UsageError(NO_TOML.format(path=path))
    except ValueError as error:  # of all that is wrong with TOML, JSON, or UTF-8
        raise UsageError(NOT_READ.format(path=path, error=error)) from None
