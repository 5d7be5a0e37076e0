"""The README: its snippets run, its tables name what there is."""

import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from gradwatch.measure.statistics import STATISTICS
from gradwatch.record.columns import EVENT_COLUMNS, STEP_COLUMNS
from gradwatch.record.records import EVENT_KINDS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize(
    "snippet",
    SNIPPETS,
    ids=["plain", "managed", "lightning", "tensorboard", "noise", "run", "debug"],
)
def test_snippet_runs(snippet, tmp_path):
    """A snippet pasted into a file runs as it stands."""
    pytest.importorskip("lightning")
    script = tmp_path / "snippet.py"
    script.write_text(snippet, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(script)],
        check=False,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_every_column_stands_in_the_readme():
    """No column of steps or events is left unexplained."""
    missing = [
        name
        for name in (*STEP_COLUMNS, *EVENT_COLUMNS, "grad_norm_clipped")
        if f"`{name}`" not in README
    ]
    assert missing == []


def test_every_event_and_statistic_stands_in_the_readme():
    """No kind of event and no statistic is left unexplained."""
    names = [*EVENT_KINDS, *STATISTICS[1:]]
    assert [name for name in names if f"`{name}`" not in README] == []


def test_every_tag_stands_in_the_readme():
    """No scalar in TensorBoard is left unexplained."""
    scalars = pytest.importorskip("gradwatch_tensorboard.scalars")
    missing = [
        name for name in scalars.STEP_SCALARS if not re.search(rf"`(gradwatch/)?{name}`", README)
    ]
    assert missing == []


def test_every_tag_stands_on_the_writers_page():
    """The page of the writer's module explains each scalar, too."""
    writer = pytest.importorskip("gradwatch_tensorboard.writer")
    scalars = pytest.importorskip("gradwatch_tensorboard.scalars")
    page = re.sub(r"(gradwatch/norm_)p05, _p50, _p95", r"\1p05`` \1p50`` \1p95``", writer.__doc__)
    assert [name for name in scalars.STEP_SCALARS if f"gradwatch/{name}``" not in page] == []


def test_the_screenshot_is_there():
    """The picture that the README shows is in the repository."""
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / picture).is_file()


def test_records_and_frames_agree():
    """Frames have a column for every field of the records."""
    from gradwatch import Event, StepRecord

    assert {f.name for f in fields(StepRecord)} - {"step", "global_step"} == set(STEP_COLUMNS)
    assert {f.name for f in fields(Event)} - {"global_step"} == set(EVENT_COLUMNS)
