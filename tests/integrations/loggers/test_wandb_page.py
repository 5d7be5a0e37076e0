"""docs/wandb.md: its snippet runs, and the run of W&B holds what the page says."""

import re
from pathlib import Path

import pytest

pytest.importorskip("wandb", reason="NOT TESTED: WandbSink, without wandb")

from tests.support.wandb_runs import rows, series

PAGE = Path(__file__).parents[3] / "docs" / "wandb.md"


def test_the_snippet_runs(tmp_path, monkeypatch):
    """All 200 rows of both sides are in its run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    text = PAGE.read_text(encoding="utf-8")
    names = {}
    for snippet in re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        exec(compile(snippet, str(PAGE), "exec"), names)
    found = rows(tmp_path)
    steps = names["watcher"].history.steps()
    assert series(found, "gradwatch/grad_norm") == list(steps["grad_norm"].items())
    assert [row["_step"] for row in found if "loss" in row] == list(range(200))
