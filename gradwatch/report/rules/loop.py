"""Loop: mistakes in the training loop, and changes of what was watched, told while it ran."""

from __future__ import annotations

from collections.abc import Iterator

from gradwatch.record.events import tells_of_same_data
from gradwatch.report.finding import Evidence, Finding, Severity
from gradwatch.report.run_data import RunData
from gradwatch.report.thresholds import Thresholds

SEVERITY: dict[str, Severity] = {"mistake": "warning", "changed": "note"}
WHY = {
    "mistake": (
        "The training does something else than what was most likely meant, so its numbers may not "
        "mean what they seem to."
    ),
    "changed": (
        "From there on a part of the model is not watched any more, or does not learn, or the "
        "numbers are those of one rank alone."
    ),
}
ADVICE = "If this is intended, there is nothing to do."


def loop(run: RunData, limits: Thresholds) -> Iterator[Finding]:
    """Repeats every event of kind ``mistake`` or ``changed``; each was told once in the run."""
    for event in run.events:
        kind, name = event.kind, event.parameter
        if kind not in SEVERITY or tells_of_same_data(event.message):
            continue  # the rule about ranks says how many steps it lasted
        # The message says first what was seen, and then what to do.
        title, _, advice = event.message.partition(". ")
        numbers = {"parameters": float(event.value)} if event.value else {}
        seen = Evidence((event.step,), (name,) if name else (), numbers, event.optimizer)
        title = f"{title.rstrip('.')}."
        yield Finding(kind, SEVERITY[kind], title, seen, WHY[kind], advice or ADVICE)
