"""What is drawn: every spike and every NaN of a long run, and who is who where several are."""

from itertools import pairwise

import numpy as np
import pytest

from gradwatch.record.records import Event


def _labels(ax):
    legend = ax.get_legend()
    return [text.get_text() for text in legend.get_texts()] if legend else []


def _line(ax, start):
    return [line for line in ax.lines if str(line.get_label()).startswith(start)]


@pytest.fixture
def two(history):
    """Makes a run of two optimizers with clips of their own."""

    def make(first=1.0, second=1.0, count=200):
        turn = np.arange(count) % 2
        return history(
            count,
            step=[place // 2 + 1 for place in range(count)],
            optimizer=["Adam" if t else "Adam-1" for t in turn],
            grad_norm=np.where(turn, 3.0, 0.5),
            clipped=(turn == 1).tolist(),
            clip_threshold=np.where(turn, second, first),
        )

    return make


def test_one_spike_among_many_steps_is_drawn(history):
    """A long curve is thinned, and its largest and smallest norms stay."""
    norms = np.full(50_000, 1.0)
    norms[31_234], norms[40_000] = 77.0, 0.01
    ax = history(50_000, names=("a",), grad_norm=norms).plot_norms()
    drawn = np.concatenate([line.get_ydata() for line in ax.lines])
    assert {77.0, 0.01} <= set(drawn.tolist())
    assert max(len(line.get_xdata()) for line in ax.lines) < 5_000


def test_nan_steps_are_marked_and_counted(history):
    """A NaN has no place on the axis: it is marked above, in each pixel column that has one."""
    norms = np.ones(20_000)
    norms[[5, 9_999, 19_999]] = np.nan
    events = [Event(6, 1, "nan", "a", "", 1.0, 0, "NaN")]
    ax = history(20_000, names=("a",), grad_norm=norms, events=events).plot_norms()
    (marks,) = _line(ax, "NaN or Inf (3 steps)")
    assert marks.get_xdata().tolist() == [6, 10_000, 20_000]
    assert [text.get_text() for text in ax.child_axes[0].get_yticklabels()] == ["nan (1)"]


def test_a_threshold_that_all_share_is_one_line(two):
    """Two lines of one look on each other would say nothing."""
    run = two(1.0, 1.0)
    ax = run.plot_norms()
    assert _labels(ax).count("clip threshold") == 1
    assert not [label for label in _labels(ax) if ": clip threshold" in label]
    spread = run.plot_clipping().child_axes[1]
    assert _labels(spread).count("clip threshold") == 1


def test_thresholds_of_their_own_have_the_optimizers_colours(two):
    """Where limits differ, each has the name and the colour of its optimizer."""
    ax = two(1.0, 2.0).plot_norms()
    for name in ("Adam", "Adam-1"):
        (limit,), (norm,) = (
            _line(ax, f"{name}: clip threshold"),
            [
                line
                for line in ax.lines
                if line.get_label() in (f"{name}: before the clip", f"{name}: gradient norm")
            ],
        )
        assert limit.get_color() == norm.get_color()


def _quantiles(ax):
    return [text.get_text() for text in ax.texts if text.get_text().endswith("%")]


def test_quantiles_are_named_where_there_is_room(history, two):
    """Names that would lie on each other are left out, the median never."""
    wide = history(1_000, grad_norm=np.geomspace(0.01, 100, 1_000)).plot_clipping()
    assert _quantiles(wide.child_axes[1]) == ["1 %", "50 %", "99 %"]
    assert _quantiles(history(1).plot_clipping().child_axes[1]) == ["50 %"]
    assert _quantiles(two().plot_clipping().child_axes[1]) == []


@pytest.mark.parametrize(
    ("count", "clipped", "title"),
    [
        (1, 0, "none of 1 applied step"),
        (200, 0, "none of 200 applied steps"),
        (200, 50, "25 % of 200 applied steps"),
        (200, 200, "100 % of 200 applied steps"),
    ],
)
def test_the_title_says_how_often_the_clip_acted(history, count, clipped, title):
    """Never, sometimes or always, in numbers."""
    flags = [place < clipped for place in range(count)]
    ax = history(count, clipped=flags, clip_threshold=0.5, clip_coef=0.5).plot_clipping()
    assert ax.get_title(loc="left") == f"Clipping: {title}"


@pytest.mark.parametrize("count", [3, 300])
def test_names_of_rows_do_not_overlap(history, drawn, count):
    """Of three parameters each is named, of three hundred as many as can be read."""
    names = [f"layers.{place // 2}.{'bias' if place % 2 else 'weight'}" for place in range(count)]
    for kind in ("plot_flow", "plot_heatmap"):
        ax = drawn(getattr(history(10, names=names), kind)())
        boxes = [label.get_window_extent() for label in ax.get_yticklabels()]
        assert len(boxes) >= min(count, 60)
        assert all(one.y0 >= other.y1 - 1 for one, other in pairwise(boxes))
        assert all(box.x0 >= 0 for box in boxes)


def test_the_legend_does_not_lie_on_the_data(two, drawn):
    """It stands below the axes, inside the figure."""
    ax = drawn(two(1.0, 2.0).plot_norms())
    legend, figure = ax.get_legend().get_window_extent(), ax.figure.bbox
    assert legend.y1 < ax.get_window_extent().y0
    assert legend.x1 <= figure.x1
    assert legend.y0 >= figure.y0
