"""Parts are merged: a long run leaves few files, and a reader sees each row once at any moment."""

import itertools

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradwatch.history import load
from gradwatch.record.folder import parts as parts_module
from gradwatch.record.folder.parts import FULL, LEVELS, Part, due, leftovers, list_parts, uncovered

from . import runs


@given(st.lists(st.integers(1, FULL // 3), max_size=400), st.integers(1, 5000))
def test_files_stay_few(sizes, many):
    """Whatever the sizes of deliveries, there are at most 32 parts of each level and full ones."""
    parts, rewritten = [], 0
    for size in sizes + [sizes[0] if sizes else 1] * many:
        parts.append(size)
        chosen = due(parts)
        if chosen is not None:
            assert chosen.stop == len(parts)
            assert chosen.stop - chosen.start > 1
            rewritten += sum(parts[chosen])
            parts[chosen] = [sum(parts[chosen])]
    small = [size for size in parts if size < FULL]
    assert len(small) <= len(LEVELS) * 64
    assert rewritten <= len(LEVELS) * sum(parts)


@given(st.lists(st.integers(1, 2 * FULL), max_size=60))
def test_nothing_small_is_left_at_the_end(sizes):
    """At the close neighbours are merged up to a full part; full ones are left alone."""
    groups = leftovers(sizes)
    for group in reversed(groups):
        assert all(size < FULL for size in sizes[group])
        assert sum(sizes[group]) < 2 * FULL
        sizes[group] = [sum(sizes[group])]
    assert not any(sum(pair) < FULL for pair in itertools.pairwise(sizes))


@given(st.sets(st.builds(lambda s, a, b: Part(s, min(a, b), max(a, b)), *[st.integers(0, 9)] * 3)))
def test_covered_parts_are_left_out(parts):
    """A part goes if and only if another one has all its rows."""
    expected = {p for p in parts if not any(q != p and q.covers(p) for q in parts)}
    assert set(uncovered(parts)) == expected


def test_a_name_says_the_rows():
    """The name of a part is read back, and other names are none."""
    for part in (Part(1, 0, 63), Part(12345, 0, 10**11)):
        assert Part.from_name(part.name) == part
    for name in (".0001-0000000000-0000000063.parquet.tmp", "part-0.parquet", "x.parquet", ""):
        assert Part.from_name(name) is None


@pytest.fixture
def small_parts(monkeypatch):
    """Parts count as full early, so that a short run has merges of every kind."""
    monkeypatch.setattr(parts_module, "FULL", 200)
    monkeypatch.setattr(parts_module, "LEVELS", (20, 200))


@pytest.mark.usefixtures("small_parts")
def test_merged_on_the_way_and_at_the_close(tmp_path):
    """After each delivery all steps are there once, for load() and for pandas; in the end in few files."""
    sink, files = runs.write(tmp_path, close=False), []
    for step in range(1, 121):
        sink.write(runs.batch([step]))
        files.append(len(list((tmp_path / "parameters").iterdir())))
        if step % 9 == 0:
            assert runs.assert_consistent(tmp_path) == step
            assert sorted(pd.read_parquet(tmp_path / "steps")["step"]) == list(range(1, step + 1))
            assert len(pd.read_parquet(tmp_path / "parameters")) == 3 * step
    sink.close()
    assert max(files) < 30
    assert len(list((tmp_path / "parameters").iterdir())) == 2
    assert runs.assert_consistent(tmp_path) == 120


def test_a_killed_merge_is_invisible(tmp_path):
    """A merged part beside those it was made of counts once, and the next process clears them away."""
    parts = [runs.batch([step]) for step in range(1, 6)]
    runs.write(tmp_path, *parts, close=False)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.parquet")}
    runs.write(tmp_path, runs.batch([6]))
    for path in list(before)[::2]:
        path.write_bytes(before[path])
    (tmp_path / "steps/.0001-0000000000-0000000009.parquet.tmp").write_bytes(b"half")
    assert runs.assert_consistent(tmp_path) == 6
    runs.write(tmp_path, runs.batch([7]))
    assert len(list_parts(tmp_path / "steps")) == 3
    assert not list(tmp_path.rglob(".*"))
    assert runs.assert_consistent(tmp_path) == 7


def test_a_long_run_leaves_few_files(tmp_path):
    """Fifteen hundred deliveries of one step leave some dozens of parts on the way and one at the close."""
    layout = runs.layout("a")
    sink, most = runs.write(tmp_path, close=False), 0
    for step in range(1, 1501):
        sink.write(runs.batch([step], layout))
        if step % 100 == 99:
            most = max(most, len(list((tmp_path / "parameters").iterdir())))
    sink.close()
    assert most < 150
    assert len(list((tmp_path / "parameters").iterdir())) == 1
    assert load(tmp_path).parameters("a")["grad_norm"].tolist() == list(range(1, 1501))
