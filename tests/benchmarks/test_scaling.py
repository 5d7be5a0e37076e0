"""The benchmark of growth: the script itself, and the exact numbers in it."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("matplotlib")


@pytest.mark.slow
@pytest.mark.skipif(torch.__version__ < "2.9", reason="FSDP2 on a CPU needs torch 2.9")
def test_script_measures_writes_and_draws(tmp_path, monkeypatch):
    """A short run writes all four tables and a picture; ranks cost the bytes that the docs say."""
    from benchmarks.scaling import __main__ as scaling

    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    page = tmp_path / "SCALING.md"
    options = ["--quick", "--parameters", 2, 50, "--steps", 1500, "--watched-steps", 1200]
    options += ["--ranks", 1, 2, "--rounds", 1, "--out", page]
    scaling.main(list(map(str, options)))
    text = page.read_text(encoding="utf-8")
    headings = re.findall(r"^## (.*)$", text, flags=re.MULTILINE)
    assert headings == ["Parameters", "Statistics", "Ranks", "Steps"]
    rows = [[cell.strip() for cell in line.strip("|").split("|")]
            for line in text.splitlines() if line.startswith("|")]  # fmt: skip
    assert [row[0] for row in rows if row[0] in ("2", "50")] == ["2", "50"]
    ranks = {(row[0], row[1]): row[4:] for row in rows if row[0] in ("DDP", "FSDP2")}
    assert ranks["DDP", "1"] == ranks["DDP", "2"] == ["+0", "+0"]
    tensors = 60
    for number in (1, 2):
        of_each_rank = 9 if number == 1 else 10  # nobody to be out of step with
        payload = 8 * (3 * tensors + of_each_rank * number)
        assert ranks["FSDP2", str(number)] == ["+1", f"{payload:+,}"]
    reached = [(row[0], row[1]) for row in rows if row[0] in ("run folder", "TensorBoard")]
    assert reached == [(sink, steps) for sink in ("run folder", "TensorBoard")
                       for steps in ("1,024", "1,500")]  # fmt: skip
    assert "all of them" in text
    assert "Its operators, called alone, take" in text
    picture = tmp_path / "scaling.png"
    assert 10_000 < picture.stat().st_size < 200_000
    assert "![How the cost grows](scaling.png)" in text


def test_steps_to_look_at():
    """Every power of ten from 1,000 on, and the last step."""
    from benchmarks.scaling.steps import marks

    assert marks(1_000_000) == [1_000, 10_000, 100_000, 1_000_000]
    assert marks(2_500) == [1_000, 2_500]
    assert marks(10) == [10]


def test_memory_is_that_of_the_buffer():
    """A watcher holds 4 bytes for each parameter and of 1,024 steps, and its hooks and name beside."""
    from benchmarks.scaling.parameters import held_bytes

    few, many = held_bytes(10), held_bytes(510)
    # The hooks of a parameter take 560 bytes in torch alone; names, references and ours as many.
    assert 4 * 1024 < (many - few) / 500 < 4 * 1024 + 1536


def test_operators_of_watch_are_found():
    """What is replayed are the five calls that a watched step makes and the bare one does not."""
    from benchmarks.overhead.operators import added_calls, operator_time
    from benchmarks.overhead.workloads import narrow_training

    calls = added_calls(narrow_training(20))
    assert [str(function) for function, _, _ in calls][:2] == [
        "aten._foreach_norm.Scalar",
        "aten.stack.default",
    ]
    assert len(calls) == 5
    time = operator_time(20, rounds=1, turns=1)
    assert 0 < time.operators_s.middle < 1


def test_numbers_below_one_are_refused(capsys):
    """The error names the option, the bound and the value."""
    from benchmarks.scaling import __main__ as scaling

    with pytest.raises(SystemExit):
        scaling.parse_arguments(["--ranks", "2", "0"])
    assert "--ranks must be at least 1, got 0." in capsys.readouterr().err
    assert scaling.parse_arguments([]).steps == 1_000_000
