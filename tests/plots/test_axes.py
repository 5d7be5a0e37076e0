"""What can be read on the axes: steps, powers of ten, and numbers between where there are few."""

import numpy as np
import pytest
from matplotlib import pyplot as plt

KINDS = ("plot_norms", "plot_flow", "plot_heatmap", "plot_clipping")


def _texts(ticks):
    return [tick.get_text() for tick in ticks if tick.get_text()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 2, 5, 1000])
def test_steps_are_whole_numbers(history, drawn, kind, count):
    """An axis of steps names each step once, also where there is one step only."""
    ax = drawn(getattr(history(count), kind)())
    if kind == "plot_flow":
        return
    ax = ax.child_axes[0] if kind == "plot_clipping" else ax
    low, high = ax.get_xlim()
    ticks = [tick for tick in ax.get_xticks() if low <= tick <= high]
    assert ticks
    assert ticks == sorted(set(map(int, ticks)))


@pytest.mark.parametrize("low", [0.11, 0.5, 2.0])
def test_an_axis_of_less_than_two_powers_of_ten_can_be_read(history, drawn, low):
    """Two numbers or more stand on it, and they are written as a person writes them."""
    norms = np.geomspace(low, low * 4, 50)
    run = history(50, grad_norm=norms, norms=norms[:, None])
    ax = drawn(run.plot_norms())
    y = [t for t in ax.get_yticklabels(which="both") if t.get_text()]
    shown = [t for t in y if ax.get_ylim()[0] <= t.get_position()[1] <= ax.get_ylim()[1]]
    assert len(shown) >= 3
    minor = _texts(ax.get_yticklabels(minor=True))
    assert all(float(text) > 0 and len(text) <= 5 for text in minor)


def test_an_axis_of_many_powers_of_ten_has_no_numbers_between(history, drawn):
    """Where the powers of ten can be read, they are all that stands there."""
    ax = drawn(history(50, grad_norm=np.geomspace(1e-6, 1e3, 50)).plot_norms())
    assert not _texts(ax.get_yticklabels(minor=True))
    assert len(_texts(ax.get_yticklabels())) >= 3


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_run_says_so(history, drawn, kind):
    """Without steps there are axes, and the words that say why they are empty."""
    ax = drawn(getattr(history(0), kind)())
    assert "no steps yet" in [text.get_text() for text in ax.texts]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_a_run_without_a_positive_norm_is_drawn(history, drawn, kind, bad):
    """All NaN, all Inf and all zero are runs too."""
    nonfinite = 0 if bad == 0 else 2
    run = history(20, grad_norm=bad, norms=np.full((20, 2), bad), nonfinite_parameters=nonfinite)
    if np.isnan(bad):
        run = history(20, grad_norm=bad, nonfinite_parameters=2)
    drawn(getattr(run, kind)())


@pytest.mark.parametrize("kind", KINDS)
def test_an_axes_of_the_user_is_used(history, drawn, kind):
    """A figure of the user's own is drawn into, and none is made."""
    _, ax = plt.subplots()
    assert drawn(getattr(history(), kind)(ax)) is ax
    assert len(plt.get_fignums()) == 1
    with pytest.raises(TypeError, match="must be a matplotlib Axes, got list"):
        getattr(history(), kind)([ax])


@pytest.mark.parametrize("kind", KINDS)
def test_the_settings_of_matplotlib_are_left_alone(history, drawn, kind):
    """What the user has set before is as it was."""
    before = dict(plt.rcParams)
    drawn(getattr(history(), kind)())
    assert dict(plt.rcParams) == before


@pytest.mark.parametrize("kind", ["plot_flow", "plot_clipping"])
def test_areas_are_stronger_on_black(history, kind):
    """What is faint on white is not lost on a dark background."""
    run = history(
        100, grad_norm=np.geomspace(0.1, 10, 100), norms=np.geomspace(0.1, 1, 200).reshape(100, 2)
    )

    def alphas():
        ax = getattr(run, kind)()
        axes = [ax, *ax.child_axes]
        return [
            a.get_alpha() for one in axes for a in (*one.collections, *one.patches) if a.get_alpha()
        ]

    light = alphas()
    with plt.style.context("dark_background"):
        dark = alphas()
    assert light
    assert all(one < other for one, other in zip(light, dark, strict=True))
