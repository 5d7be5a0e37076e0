"""The scripts in examples/guide/ run, and their numbers are those derived by hand."""

from __future__ import annotations

import math
import re
import runpy
from pathlib import Path

import pytest

from tests.support import processes

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "examples" / "guide"
SCRIPTS = sorted(path.name for path in GUIDE.glob("[!_]*.py"))
PAGE = (ROOT / "docs" / "guide.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"```text\n\$ python examples/guide/(\S+)\n(.*?)```", re.DOTALL)
PRINTED = dict(BLOCK.findall(PAGE))
RUN_FOLDERS = "10_best_practices.py"

S = 0.6590460684074  # where the logistic sigmoid crosses the diagonal
SLOPE = S * (1 - S)  # of the sigmoid there

EXPECTED = {
    "01_introduction.py": {
        # w x = 1 and tanh 1 = (e^2 - 1) / (e^2 + 1), so tanh 1 - 1 = -2 / (e^2 + 1); the slope of
        # tanh is 1 / cosh^2, and the chain ends in x = 2.
        "dloss/dw, in w.grad": 2 * -2 / (math.e**2 + 1) / math.cosh(1) ** 2 * 2,
        "grad_norm, its magnitude": 8 / (math.e**2 + 1) / math.cosh(1) ** 2,
    },
    "02_basic_gradients.py": {
        "|d(x^3 - 2x)/dx| at 3": 25,
        "|dz/dx| at (2, 3)": 12,
        "|dz/dy| at (2, 3)": 5,
        "both together": 13,  # 5, 12, 13
        # J is diag(2, 4, 6), so (1, 0, -1) J = (2, 0, -6).
        "|v J| of x^2": math.sqrt(40),
        # det A A^-T = 5 [[0.8, -0.6], [-0.2, 0.4]]
        "|d det/dA|": math.sqrt(30),
        "d det/dA in row 0, column 1": -3,
    },
    "03_accumulation.py": {
        # Each backward adds (3, 4), and nothing takes them away.
        "zero_grad forgotten, step 1": 5,
        "zero_grad forgotten, step 2": 10,
        "zero_grad forgotten, step 3": 15,
        "d(x^2 + x^3)/dx at 2": 16,
        "micro-batches of that step": 2,
        # The sum of the squares to n is n (n + 1) (2n + 1) / 6: 91 to 6 and 30 to 4.
        "4 + 2 examples, weighted": 91 / 3,
        "4 + 2 examples, mean of means": (15 + 61) / 2,
    },
    "04_flow_control.py": {
        "d/dx of x^2 + x.detach()^2 at 3": 6,
        "graph with set_grad_enabled(True)": 1,
        "graph with set_grad_enabled(False)": 0,
        "learns: norm": 3,
        "times_zero: norm": 0,
        "times_zero: share of zeros": 1,
        "cut_off: events": 1,
        "frozen: events": 0,
    },
    "05_custom_functions.py": {
        "Cube at 2: gradient": 12,
        "WrongCube at 2: gradient": 8,
        "Cube: passes the check": 1,
        "WrongCube: analytic": 8,
        "WrongCube: numeric": 12,
        # What lies before the wrong function: its input, and weight and bias of the layer below.
        "in the model: wrong tensors of 5": 3,
    },
    "06_clipping.py": {
        "norm before": 5,
        "after clip_grad_norm_": 1,
        "after a function of one's own": 1,
        "after watch(clip=1.0)": 1,
        "its factor": 0.2,
        "the factor for a norm of 0.5": 1,
        "(6, -1): norm before": math.sqrt(37),
        # (6, -1) becomes (2, -1).
        "after clip_grad_value_": math.sqrt(5),
        "after ClipByValue(2.0)": math.sqrt(5),
    },
    "07_memory.py": {
        # An activation is 32 x 64 float32, 8 KiB; every layer keeps its input, the loss the output.
        "kept without checkpoints, KiB": 72,
        "kept in segments of 2 layers, KiB": 40,
        "kept in segments of 1 layer, KiB": 72,
        "norm with checkpoints / without": 1,
        "backwards seen with checkpoints": 1,
        "gradients there after zero_grad()": 0,
    },
    "08_higher_order.py": {
        # (1, 2) [[4, 1], [1, 12]] = (6, 25)
        "|v J|, v = (1, 2)": math.sqrt(661),
        # [[4, 2], [2, 12]] (1, -1) = (2, -10)
        "|H u|, u = (1, -1)": math.sqrt(104),
        # The roots of t^2 - 16 t + 44
        "largest eigenvalue of H": 8 + math.sqrt(20),
        "smallest eigenvalue of H": 8 - math.sqrt(20),
        "trace of H": 16,
        # (4, 13) + 0.1 (42, 164)
        "norm with the penalty": math.sqrt(8.2**2 + 29.4**2),
        # 2 / (8 + sqrt 20) = 2 (8 - sqrt 20) / 44
        "largest rate that does not grow": (8 - math.sqrt(20)) / 22,
        # |1 - 2 * 0.9| and |1 - 2 * 1.1|, the other direction having died out.
        "growth per step at 0.9 of it": 0.8,
        "growth per step at 1.1 of it": 1.2,
    },
    "09_debugging.py": {
        # 3 + 1e-7 is 3 in float32, whose neighbours are 2.4e-7 apart there.
        "float32 differences, step 1e-7": 0,
        "check_gradients, in float64": 1,
        # The weight of layer k sees its input s, and one slope for each sigmoid from k on.
        "ten sigmoids: last layer": S * SLOPE,
        "ten sigmoids: first layer": S * SLOPE**10,
        "step of the NaN": 3,
        # The root of w has the slope 1 / 2 at 1.
        "norm of the step after it": 0.5,
        # w is 1, -3, 9, -27 and the gradient 4 w.
        "first step above 100": 4,
        "its norm": 108,
        "findings, one of them exploding": 1,
    },
    "10_best_practices.py": {
        # w is 0, 0.5, 1, 1, 1.5: half the clipped gradient of 1 a step, and none at the NaN.
        "w after four steps": 1.5,
        "norm, step 1": 4,
        "norm, step 2": 3.5,
        "norm, step 4": 3,
        "loss, step 4": 4.5,
        "factor of the clip, step 4": 1 / 3,
        "steps left out": 1,
        "the folder's steps are the same": 1,
        "and so is its report": 1,
        "exp overwritten: an error": 1,
    },
}


def run(script: str, patch: pytest.MonkeyPatch) -> dict[str, float]:
    """Runs a script's main() with the packages of this test."""
    if script == RUN_FOLDERS:
        pytest.importorskip("pyarrow")
    patch.syspath_prepend(str(GUIDE))
    return runpy.run_path(str(GUIDE / script))["main"]()


def test_every_section_is_tested_and_on_the_page() -> None:
    """A script that is added is checked here too, and docs/guide.md walks through all in order."""
    assert sorted(EXPECTED) == SCRIPTS
    assert list(PRINTED) == SCRIPTS


@pytest.mark.parametrize("script", SCRIPTS)
def test_sees_what_was_derived_by_hand(
    script: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The numbers are those of the closed forms, and docs/guide.md shows what is printed."""
    seen = run(script, monkeypatch)
    assert seen == pytest.approx(EXPECTED[script], rel=1e-5, abs=1e-9)
    assert capsys.readouterr().out == PRINTED[script]


@pytest.mark.parametrize(
    "script",
    [SCRIPTS[0], *(pytest.param(script, marks=pytest.mark.slow) for script in SCRIPTS[1:])],
)
def test_runs_as_a_reader_runs_it(script: str, tmp_path: Path) -> None:
    """A script runs from any folder, and leaves nothing behind in it."""
    if script == RUN_FOLDERS:
        pytest.importorskip("pyarrow")
    done = processes.run(GUIDE / script, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == PRINTED[script]
    assert not list(tmp_path.iterdir())


def test_the_links_lead_somewhere() -> None:
    """Each file that docs/guide.md links to is there, and each heading in it."""
    for target in re.findall(r"\]\(([^)#:]*(?:#[^)]*)?)\)", PAGE):
        name, _, anchor = target.partition("#")
        path = ROOT / "docs" / name if name else ROOT / "docs" / "guide.md"
        assert path.exists(), target
        headings = (
            re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            if anchor
            else []
        )
        slugs = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
        assert not anchor or anchor in slugs, target
