"""Arrow arrays that are made without pandas."""

import subprocess
import sys

import numpy as np
import pytest

from gradwatch.record.folder.arrow import arrow_texts, arrow_values
from tests.support import processes

pa = pytest.importorskip("pyarrow", reason="NOT TESTED: run folders. pip install 'gradwatch[runs]'")

KINDS = (np.int32, np.int64, np.float32, np.float64, np.bool_)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [0, 1, 8, 19])
def test_values_are_those_of_pyarrow_itself(kind, rows):
    """They equal what `pyarrow.array()` makes, with and without nulls, of every second element, too."""
    random = np.random.default_rng(rows)
    values, known = random.integers(0, 2, 2 * rows).astype(kind)[::2], random.random(rows) < 0.5
    assert arrow_values(values).equals(pa.array(values))
    found = arrow_values(values, known)
    found.validate(full=True)
    assert found.equals(pa.array(values, mask=~known))
    assert found.type == pa.array(values).type


@pytest.mark.parametrize("texts", [[], ["a"], ["", "宽.weight", "", "b" * 300]])
def test_texts_are_those_of_pyarrow_itself(texts):
    """They equal what `pyarrow.array()` makes."""
    found = arrow_texts(texts)
    found.validate(full=True)
    assert found.equals(pa.array(texts, pa.string()))


def test_a_run_is_written_without_pandas(tmp_path):
    """Neither pandas nor pyarrow's kernels are imported for a run that is written and reported."""
    code = """
import sys, torch, gradwatch
w = torch.ones(2, requires_grad=True)
optimizer = torch.optim.SGD([w], lr=0.1)
with gradwatch.watch({"w": w}, optimizer, clip=1.0, statistics=("max",), run_dir="a") as watcher:
    for _ in range(3):
        optimizer.zero_grad()
        w.sum().backward()
        optimizer.step()
print(len(str(watcher.report())) > 9, {"pandas", "pyarrow.compute"} & set(sys.modules))
print(gradwatch.load("a").parameters()["max"].tolist())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=processes.environment(), cwd=tmp_path,
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    assert done.stdout.splitlines() == ["True set()", "[1.0, 1.0, 1.0]"]
