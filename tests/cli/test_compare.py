"""`gradwatch compare`."""

import json

import pytest

from gradwatch.cli import differences

from .runs import batch, nan_at, train, write


@pytest.fixture
def compared(command):
    """Compares two runs as JSON."""

    def run(a, b):
        return json.loads(command("compare", a, b, "--json").out)

    return run


def test_a_run_with_itself(command, runs, compared):
    """A run does not differ from itself, NaN included."""
    ran = command("compare", "sick", "sick")
    assert "120 steps in both, with the same numbers in each of them." in ran.out
    assert "By step" not in ran.out
    assert "By parameter" not in ran.out
    assert compared("sick", "sick")["steps"]["first_step"] is None


def test_where_two_runs_part(runs, compared):
    """Two runs that began alike differ from the step on that a NaN was in."""
    train("twin", nan=40)
    found = compared("good", "twin")["steps"]
    assert found["common"] == 100
    assert found["first_step"] == 40
    assert found["first_columns"][:2] == ["grad_norm", "grad_norm_clipped"]


def test_settings_that_differ(command, runs, compared):
    """The learning rate and the clip are named with both values."""
    settings = compared("good", "sick")["settings"]
    assert settings["optimizers.0.groups.0.lr"] == [0.05, 0.2]
    assert "options.clip" in settings
    assert "optimizers.0.groups.0.lr  0.05 in A, 0.2 in B" in command("compare", "good", "sick").out


def test_totals(runs, compared):
    """Steps, skipped steps and events of both stand beside each other."""
    totals = compared("good", "sick")["totals"]
    assert totals["steps"] == [100, 120]
    assert totals["skipped"] == [0, 1]
    assert totals["events: nan"] == [0, 1]


def test_by_parameter_the_largest_difference_comes_first(command, tmp_path, compared):
    """Ratios are those of the norms; a parameter of one run only is named."""
    a = write(tmp_path / "a", batch(range(1, 11), ("x", "y", "mine")))
    b = batch(range(1, 21), ("y", "x", "theirs"))
    b.norms[:, 0] *= 10
    write(tmp_path / "b", b)
    found = compared(a.path, tmp_path / "b")["parameters"]
    assert [one["parameter"] for one in found["parameters"]] == ["y", "x"]
    assert [one["ratio"] for one in found["parameters"]] == pytest.approx([5.0, 2.0])
    assert [one["steps"] for one in found["parameters"]] == [10, 10]
    assert (found["only_a"], found["only_b"]) == (["mine"], ["theirs"])
    text = command("compare", a.path, tmp_path / "b").out
    assert "Only in A: mine" in text
    assert "Only in B: theirs" in text


def test_a_step_that_is_far_off_is_named(tmp_path, compared):
    """The step at which a norm differs most is told with both numbers."""
    a, b = batch(range(1, 101)), batch(range(1, 101))
    b.norms[41, 1] = 500.0
    write(tmp_path / "a", a)
    write(tmp_path / "b", b)
    first = compared(tmp_path / "a", tmp_path / "b")["parameters"]["parameters"][0]
    assert first["parameter"] == "b"
    assert (first["largest_step"], first["largest_a"], first["largest_b"]) == (42, 2.0, 500.0)


def test_optimizers_are_matched_by_their_order(tmp_path, compared):
    """SGD is compared with AdamW where each is the only optimizer."""
    write(tmp_path / "a", batch(range(1, 11), optimizer="SGD"))
    write(tmp_path / "b", batch(range(1, 11), optimizer="AdamW"))
    assert compared(tmp_path / "a", tmp_path / "b")["steps"]["common"] == 10


def test_no_step_in_common(command, tmp_path):
    """Runs without a common step are compared by what is left."""
    write(tmp_path / "a", batch(range(1, 11)))
    write(tmp_path / "b", batch(range(50, 61), events=[nan_at(55)]))
    ran = command("compare", tmp_path / "a", tmp_path / "b")
    assert ran.code == 0
    assert "no step in common" in ran.out


def test_a_long_run_is_sampled(command, runs, compared, monkeypatch):
    """Of a run with more rows than are to be read, ranges from first to last are, and it says so."""
    whole = compared("good", "sick")["parameters"]
    monkeypatch.setattr(differences, "ROWS", 8)
    sampled = compared("good", "sick")["parameters"]
    assert (whole["sampled"], sampled["sampled"]) == (False, True)
    assert {one["steps"] for one in whole["parameters"]} == {100}
    assert {one["steps"] for one in sampled["parameters"]} == {32}
    assert "from some ranges of steps" in command("compare", "good", "sick").out


def test_pieces_add_up(runs, compared, monkeypatch):
    """Read in pieces, the numbers are those of one reading."""
    whole = compared("good", "sick")["parameters"]["parameters"]
    monkeypatch.setattr(differences, "ROWS", 32)
    pieces = compared("good", "sick")["parameters"]["parameters"]
    for one, other in zip(whole, pieces, strict=True):
        assert one == pytest.approx(other)


def test_top_limits_the_text_only(command, runs, compared):
    """--top 1 shows one parameter, and says how many more there are."""
    text = command("compare", "good", "sick", "--top", "1").out
    assert "... and 3 more parameters; --top shows more." in text
    assert len(compared("good", "sick")["parameters"]["parameters"]) == 4
