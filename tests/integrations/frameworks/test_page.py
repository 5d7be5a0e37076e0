"""docs/frameworks.md: every snippet whose framework is there runs, and prints what the page shows."""

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from tests.integrations.frameworks.trainings import pictures
from tests.support import processes

PAGE = Path(__file__).parents[3] / "docs" / "frameworks.md"
SECTIONS = dict(
    re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE)
)
PACKAGES = {
    "ignite": "ignite",
    "skorch": "skorch",
    "Stable-Baselines3": "stable_baselines3",
    "Composer": "composer",
    "timm": "timm",
    "ultralytics": "ultralytics",
    "mmengine": "mmengine",
}


def snippets(section: str, language: str) -> list[str]:
    """Return the blocks of a section that are marked with a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", SECTIONS[section], re.DOTALL | re.MULTILINE)


def table(text: str) -> list[list[str]]:
    """Return the words of the lines that print a frame: of a number, whether it is whole."""
    rows = [line.split() for line in text.splitlines() if line.strip()]
    return [[re.sub(r"\d+\.\d+", "0.0", word) for word in row] for row in rows]


def test_every_framework_has_a_section() -> None:
    """The table at the top, the sections and this test name the same frameworks."""
    assert list(SECTIONS) == [*PACKAGES, "Others"]
    rows = re.findall(r"^\| \[(.*?)\]", PAGE.read_text("utf-8"), re.MULTILINE)
    assert rows == list(PACKAGES)


@pytest.mark.slow
@pytest.mark.parametrize("section", PACKAGES)
def test_snippets_print_what_is_shown(section: str, tmp_path: Path) -> None:
    """The columns and the steps; their numbers are those of one machine."""
    package = PACKAGES[section]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"NOT TESTED: {package} is not installed")
    if package == "ultralytics":
        pictures(tmp_path)
    environment = processes.environment(YOLO_OFFLINE="True", YOLO_CONFIG_DIR=str(tmp_path))
    printed = [
        _printed(code, cwd=tmp_path, env=environment) for code in snippets(section, "python")
    ]
    shown = snippets(section, "text")
    assert len(shown) == 1
    wanted = table(shown[0])
    assert table(printed[0])[-len(wanted) :] == wanted, printed[0]


def _printed(code: str, **options: Any) -> str:
    done = processes.run(code=code, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_net_with_the_callback_is_copied_and_searched(tmp_path: Path) -> None:
    """The callback of skorch's section goes through clone(), pickle and a search as others do."""
    pytest.importorskip("skorch", reason="NOT TESTED: skorch is not installed")
    more = """
import copy, pickle
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV

data = x.numpy(), x.sum(1, keepdim=True).numpy()
net.fit(*data)
net.partial_fit(*data)
clone(net)
search = GridSearchCV(copy.deepcopy(net), {"lr": [0.01, 0.1]}, cv=2).fit(*data)
best = pickle.loads(pickle.dumps(search.best_estimator_))
print(len(dict(best.callbacks_)["Gradients"].watcher_.history.steps()))
"""
    code = snippets("skorch", "python")[0] + more
    environment = processes.environment()
    assert _printed(code, cwd=tmp_path, env=environment).splitlines()[-1] == "3"
