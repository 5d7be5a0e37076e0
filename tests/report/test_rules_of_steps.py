"""Rules over steps: each on both sides of its threshold."""

import math

import numpy as np
import pytest

from gradwatch.record.events import same_data_event
from gradwatch.record.records import Event, StepRecord

NAN = math.nan


def _bad(count, first, outcome="applied", **more):
    """Makes columns of steps that are not finite from ``first`` on."""
    bad = [step >= first for step in range(1, count + 1)]
    return {
        "grad_norm": [NAN if b else 1.0 for b in bad],
        "nonfinite_parameters": [int(b) for b in bad],
        "outcome": [outcome if b else "applied" for b in bad],
    } | more


def _event(step, kind="nan", **more):
    fields = {"micro_batch": 2, "parameter": "b.weight", "module": "b", "value": 3.0, "rank": 0}
    return Event(step=step, kind=kind, message="", optimizer="SGD", **(fields | more))


def test_a_steady_run_is_silent(kinds):
    """Norms around 1 that are applied and unclipped are no finding."""
    noise = np.exp(0.3 * np.random.default_rng(0).standard_normal(500))
    assert kinds(500, grad_norm=noise) == ()


def test_nan_names_the_first_offender(history):
    """Step, parameter, micro-batch and rank are those of the first bad step's event."""
    events = [_event(150, rank=3), _event(151, parameter="a.weight")]
    (finding,) = history(200, **_bad(200, 150), micro_batches=2, events=events).report()
    assert (finding.kind, finding.severity) == ("nan", "critical")
    assert finding.seen.parameters == ("b.weight",)
    assert finding.seen.steps[0] == 150
    assert "micro-batch 2, rank 3" in finding.title
    assert finding.seen.numbers["applied"] == 51
    assert "single bad batch" in finding.advice


def test_kind_of_an_inf_is_inf(kinds):
    """So that ``--fail-on nan`` and ``--fail-on inf`` differ."""
    assert kinds(30, **_bad(30, 20), events=[_event(20, "inf")]) == ("inf",)


def test_nan_after_a_rise_blames_the_learning_rate(history):
    """Norms that grew ten times before it are the cause."""
    columns = _bad(30, 25)
    columns["grad_norm"][20:24] = [2.0, 5.0, 9.0, 11.0]
    assert "diverged" in history(30, **columns).report().of_kind("nan")[0].advice
    columns["grad_norm"][23] = 9.0
    assert "single bad batch" in history(30, **columns).report().of_kind("nan")[0].advice


def test_nan_from_the_first_step_on_blames_the_start(history):
    """There is nothing before it to compare with."""
    (finding,) = history(5, **_bad(5, 1), events=[_event(1)]).report()
    assert "in the first step" in finding.advice
    assert "names the line" in finding.advice


def test_nan_under_a_loss_scale_blames_the_scale(history):
    """Where the scaler has not left the step out itself."""
    (finding,) = history(30, **_bad(30, 30), loss_scale=1024.0).report()
    assert "multiplied by 1,024" in finding.advice


def test_nan_that_was_skipped_is_a_warning(history):
    """The weights were spared."""
    first, *rest = history(200, **_bad(200, 200, "skipped_nonfinite")).report()
    assert (first.kind, first.severity) == ("nan", "warning")
    assert [finding.severity for finding in rest] == ["note"]


def test_steps_that_a_scaler_skipped_are_its_daily_work(kinds):
    """A few of them are no finding, neither as NaN nor as skipped."""
    assert kinds(200, **_bad(200, 190, "skipped_scaler"), loss_scale=1024.0) == ()
    assert kinds(200, **_bad(200, 180, "skipped_scaler"), loss_scale=1024.0) == ("skipped",)


@pytest.mark.parametrize(("factor", "found"), [(95.0, ()), (105.0, ("exploding",))])
def test_growth_beyond_a_hundred_is_exploding(kinds, factor, found):
    """Compared are medians of five steps with the start."""
    assert kinds(100, grad_norm=[1.0] * 50 + [factor] * 50) == found


def test_last_norm_before_a_nan_counts_alone(kinds):
    """There is nothing after it that could tell whether it was a spike."""
    columns = _bad(6, 4)
    columns["grad_norm"][:3] = [0.5, 8.0, 500.0]
    assert kinds(6, **columns) == ("nan", "exploding")


