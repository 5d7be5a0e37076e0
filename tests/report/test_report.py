"""The report: order, truth, text, HTML and data."""

import json
import math
import sys

import numpy as np
import pytest

from gradwatch.record.records import Event
from gradwatch.report import KINDS, Evidence, Finding, Report, Thresholds
from gradwatch.report.finding import SEVERITIES
from gradwatch.report.rules import ALWAYS, RULES
from tests.support import processes

HOSTILE = "<script>alert('x')</script>&[bold red]\x1b[2J\u202e.weight"


@pytest.fixture
def report():
    """A report with a finding whose every text is hostile."""
    seen = Evidence((1, 2), (HOSTILE,), {"ratio": math.nan, "size": math.inf}, HOSTILE)
    finding = Finding("nan", "critical", HOSTILE, seen, HOSTILE, HOSTILE)
    return Report((finding,), 2, 1, (HOSTILE,))


def test_empty_history(history):
    """Nothing is found, and a remark says why."""
    report = history(0).report()
    assert not report
    assert (report.kinds, report.steps, len(report)) == ((), 0, 0)
    assert "Nothing was found" in str(report)
    assert report.remarks == ("There is no step in this run yet.",)


def test_every_rule_runs_once():
    """In short and long runs alike; the rules of short runs are among those of long ones."""
    assert len(set(RULES)) == len(RULES)
    assert len(set(ALWAYS)) == len(ALWAYS)
    assert set(ALWAYS) <= set(RULES)


def test_one_step(history):
    """Is too few to say much."""
    report = history(1).report()
    assert not report
    assert "Few steps (1;" in str(report)


def test_findings_are_ordered_by_weight(history):
    """Critical ones first, then warnings, then notes."""
    outcome = ["applied"] * 199 + ["skipped_policy"]
    norms = [1.0] * 100 + [500.0] * 100
    run = history(200, outcome=outcome, grad_norm=norms, grad_norm_local=0.2)
    report = run.report()
    assert report.kinds == ("exploding", "rank", "skipped")
    severities = [SEVERITIES.index(finding.severity) for finding in report]
    assert severities == sorted(severities)
    assert bool(report) is True
    assert set(report.kinds) <= set(KINDS)


def test_text_has_evidence_reason_and_advice(history):
    """And lines of at most 100 columns."""
    text = str(history(200, grad_norm=[1.0] * 100 + [500.0] * 100).report())
    assert "1. [critical] exploding: The gradient norm grew 500 times" in text
    for label in ("seen:", "why:", "try:"):
        assert label in text
    assert max(map(len, text.splitlines())) <= 100


def test_text_obeys_no_name(report):
    """Escape sequences and marks of direction are shown as their codes."""
    for text in (str(report), report._repr_html_()):
        assert "\x1b" not in text
        assert "\u202e" not in text
    assert r"\x1b[2J\u202e" in str(report)


def test_html_escapes_everything(report):
    """No tag of a name survives."""
    html = report._repr_html_()
    assert "<script" not in html
    assert "&lt;script&gt;" in html


def test_rich_shows_names_as_they_are(report):
    """Brackets in them are no markup, and no escape sequence is sent on."""
    console = pytest.importorskip("rich.console").Console(width=300, force_terminal=True)
    with console.capture() as capture:
        console.print(report)
    assert "[bold red]" in capture.get()
    assert "\x1b[2J" not in capture.get()


def test_text_needs_no_rich(report, monkeypatch):
    """``str()`` and HTML do without it."""
    monkeypatch.setitem(sys.modules, "rich", None)
    assert str(report)
    assert report._repr_html_()


def test_report_and_flow_need_no_extra():
    """Neither rich nor matplotlib need be installed for findings and the table of the flow."""
    code = (
        "import sys; sys.modules.update(rich=None, matplotlib=None); import numpy as np\n"
        "from gradwatch import History, RecordBatch, StepRecord\n"
        "from gradwatch.record.records import Layout\n"
        "one = np.ones((1, 1)); layout = Layout(('w',), ('',))\n"
        "history = History(lambda: RecordBatch(layout, [StepRecord(1)], one, one))\n"
        "print(len(history.report()), len(history.flow()))"
    )
    ran = processes.run(code=code)
    assert (ran.stdout.split(), ran.stderr) == (["0", "1"], "")


def test_data_is_json_without_nan(report):
    """What is not finite is None."""
    data = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert data["findings"][0]["seen"]["numbers"] == {"ratio": None, "size": None}
    assert data["findings"][0]["seen"]["parameters"] == [HOSTILE]
    assert data["kinds"] == ["nan"]


def test_every_real_finding_is_json(history):
    """NumPy scalars have become Python's."""
    events = [Event(150, 1, "nan", "a.weight", "a", 1.0, 0, "", optimizer="SGD")]
    norms = [1.0] * 100 + [400.0] * 49 + [math.nan] * 51
    run = history(
        200,
        grad_norm=norms,
        nonfinite_parameters=[0] * 149 + [1] * 51,
        events=events,
        grad_norm_local=0.2,
        clipped=True,
        clip_threshold=0.1,
        grad_norm_clipped=0.1,
        statistics={"update_ratio": np.full(2, 0.2)},
        loss=[1.0] * 100 + [9.0] * 100,
    )
    data = run.report().to_dict()
    assert len(data["kinds"]) >= 5
    json.dumps(data, allow_nan=False)


def test_hostile_names_run_through(history):
    """Lone surrogates, which no file can hold, are named by their codes."""
    run = history(names=(HOSTILE, "b\udc80.weight"), norms=[0.0, 0.0])
    (finding,) = run.report()
    assert finding.kind == "zero_gradient"
    assert str(run.report()).encode()


def test_thresholds_are_the_users(history):
    """As an object, or by name."""
    run = history(200, grad_norm=[1.0] * 100 + [50.0] * 100)
    assert not run.report()
    assert run.report(Thresholds(exploding=20.0)).kinds == ("exploding",)
    assert run.report(exploding=20.0).kinds == ("exploding",)
    assert not run.report(Thresholds(exploding=20.0), exploding=60.0)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"spike": 0}, ValueError, r"Thresholds\(spike=\) must be positive and finite, got 0"),
        ({"spike": math.nan}, ValueError, "positive and finite, got nan"),
        ({"spike": "much"}, TypeError, "must be a number, got 'much'"),
        ({"few_steps": 2.5}, TypeError, "must be an integer, got 2.5"),
        ({"clip_often": 1.5}, ValueError, "is a share and must be at most 1, got 1.5"),
        ({"spikes": 3}, TypeError, "spikes"),
        ({"thresholds": {"spike": 3}}, TypeError, "must be gradwatch.Thresholds"),
    ],
)
def test_bad_thresholds_are_refused(history, changes, error, text):
    """With name, bound and value."""
    with pytest.raises(error, match=text):
        history(30).report(**changes)


def test_missing_first_steps_are_remarked(history):
    """Norms at the start are those of later steps then."""
    assert any("up to step 500" in remark for remark in history(30, first=501).report().remarks)


def test_history_without_parameters(history):
    """A layout with nothing in it is no error."""
    assert not history(30, names=(), shapes=()).report()
