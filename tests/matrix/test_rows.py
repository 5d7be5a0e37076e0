"""The oldest row of `make test-matrix` is what pyproject.toml calls the oldest versions."""

import configparser
import re
from pathlib import Path

import pytest

HERE = Path(__file__).parent
EXTRAS = (
    *("huggingface", "lightning", "mlflow", "prometheus"),
    *("tensorboard", "wandb", "plot", "examples"),
)


def test_oldest_row_has_the_lower_bounds_of_pyproject():
    """Every lower bound that a user meets is pinned in the row, and so is the oldest Python."""
    tomllib = pytest.importorskip("tomllib", reason="tomllib needs Python 3.11 or newer")
    pyproject = (HERE.parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    project = tomllib.loads(pyproject)["project"]
    table = configparser.ConfigParser()
    table.read_string((HERE / "rows.cfg").read_text(encoding="utf-8"))
    wanted = [*project["dependencies"]]
    for extra in EXTRAS:
        wanted += project["optional-dependencies"][extra]
    bounds = dict(w.split(">=") for w in wanted if not w.startswith("gradwatch["))
    pins = dict(pin.split("==") for pin in table["oldest"]["install"].split() if "==" in pin)
    assert {name: re.sub(r"(\.0)+$", "", pin) for name, pin in pins.items()} == bounds
    assert project["requires-python"] == f">={table['oldest']['python']}"