def test_limit_of_the_user_is_exploding_as_well(history):
    """Events of ``exploding_norm`` become one finding with the worst step."""
    events = [_event(40, "exploding", value=6.0), _event(60, "exploding", value=9.0)]
    (finding,) = history(100, events=events).report()
    assert (finding.kind, finding.severity) == ("exploding", "warning")
    assert finding.seen.numbers == {"steps": 2.0, "largest": 9.0}


@pytest.mark.parametrize(("size", "found"), [(4.5, ()), (5.5, ("unstable_start",))])
def test_norm_that_leaps_within_the_first_steps(kinds, size, found):
    """Five times, though it comes down again; of later steps it is said by other rules."""
    norms = [1.0, 1.0, size, 1.0, *[1.0] * 96]
    assert kinds(100, grad_norm=norms) == found
    assert kinds(100, grad_norm=norms, first=2) == ()


def test_leap_beyond_an_explosion_is_critical(history):
    """Even if the norms come down at once."""
    (finding,) = (
        history(100, grad_norm=[1.0, 1.0, 101.0, *[1.0] * 97]).report().of_kind("unstable_start")
    )
    assert finding.severity == "critical"


@pytest.mark.parametrize(
    ("start", "end", "found"),
    [(2.0, 3.9, ()), (2.0, 4.1, ("loss_rising",)), (-1.0, 5.0, ()), (2.0, 0.1, ())],
)
def test_loss_that_ends_at_twice_its_start(kinds, start, end, found):
    """Losses below zero have no factor, and are left alone."""
    assert kinds(100, loss=[start] * 50 + [end] * 50) == found


@pytest.mark.parametrize(("size", "found"), [(9.5, ()), (10.5, ("spike",))])
def test_spike_is_ten_times_the_usual_norm(kinds, size, found):
    """One step of two hundred."""
    assert kinds(200, grad_norm=[1.0] * 100 + [size] + [1.0] * 99) == found


def test_wild_norms_have_no_spikes(kinds):
    """Six deviations are asked for as well."""
    logs = 1.2 * np.random.default_rng(1).standard_normal(640)
    logs[300] = math.log(30.0)
    assert "spike" not in kinds(640, grad_norm=np.exp(logs))


def test_rise_that_lasts_is_no_spike(kinds):
    """Nor its first steps."""
    assert kinds(200, grad_norm=[1.0] * 105 + [30.0] * 95) == ()


def test_clipped_spike_is_a_note(history):
    """It did no harm."""
    norms, clipped = [1.0] * 200, [False] * 200
    norms[100], clipped[100] = 50.0, True
    (finding,) = history(200, grad_norm=norms, clipped=clipped, clip_threshold=5.0).report()
    assert (finding.kind, finding.severity) == ("spike", "note")
    assert finding.seen.steps == (101,)


def test_skipped_steps_are_counted(history):
    """One in a hundred is a note, more are a warning."""
    outcome = ["applied"] * 200
    outcome[50] = outcome[60] = "skipped_policy"
    (finding,) = history(200, outcome=outcome).report()
    assert (finding.kind, finding.severity, finding.seen.steps) == ("skipped", "note", (51, 61))
    outcome[70] = "skipped_policy"
    assert history(200, outcome=outcome).report().findings[0].severity == "warning"


def test_clip_on_most_steps_comes_with_a_better_limit(history):
    """The 95th and 99th percentile of the norms clip 5 and 1 %."""
    norms = np.linspace(1.0, 2.0, 101)
    columns = {"grad_norm": norms, "grad_norm_clipped": 0.5, "clip_threshold": 0.5}
    (finding,) = history(101, clipped=True, **columns).report()
    assert finding.kind == "clip_always"
    assert finding.seen.numbers["clips_5_percent"] == pytest.approx(1.95)
    assert finding.seen.numbers["clips_1_percent"] == pytest.approx(1.99)
    half = [step % 2 == 0 for step in range(100)]
    assert not history(100, clipped=half, clip_threshold=0.5).report()


def test_limit_of_elements_gets_no_other_limit(history):
    """The norms say nothing about a limit for elements."""
    columns = {"grad_norm": 2.0, "grad_norm_clipped": 1.4, "clip_threshold": 0.1}
    (finding,) = history(200, clipped=True, **columns).report()
    assert "clips_5_percent" not in finding.seen.numbers


