"""``gradwatch explain``: where the NaN and Inf of a run came from, to the line of code."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gradwatch.cli.arguments import (
    FINE,
    RUN,
    CommandError,
    Commands,
    add_command,
    at_least_one,
    heading,
    in_models,
    open_run,
    run_folders,
    run_name,
)
from gradwatch.cli.terminal import Output, as_json, printable_lines
from gradwatch.record.wording import counted, printable

if TYPE_CHECKING:
    from gradwatch.record.folder.explanations import KeptExplanation

_DESCRIPTION = """\
Prints what made the NaN and Inf of a run: the operation, its module, the line of your
code, the examples of the batch, and what to try. Likewise for an overflow, and for the
spikes that were skipped.

watch(..., on_nonfinite="explain", run_dir=...) writes such explanations."""

_EXAMPLES = """\
gradwatch explain runs/a
gradwatch explain runs/a --step 120
gradwatch explain runs/a --json | jq '.explanations[] | {step, file, line}'"""

_NONE = (
    "{run} has no explanations. To get some, train with "
    'watch(..., on_nonfinite="explain", run_dir=...).'
)
_NONE_OF_STEP = "{run} has no explanation of step {step}; there are explanations of {steps}."
_MOST_STEPS = 10


def add_to(commands: Commands) -> None:
    """Adds the command to the parser."""
    summary = "what made a NaN, to the line of code"
    parser = add_command(commands, "explain", run, summary, _DESCRIPTION, _EXAMPLES)
    parser.add_argument("run", metavar="RUN", help=RUN)
    parser.add_argument(
        "--step", metavar="N", type=at_least_one, help="only the explanations of this step"
    )
    parser.add_argument("--json", action="store_true", help="print the explanations as JSON")


def run(arguments: argparse.Namespace, out: Output) -> int:
    """Prints the explanations, of each model of the run; returns the exit code."""
    from gradwatch.record.folder.models import models_in  # torch comes with it

    path, step = arguments.run, arguments.step
    models = models_in(path) if path else None
    if models is None:
        there = _explanations(path)
        content, text = _content(path, there, step), _text(path, there, step)
    else:
        found = _of_models(path, models)
        parts = [_content(str(models[name]), there, step) for name, there in found.items()]
        content = in_models(path, found, parts)
        texts = (
            f"{heading(name)}\n{_text(str(models[name]), there, step)}"
            for name, there in found.items()
        )
        text = "\n\n".join(texts)
    out.line(as_json(content, indent=2) if arguments.json else text)
    return FINE


def _of_models(path: str, models: Mapping[str, Path]) -> dict[str, Sequence[KeptExplanation]]:
    """Reads the explanations of each model that has steps or an explanation."""
    found = {}
    for name, folder in models.items():
        with suppress(CommandError):
            found[name] = _explanations(str(folder))
    if not found:
        run_folders(path)  # says that no model has steps yet
    return found


def _explanations(path: str) -> Sequence[KeptExplanation]:
    """Reads them; those of a run that was stopped before its first steps were written, too."""
    from gradwatch.record.folder.explanations import read_explanations
    from gradwatch.record.folder.reader import FolderSource

    try:
        open_run(path)
    except CommandError:
        there = read_explanations(Path(path)) if path else []
        if not there:
            raise
        return there
    return FolderSource(path).kept_explanations()


def _of_step(there: Sequence[KeptExplanation], step: int | None) -> list[KeptExplanation]:
    return [one for one in there if step is None or one.explanation.step == step]


def _content(run: str, there: Sequence[KeptExplanation], step: int | None) -> dict[str, Any]:
    rows = list(map(_as_dict, _of_step(there, step)))
    return {"run": run_name(run), "explanations": rows}


def _text(run: str, there: Sequence[KeptExplanation], step: int | None) -> str:
    wanted = _of_step(there, step)
    return "\n\n".join(map(_as_text, wanted)) if wanted else _none(run_name(run), step, there)


def _as_dict(one: KeptExplanation) -> dict[str, Any]:
    batch = None if one.batch is None else str(one.batch)
    more = {"summary": one.explanation.summary, "folder": str(one.folder), "batch": batch}
    return asdict(one.explanation) | more


def _as_text(one: KeptExplanation) -> str:
    parts = [printable_lines(str(one.explanation)).strip("\n")]
    if one.batch is not None:
        parts.append(printable(f"The micro-batch is in {one.batch}."))
    elif one.batch_note:
        parts.append(printable(f"The micro-batch was {one.batch_note}."))
    return "\n".join(parts)


def _none(run: str, step: int | None, there: Sequence[KeptExplanation]) -> str:
    if not there:
        return _NONE.format(run=printable(run))
    steps = [str(number) for number in sorted({one.explanation.step for one in there})]
    shown = ", ".join(steps[:_MOST_STEPS])
    more = len(steps) - _MOST_STEPS
    told = f"step {shown}" if len(steps) == 1 else f"steps {shown}"
    told += f" and {counted(more, 'more')}" if more > 0 else ""
    return _NONE_OF_STEP.format(run=printable(run), step=step, steps=told)
