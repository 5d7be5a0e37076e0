"""README and the pages of docs/: the first page is short, snippets run, links lead somewhere."""

import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from gradwatch.record.columns import EVENT_COLUMNS, STEP_COLUMNS
from tests.support import processes

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MOST_WORDS = 900
HAS_CODE = (ROOT / "gradwatch").is_dir()  # the tests of the wheel have the pages, and not the code
PYTHON = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
PAGES += [*sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "benchmarks").glob("*.md"))]
OWN_TEST = ("boards.md", "curvature.md", "extending.md", "frameworks.md")
"""Pages whose snippets are run, and looked at more closely, by a test elsewhere."""

RUN_EACH = """
import pathlib, sys
for script in sys.argv[1:]:
    print(f"== {script}", flush=True)
    exec(compile(pathlib.Path(script).read_text(encoding="utf-8"), script, "exec"), {})
"""


def run_each(folder, scripts):
    """Runs scripts by their names, each with a namespace of its own; what each printed."""
    for name, text in scripts.items():
        (folder / name).write_text(text, encoding="utf-8")
    # The packages come from here without an install, from site-packages on the wheel in CI.
    paths = [path for path in sys.path if path and Path(path).is_dir()]
    done = subprocess.run(
        [sys.executable, "-c", RUN_EACH, *scripts],
        check=False,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    parts = re.split(r"^== (.*)\n", done.stdout, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_readme_is_a_first_page():
    """Prose and code of README have at most 900 words."""
    assert len(README.split()) <= MOST_WORDS


def test_snippets_run(tmp_path):
    """A snippet of README or docs/ that begins with its imports runs as it stands; others compile.

    One process runs all of them: most of the time is that of its imports.
    """
    for module in ("lightning", "tensorboard", "pyarrow"):
        pytest.importorskip(module)
    scripts = {}
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for number, snippet in enumerate(PYTHON.findall(page.read_text(encoding="utf-8")), start=1):
            compile(snippet, page.name, "exec")
            if snippet.startswith(("import ", "from ")) and page.name not in OWN_TEST:
                scripts[f"{page.stem}_{number}.py"] = snippet
    printed = run_each(tmp_path, scripts)
    assert printed.keys() == scripts.keys()
    assert {f"README_{number}.py" for number in range(1, 4)} <= printed.keys()


def test_the_first_example_prints_what_readme_shows(tmp_path):
    """Below its first script README shows what `gradwatch run` tells of it, up to the "..."."""
    pytest.importorskip("pyarrow")
    (tmp_path / "train.py").write_text(PYTHON.findall(README)[0], encoding="utf-8")
    command = ["-m", "gradwatch", "run", "--on-nonfinite", "explain", "train.py"]
    done = processes.run(*command, cwd=tmp_path)
    shown = re.search(r"^```text\n(gradwatch: .*?)^\.\.\.\n```", README, re.DOTALL | re.MULTILINE)
    assert done.stdout == ""
    assert _undated(done.stderr).startswith(_undated(shown.group(1)))


def _undated(text):
    return re.sub(r"train-\d{8}-\d{6}", "train-DATE", text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    """Each file and picture that a page links to is there, and each heading in it."""
    text = page.read_text(encoding="utf-8")
    wrong = []
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        if name.startswith(("../gradwatch/", "../integrations/")) and not HAS_CODE:
            continue
        if not file.exists() or (anchor and anchor not in anchors(file)):
            wrong.append(target)
    assert wrong == []


def anchors(page):
    """What a forge calls the headings of a page in its links."""
    text = re.sub(
        r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE
    )
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_is_in_the_index():
    """README names each page of docs/."""
    pages = sorted(page.name for page in (ROOT / "docs").glob("*.md"))
    assert [name for name in pages if f"(docs/{name})" not in README] == []


def test_every_picture_is_shown():
    """No picture lies in docs/images that no page shows."""
    shown = {
        (page.parent / target).resolve()
        for page in PAGES
        for target in re.findall(r"!\[[^\]]*\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    }
    assert [p for p in (ROOT / "docs" / "images").glob("*.png") if p.resolve() not in shown] == []


def test_records_and_frames_agree():
    """Frames have a column for every field of the records; group_lr is what groups() is made from."""
    from gradwatch import Event, StepRecord

    inner = {"step", "global_step", "group_lr"}
    assert {f.name for f in fields(StepRecord)} - inner == set(STEP_COLUMNS)
    assert {f.name for f in fields(Event)} - {"global_step"} == set(EVENT_COLUMNS)