@pytest.mark.parametrize(("limit", "found"), [(2.9, ()), (3.1, ("clip_never",))])
def test_clip_far_above_all_norms(kinds, limit, found):
    """Three times the largest norm protects from nothing."""
    assert kinds(200, clip_threshold=limit) == found


@pytest.mark.parametrize(("last", "found"), [(2.0**-3, ()), (2.0**-4, ("loss_scale",))])
def test_loss_scale_of_twenty_halvings_has_collapsed(kinds, last, found):
    """From 65,536 down."""
    assert kinds(40, loss_scale=[2.0**16] * 20 + [last] * 20) == found


@pytest.mark.parametrize(
    ("scale", "error", "found"),
    [
        (700.0, 40.0, ("batch_small",)),
        (700.0, 40.0 + 40.0, ()),
        (300.0, 10.0, ()),
        (5.0, 0.5, ("batch_large",)),
        (5.0, 1.0, ()),
        (700.0, NAN, ()),
    ],
)
def test_noise_scale_far_from_the_batch(kinds, scale, error, found):
    """Ten times, with two standard errors to spare."""
    columns = {"noise_scale": scale, "noise_scale_stderr": error, "weight": 61.0}
    assert kinds(100, **columns) == found


@pytest.mark.parametrize(
    ("low", "high", "title"),
    [
        (640.0, 900.0, "a noise scale of 700 ± 40."),
        (640.0, math.inf, "a noise scale of at least 640."),
        (600.0, math.inf, None),
    ],
)
def test_noise_scale_that_is_at_least_far_from_the_batch(history, low, high, title):
    """Its whole interval is far from the batch; where the upper end is not known, it says so."""
    columns = {"noise_scale": 700.0, "noise_scale_stderr": 40.0, "weight": 61.0}
    ends = {"noise_scale_low": low, "noise_scale_high": high}
    found = history(100, **columns, **ends).report().findings
    assert [one.title.partition("with ")[2] for one in found] == ([title] if title else [])


@pytest.mark.parametrize(("local", "found"), [(0.55, ()), (0.45, ("rank",))])
def test_mean_over_ranks_above_this_ranks_own(kinds, local, found):
    """Twice as large cannot come from ranks that are alike."""
    assert kinds(100, grad_norm_local=local) == found


def _same_data(step=10):
    return same_data_event(StepRecord(step, "SGD"), 10, 2)


@pytest.mark.parametrize("newest", [1.0, 0.99])
def test_ranks_with_the_same_data_are_no_batch_too_large(history, newest):
    """The noise scale of equal gradients is 0, and says nothing; different data end it."""
    local = np.r_[np.ones(99), newest]
    columns = {"noise_scale": 0.1, "noise_scale_stderr": 0.01, "weight": 61.0}
    found = history(100, grad_norm_local=local, events=[_same_data()], **columns).report()
    expected = ["same_data"] if newest == 1.0 else ["batch_large"]
    assert [finding.kind for finding in found.findings] == expected


def test_equal_norms_alone_do_not_show_the_same_data(kinds):
    """They are equal where nobody averages, too."""
    assert kinds(100, grad_norm_local=1.0) == ()


def test_norm_on_a_line_from_step_one_is_a_forgotten_zero_grad(kinds):
    """Five times in twelve steps, with some noise."""
    wobble = 0.05 * np.random.default_rng(0).standard_normal(40)
    line = 0.6 + 0.4 * np.arange(40) + wobble
    assert kinds(40, grad_norm=line) == ("accumulating",)
    assert kinds(40, grad_norm=line, first=5) == ()
    assert kinds(40, grad_norm=0.6 + 0.1 * np.arange(40)) == ()


def test_growth_by_a_factor_is_no_line(kinds):
    """It is a training that diverges."""
    assert "accumulating" not in kinds(40, grad_norm=1.3 ** np.arange(40))


def test_few_steps_are_said_to_be_few(history):
    """Rules that compare medians hold back, and a remark says so."""
    report = history(19, grad_norm=1.0 + np.arange(19)).report()
    assert not report
    assert report.remarks[0].startswith("Few steps (19")


def test_optimizers_are_judged_apart(history):
    """Interleaved steps of two: one of them explodes."""
    labels = ["G", "D"] * 50
    norms = [
        1.0 if name == "G" else (1.0 if row < 50 else 500.0) for row, name in enumerate(labels)
    ]
    (finding,) = history(100, optimizer=labels, grad_norm=norms).report()
    assert (finding.kind, finding.seen.optimizer) == ("exploding", "D")
