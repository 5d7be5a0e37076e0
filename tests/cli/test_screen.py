"""The screen of tail, drawn into a terminal of a chosen width."""

import io
import math

import pytest

from gradwatch.cli.follower import Follower
from gradwatch.cli.screen import Screen
from gradwatch.cli.terminal import Output, width

from .runs import batch, nan_at, write

Console = pytest.importorskip("rich.console", reason="gradwatch[runs] installs it").Console


@pytest.fixture
def screen(tmp_path):
    """Draws a run once; returns the lines."""

    def draw(columns, *batches, name="run"):
        write(tmp_path / "run", *batches)
        view, follower = Screen(Output(None), name, 10), Follower(tmp_path / "run")
        follower.look()
        shown = io.StringIO()
        view._console = Console(file=shown, width=columns, height=40, color_system=None)
        view._console.print(*view._parts(follower), sep="\n")
        return shown.getvalue().splitlines()

    return draw


def _table(lines):
    head = next(
        place for place, line in enumerate(lines) if line.split()[:1] in (["step"], ["optimizer"])
    )
    return lines[head], lines[head + 1 :]


@pytest.mark.parametrize("columns", [30, 40, 60, 80, 200])
def test_no_number_is_cut(screen, columns):
    """A column that does not fit is left out: a number without its end is another number."""
    one = batch(range(1, 200), norm=0.00123456, events=[nan_at(7)])
    lines = screen(columns, one)
    assert all(width(line) <= columns for line in lines)
    header, rows = _table(lines)
    assert "…" not in header
    assert all("0.001235" in row and "…" not in row for row in rows[:10])


@pytest.mark.parametrize("columns", [30, 40, 80, 200])
def test_the_step_stands_beside_the_run(screen, columns):
    """Where both do not fit into a line, the middle of the run's path is left out."""
    first = screen(columns, batch([19_999, 20_000]), name="/a/long/path" * 20 + "/the_run")[0]
    assert width(first) <= columns
    assert first.endswith("_run  step 20,000")
    assert "..." in first


def test_columns_that_say_nothing_are_left_out(screen):
    """Without a loss, a clip or a rate, the table has none of them."""
    header, _ = _table(screen(200, batch(range(1, 20))))
    assert header.split() == ["step", "norm", "outcome"]


def test_each_optimizer_has_its_curve(screen):
    """Norms of two optimizers in one curve would be a zigzag."""
    lines = screen(
        80, batch(range(1, 20), optimizer="G"), batch(range(1, 20), optimizer="D", norm=50.0)
    )
    curves = [line for line in lines if line.startswith("norm")]
    assert [line.split()[1] for line in curves] == ["G", "D"]
    assert [line.split()[-3:] for line in curves] == [["1", "to", "1"], ["50", "to", "50"]]


@pytest.mark.parametrize("norm", [math.nan, math.inf, 0.0])
def test_norms_without_a_place_on_the_curve(screen, norm):
    """All NaN, all Inf and all zero are shown."""
    assert any(line.startswith("norm ") for line in screen(60, batch(range(1, 5), norm=norm)))
