"""Rules over parameters: each on both sides of its threshold."""

import math

import numpy as np
import pytest

from gradwatch.record.records import Event

NAN = math.nan
DEEP = tuple(f"{number}.weight" for number in range(10))


@pytest.mark.parametrize(("factor", "found"), [(0.4, ()), (0.2, ("vanishing",))])
def test_norms_that_fall_layer_by_layer(kinds, factor, found):
    """A factor of 0.4 over ten layers is 1e-3 between the ends, one of 0.2 is 1e-5."""
    norms = factor ** np.arange(9, -1, -1)
    assert kinds(names=DEEP, norms=norms) == found


def test_norms_are_compared_per_element(kinds):
    """A layer of a million elements has a larger norm than one of a hundred."""
    shapes = [(1, 10 ** (2 * number)) for number in range(10)]
    norms = 10.0 ** np.arange(10)
    assert kinds(names=DEEP, shapes=shapes, norms=norms) == ()


def test_one_weak_layer_is_no_vanishing_gradient(kinds):
    """An embedding of rare words, say; nor are seven layers a trend."""
    assert kinds(names=DEEP, norms=[1e-9, 1e-9, *[1.0] * 8]) == ()
    assert kinds(names=DEEP[:7], norms=0.1 ** np.arange(6, -1, -1)) == ()


def test_biases_do_not_count_for_depth(kinds):
    """A bias before a normalisation has no gradient but rounding."""
    names = [f"{n}.{part}" for n in range(10) for part in ("weight", "bias")]
    shapes = [(8, 8), (8,)] * 10
    norms = [number for n in range(10) for number in (1.0, 10.0 ** (n - 15))]
    assert kinds(names=names, shapes=shapes, norms=norms) == ()


@pytest.mark.parametrize(("share", "found"), [(0.49, ()), (0.5, ("zero_gradient",))])
def test_gradient_of_zero_in_half_of_the_steps(kinds, share, found):
    """Exactly zero, not merely small."""
    zero = np.arange(200) < 200 * share
    assert kinds(norms=np.stack([np.where(zero, 0.0, 1.0), np.ones(200)], 1)) == found
    assert kinds(norms=np.stack([np.where(zero, 1e-30, 1.0), np.ones(200)], 1)) == ()


@pytest.mark.parametrize(("share", "found"), [(0.65, ()), (0.75, ("dead_units",))])
def test_units_of_a_layer_that_are_off(history, share, found):
    """Told by the bias; the zeros of an embedding are none."""
    run = history(
        names=("words.weight", "0.weight", "0.bias"),
        shapes=[(100, 8), (8, 8), (8,)],
        statistics={"zeros": [0.99, share, share]},
    )
    report = run.report()
    assert report.kinds == found
    if found:
        assert report.findings[0].seen.parameters == ("0.bias",)


def _missing(parameter, step=1):
    return Event(step, 0, "no_gradient", parameter, "", 0.0, 0, "", optimizer="SGD")


def test_parameter_without_a_gradient(history):
    """Named where an event says that it should have one, and it never came."""
    run = history(norms=[NAN, 1.0], events=[_missing("a.weight")])
    (finding,) = run.report()
    assert (finding.kind, finding.seen.parameters) == ("no_gradient", ("a.weight",))
    assert "never received" in finding.title


def test_frozen_parameter_is_no_finding(kinds):
    """It does not require a gradient, so that no event tells of it."""
    assert kinds(norms=[NAN, 1.0]) == ()


def test_gradient_that_comes_now_and_then_is_enough(kinds, history):
    """A seldom chosen expert; one that is never chosen again is told of."""
    rare = np.where(np.arange(200) % 20 == 0, 1.0, NAN)
    early = np.where(np.arange(200) < 50, 1.0, NAN)
    norms = np.stack([rare, np.ones(200)], 1)
    assert kinds(norms=norms, events=[_missing("a.weight", 2)]) == ()
    norms = np.stack([early, np.ones(200)], 1)
    (finding,) = history(norms=norms, events=[_missing("a.weight", 51)]).report()
    assert "second half" in finding.title


@pytest.mark.parametrize(
    ("ratio", "found"),
    [
        (0.09, ()),
        (0.11, ("update_large",)),
        (2e-6, ()),
        (5e-7, ("update_small",)),
        (0.0, ()),
        (NAN, ()),
    ],
)
def test_updates_out_of_proportion(kinds, ratio, found):
    """Around 1e-3 is usual; a ratio of zero is a rate of zero, and meant."""
    assert kinds(statistics={"update_ratio": [ratio, ratio]}) == found


def test_first_step_that_replaces_the_weights(kinds):
    """One leap is enough."""
    ratios = np.full((200, 2), 1e-3)
    ratios[0] = 0.6
    assert kinds(statistics={"update_ratio": ratios}) == ("update_large",)


def test_schedule_that_ends_at_zero_is_meant(kinds):
    """Small updates at the end only are no finding."""
    ratios = 1e-3 * np.repeat(np.linspace(1, 0, 200)[:, None] ** 3, 2, axis=1)
    assert kinds(statistics={"update_ratio": ratios}) == ()


def test_statistics_between_the_sampled_ranges_are_found(history):
    """Of every 100th step, where ranges of two steps are sampled."""
    ratios = np.full((1000, 2), NAN)
    ratios[99::100] = 0.2
    report = history(1000, statistics={"update_ratio": ratios}).report(sample_steps=2)
    assert report.kinds == ("update_large",)


def _half_norms(generator, scale):
    gradients = np.float32(scale * generator.standard_normal((200, 2, 64)))
    return np.sqrt((gradients.astype(np.float16).astype(np.float32) ** 2).sum(-1))


def test_float16_is_told_by_whole_numbers(kinds):
    """Squares of small norms are whole numbers of 2**-48; those of float32 gradients are not."""
    generator = np.random.default_rng(0)
    norms = _half_norms(generator, 1e-7)
    assert kinds(norms=norms) == ("half_precision",)
    assert kinds(norms=norms, loss_scale=1024.0) == ()
    assert kinds(norms=1e-7 * generator.random((200, 2))) == ()
    assert kinds(norms=_half_norms(generator, 1e-3)) == ()


def test_sample_is_as_large_as_asked(history):
    """Eight ranges of four steps, for a model of any size."""
    asked = []
    run = history(1000)
    read = run._source.parameters

    def parameters(indices, columns, span):
        asked.append(span)
        return read(indices, columns, span)

    run._source.parameters = parameters
    run.report(sample_rows=64)
    assert [span.stop - span.start for span in asked] == [4] * 8
    assert (asked[0].start, asked[-1].stop) == (1, 1001)
