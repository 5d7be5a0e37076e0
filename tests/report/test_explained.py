"""What a report makes of explanations: the first finding, to the line of code."""

import json
import math
from dataclasses import replace

import pytest

from gradwatch import Explanation, History
from gradwatch.record.explanation import Share
from gradwatch.record.records import Event
from tests.support.explanations import explanation

LARGEST = {
    "largest_parameters": (Share("b.weight", 3.0, 0.9), Share("a.weight", 1.0, 0.1)),
    "largest_examples": (Share("5", 9.0, 0.8), Share("2", 1.0, 0.05)),
}


@pytest.fixture
def report(history):
    """Reports a run of these columns, with these explanations."""

    def make(*explanations, count=200, **columns):
        run = history(count, **columns)
        return History(run._source._read, list(explanations)).report()

    return make


def _bad(*steps, count=200):
    norms = [math.nan if step in steps else 1.0 for step in range(1, count + 1)]
    skipped = ["skipped_nonfinite" if math.isnan(norm) else "applied" for norm in norms]
    events = [
        Event(step, 1, kind, "a.weight", "a", 1.0, 0, "x", 1, 0, "SGD")
        for step in steps
        for kind in ("explained", "nan")
    ]
    return {"grad_norm": norms, "outcome": skipped, "events": events, "count": count}


def test_names_operation_module_line_examples_and_advice(report):
    """Title, evidence and advice are those of the explanation."""
    (finding,) = report(explanation(120), **_bad(120)).of_kind("nan")
    assert finding.title.startswith(f"NaN in 1 step, from step 120 on: {explanation().summary}")
    assert finding.advice == explanation().advice
    assert finding.explanation == explanation(120)
    assert finding.seen.parameters == ("a.weight",)


def test_is_in_every_form_of_the_report(report):
    """Text, HTML and JSON have file and line, source, module and what made it possible."""
    made = report(explanation(120), **_bad(120))
    joined = " ".join(str(made).split())
    for text in (joined, made._repr_html_()):
        assert "log in encoder.norm (Norm); /home/me/model.py:42: return scores.log()" in text
        assert "made possible by softmax; /home/me/model.py:39" in text.replace(
            "softmax, /home", "softmax; /home"
        )
        assert "examples 3, 17 of the batch" in text
        assert "Clamp the argument of the logarithm." in text
    data = json.loads(json.dumps(made.to_dict(), allow_nan=False))
    assert data["findings"][0]["explanation"]["line"] == 42
    assert data["findings"][0]["explanation"]["examples"] == [3, 17]


def test_comes_first_whatever_followed(report):
    """A skipped NaN is a warning, but once its line is known it stands above what is critical."""
    columns = _bad(120)
    columns["grad_norm"] = [
        norm if step < 150 else 500.0 for step, norm in enumerate(columns["grad_norm"])
    ]
    assert report(**columns).kinds[0] == "exploding"
    assert report(explanation(120), **columns).kinds[:2] == ("nan", "exploding")
    unknown = Explanation(step=120, optimizer="SGD", origin="not_found")
    assert report(unknown, **columns).kinds[0] == "exploding"


def test_what_was_not_found_changes_no_advice(report):
    """Without a cause the report says what it says without an explanation."""
    unknown = Explanation(step=120, optimizer="SGD", kind="nan", notes=("it drew other numbers",))
    (told,), (plain,) = (report(*one, **_bad(120)).of_kind("nan") for one in ([unknown], []))
    assert told.title == plain.title
    assert told.advice == plain.advice
    assert told.explanation == unknown


def test_the_first_that_names_a_cause_is_told(report):
    """Of several explanations the first with a cause, and the title says of which step it is."""
    unknown = Explanation(step=120, optimizer="SGD", origin="not_found")
    (finding,) = report(explanation(140), unknown, explanation(130), **_bad(120, 130, 140)).of_kind(
        "nan"
    )
    assert finding.explanation.step == 130
    assert "NaN in 3 steps, from step 120 on; in step 130: " in finding.title


def test_of_another_optimizer_is_not_mixed_in(report):
    """An explanation belongs to the steps of its optimizer."""
    (finding,) = report(explanation(120, optimizer="Adam"), **_bad(120)).of_kind("nan")
    assert finding.explanation is None


def test_of_a_step_that_left_the_memory(report):
    """A live run keeps the newest steps; what was explained before is told all the same."""
    made = report(explanation(120), first=1000)
    (finding,) = made.of_kind("nan")
    assert made.kinds[0] == "nan"
    assert finding.title == f"NaN in step 120: {explanation().summary}."
    assert finding.seen.steps == (120,)


def test_input_weights_and_candidates_are_told(report):
    """Each origin has its evidence in the line of what was seen."""
    cases = {
        "batch['image']": Explanation(origin="input", argument="batch['image']"),
        "a.running_mean": Explanation(origin="weights", parameter="a.running_mean"),
        "one of: log | sqrt": Explanation(
            origin="operation",
            candidates=(Explanation(operation="log"), Explanation(operation="sqrt")),
        ),
        "the backward of sqrt in the outermost module": Explanation(
            origin="operation", phase="backward", operation="sqrt", module=""
        ),
    }
    for text, one in cases.items():
        told = replace(one, step=120, optimizer="SGD")
        assert text in " ".join(str(report(told, **_bad(120))).split())


def test_overflow_names_the_largest(report):
    """Parameters with the largest share, and examples."""
    event = Event(120, 0, "overflow", "a.weight", "a", 1e39, 0, "x", 0, 0, "SGD")
    told = explanation(120, kind="overflow", **LARGEST)
    made = report(told, events=[event])
    (finding,) = made.of_kind("overflow")
    assert finding.seen.parameters == ("b.weight", "a.weight")
    assert "the largest gradient was that of b.weight" in finding.title
    text = " ".join(str(made).split())
    assert "largest: b.weight (90 %), a.weight (10 %)" in text
    assert "largest examples: 5 (80 %), 2 (5 %)" in text


def test_spike_names_the_largest(report):
    """The finding on spikes, and that on skipped steps, say which layer and which example."""
    norms = [1.0 + 0.01 * (step % 7) for step in range(200)]
    norms[119] = 1000.0
    outcome = ["applied"] * 200
    outcome[119] = "skipped_policy"
    told = explanation(120, kind="spike", origin="not_found", **LARGEST)
    made = report(told, grad_norm=norms, outcome=outcome)
    for kind in ("spike", "skipped"):
        (finding,) = made.of_kind(kind)
        assert finding.explanation == told
        assert finding.seen.parameters == ("b.weight", "a.weight")
    assert str(made).count("largest examples") == 2


def test_the_event_is_no_open_remark(report):
    """Events of kind explained are told by the finding."""
    assert "other events" not in str(report(explanation(120), **_bad(120)))


def test_hostile_text_is_escaped(report):
    """Names and source lines add no element, and break no line."""
    hostile = "<script>alert(1)</script>\x1b[2J\u202e"
    told = explanation(120, module=hostile, file=hostile, source=hostile, operation=hostile)
    made = report(told, **_bad(120))
    assert "<script>" not in made._repr_html_()
    assert str(made).replace("\n", "").isprintable()
