"""What a package index is told: the metadata, with a public address and without one."""

import json
import re
import shutil
import subprocess
import sys
from email import message_from_string
from pathlib import Path

import pytest

import gradwatch

ROOT = Path(__file__).parent.parent
ADDRESS = "https://forge.example/owner/gradwatch"
BUILD = """
import sys
from hatchling.build import prepare_metadata_for_build_wheel
print(prepare_metadata_for_build_wheel(sys.argv[1]))
"""


def metadata(folder, address=""):
    """The wheel's METADATA, as the build backend makes it for an address."""
    pytest.importorskip(
        "hatchling", reason="NOT TESTED: the metadata. pip install 'gradwatch[dev]'"
    )
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    project = folder / "pyproject.toml"
    text = project.read_text(encoding="utf-8")
    text, settings = re.subn(r"(?m)^repository = .*$", f"repository = {json.dumps(address)}", text)
    assert settings == 1
    project.write_text(text, encoding="utf-8")
    (folder / "out").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", BUILD, "out"],
        cwd=folder, capture_output=True, text=True, encoding="utf-8", check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    made = folder / "out" / done.stdout.split()[-1] / "METADATA"
    return message_from_string(made.read_text(encoding="utf-8"))


def targets(page):
    """Where the links and pictures of a page lead."""
    return re.findall(r"\]\(([^)\s]+)\)", page)


def test_without_an_address_nothing_is_linked(tmp_path):
    """While there is no public address the index gets neither links nor pictures, but all the text."""
    made = metadata(tmp_path)
    assert made.get_all("Project-URL") is None
    page = made.get_payload()
    assert targets(page) == []
    assert "![" not in page
    assert "make demo" in page
    assert "A guide to autograd" in page


def test_with_an_address_every_link_is_absolute(tmp_path):
    """The one setting makes the project's links, and those of the page, which lead to the release."""
    made = metadata(tmp_path, f"{ADDRESS}/")
    links = dict(line.split(", ") for line in made.get_all("Project-URL"))
    assert links["Repository"] == ADDRESS
    assert all(link.startswith(ADDRESS) for link in links.values())
    page = made.get_payload()
    here = targets((ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(targets(page)) == len(here)
    files = f"{ADDRESS}/(?:blob|raw)/v{re.escape(gradwatch.__version__)}/"
    assert [re.sub(files, "", target) for target in targets(page)] == here
    assert f"]({ADDRESS}/raw/v{gradwatch.__version__}/docs/images/gradients-tab.png)" in page


def test_the_readme_is_markdown_by_the_gradwatch_developers(tmp_path):
    """The index renders Markdown, and names the authors as the license does."""
    made = metadata(tmp_path)
    assert made["Description-Content-Type"] == "text/markdown"
    assert made["Author"] == "the gradwatch developers"
    assert made["Author"] in (ROOT / "LICENSE").read_text(encoding="utf-8")


def test_code_is_left_alone(tmp_path, monkeypatch):
    """What looks like a link within a code block stays as it is."""
    pytest.importorskip(
        "hatchling", reason="NOT TESTED: the metadata. pip install 'gradwatch[dev]'"
    )
    monkeypatch.syspath_prepend(str(ROOT))
    from hatch_build import long_description

    code = "```python\ncalls[0](x)\n```"
    assert long_description(f"[a](b.md)\n{code}\n", "", "v1") == f"a\n{code}\n"


def test_the_version_is_the_same_everywhere():
    """Package, project file and citation name one version."""
    for name in ("pyproject.toml", "CITATION.cff"):
        text = (ROOT / name).read_text(encoding="utf-8")
        found = re.search(r'(?m)^version(?: =|:) "?([^"\s]+)"?$', text)
        assert found.group(1) == gradwatch.__version__, name


def test_pre_commit_runs_the_versions_of_ci():
    """The hooks are pinned to the versions in constraints.txt."""
    pinned = dict(
        re.findall(
            r"(?m)^([\w-]+)==([^;\s]+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8")
        )
    )
    hooks = dict(
        re.findall(
            r"repo: .*/(?:mirrors-)?(\w+)(?:-pre-commit)?\n\s*rev: v(\S+)",
            (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"),
        )
    )
    assert hooks == {name: pinned[name] for name in ("ruff", "mypy")}
