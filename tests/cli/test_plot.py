"""`gradwatch plot`."""

import json
import sys

import pytest

from gradwatch.cli.plot import KINDS

STARTS = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("run", ["good", "sick", "hostile"])
def test_draws_each_kind(command, runs, run, kind):
    """Each kind of each run becomes a picture, whatever the parameters are called."""
    ran = command("plot", run, "-o", "x.png", "--kind", kind, "--dpi", "40")
    assert ran == (0, f"Wrote x.png ({kind})\n", "")
    assert (runs / "x.png").read_bytes().startswith(STARTS["png"])


@pytest.mark.parametrize("suffix", STARTS)
def test_the_suffix_is_the_format(command, runs, suffix):
    """.png, .svg and .pdf are what they say."""
    assert command("plot", "good", "-o", f"x.{suffix.upper()}").code == 0
    assert (runs / f"x.{suffix.upper()}").read_bytes().startswith(STARTS[suffix])


def test_json_tells_what_was_written(command, runs):
    """--json prints the file and the kind."""
    content = json.loads(command("plot", "good", "-o", "x.png", "--json").out)
    size = (runs / "x.png").stat().st_size
    assert content == {"run": "good", "kind": "norms", "file": "x.png", "bytes": size}


def test_without_steps_there_is_nothing_to_draw(command, runs):
    """A run without steps is refused, and no file is written."""
    (part,) = (runs / "good" / "steps").iterdir()
    part.unlink()
    ran = command("plot", "good", "-o", "x.png")
    assert ran.code == 2
    assert "has no steps yet" in ran.err
    assert not (runs / "x.png").exists()


def test_without_matplotlib_it_says_what_to_install(command, runs, monkeypatch):
    """A missing matplotlib is one line with the command that installs it."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    ran = command("plot", "good", "-o", "x.png")
    assert ran.code == 2
    assert ran.err.endswith("pip install 'gradwatch[plot]'\n")
    assert ran.err.count("\n") == 1


def test_never_over_the_run_itself(command, runs):
    """A picture among the parts of the run is refused."""
    assert command("plot", "good", "-o", "good/steps/x.png").code == 2


def test_a_range_of_steps(command, runs, monkeypatch):
    """--start and --stop choose the steps, as in History.plot_norms()."""
    seen = []
    monkeypatch.setattr("gradwatch.plots.norms.step_axis", lambda ax, *of: seen.append(of))
    ran = command("plot", "good", "-o", "x.png", "--start", "20", "--stop", "31")
    assert (ran.code, seen) == (0, [(20, 30)])


def test_a_range_without_a_step(command, runs):
    """A range that the run does not have is told with the one that it has."""
    ran = command("plot", "good", "-o", "x.png", "--start", "500")
    assert (ran.code, ran.out) == (2, "")
    assert ran.err == (
        "gradwatch plot: 'good' has no step from 500 to the end: it has steps 1 to 100.\n"
    )
