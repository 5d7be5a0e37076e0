"""What a history answers, as plain values, and where the data is."""

import json
from pathlib import Path

from .told import told, told_frame

DATA = Path(__file__).parent / "data"

RENAMED = {
    ':"Seen"': ':"Evidence"',
    '"Seen(': '"Evidence(',
    "=Seen(": "=Evidence(",
    '"dtype":"bool"': '"dtype":"boolean"',
}
"""The evidence of a finding is a class of another name today; its repr is where that shows.

Truth values may be unknown today, and have the dtype of pandas that knows this.
"""


def expected(file):
    """What was answered when the data was made, of one of the JSON files."""
    text = (DATA / file).read_text(encoding="utf-8")
    for old, new in RENAMED.items():
        text = text.replace(old, new)
    return json.loads(text)


WORDS = ("title", "why", "advice")
"""What a finding says in words, which may be put better; what it has seen may not change."""


def without_words(answers):
    """The answers of a history without the sentences of its report."""
    data = dict(answers["report_data"])
    data["findings"] = [
        {name: one for name, one in finding.items() if name not in WORDS}
        for finding in data["findings"]
    ]
    data["remarks"] = len(data["remarks"])
    head = answers["report"].partition("\n")[0]
    return {**answers, "report": head, "report_data": data}


def history_answers(history):
    """All that can be asked of a run."""
    report = history.report(few_steps=4, skipped=0.001, spike=3.0)
    return {
        "repr": repr(history),
        "layout": told(history.layout),
        "steps": told_frame(history.steps()),
        "parameters": told_frame(history.parameters()),
        "events": told_frame(history.events()),
        "flow": told_frame(history.flow()),
        "clip_rate": told(history.clip_rate()),
        "advice": history.advice(),
        "report": str(report),
        "report_data": told(report.to_dict()),
    }
