"""README and the pages of docs/: the first page is short, snippets run, links lead somewhere."""

import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from gradwatch.record.columns import EVENT_COLUMNS, STEP_COLUMNS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MOST_WORDS = 900
PYTHON = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")]
PAGES += [*sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "benchmarks").glob("*.md"))]
OWN_TEST = ("curvature.md", "extending.md")
"""Pages whose snippets are run, and looked at more closely, by a test elsewhere."""

RUN_EACH = """
import pathlib, sys
for script in sys.argv[1:]:
    print(f"== {script}", flush=True)
    exec(compile(pathlib.Path(script).read_text(encoding="utf-8"), script, "exec"), {})
"""


def run(folder, *arguments):
    """Runs Python as a reader does, in a folder; what it printed."""
    paths = [path for path in sys.path if path and Path(path).is_dir()]
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
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
    return done.stdout


def scripts_of(page):
    """The snippets of a page that are whole scripts: they begin with their imports."""
    snippets = PYTHON.findall(page.read_text(encoding="utf-8"))
    return [snippet for snippet in snippets if snippet.startswith(("import ", "from "))]


def test_readme_is_a_first_page():
    """Prose and code of README have at most 900 words."""
    assert len(README.split()) <= MOST_WORDS


@pytest.mark.parametrize("number", range(4), ids=["plain", "managed", "lightning", "tensorboard"])
def test_snippet_of_the_readme_runs(number, tmp_path):
    """A snippet pasted into a file runs as it stands, and prints what README shows below it."""
    pytest.importorskip("lightning")
    assert len(scripts_of(ROOT / "README.md")) == len(PYTHON.findall(README)) == 4
    snippet = scripts_of(ROOT / "README.md")[number]
    script = tmp_path / "snippet.py"
    script.write_text(snippet, encoding="utf-8")
    printed = run(tmp_path, script)
    shown = re.search(
        r"```text\n(.*?)```", README.partition(snippet)[2].partition("```python")[0], re.DOTALL
    )
    assert printed.startswith(shown.group(1)) if shown else number > 0


def test_snippets_of_the_pages_run(tmp_path):
    """So does each snippet of docs/ that begins with its imports; the others compile."""
    for module in ("lightning", "tensorboard", "pyarrow"):
        pytest.importorskip(module)
    files = []
    for page in sorted((ROOT / "docs").glob("*.md")):
        for snippet in PYTHON.findall(page.read_text(encoding="utf-8")):
            compile(snippet, page.name, "exec")
        if page.name not in OWN_TEST:
            for number, snippet in enumerate(scripts_of(page), start=1):
                files.append(tmp_path / f"{page.stem}_{number}.py")
                files[-1].write_text(snippet, encoding="utf-8")
    assert run(tmp_path, "-c", RUN_EACH, *files).count("== ") == len(files) > 5


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    """Each file and picture that a page links to is there, and each heading in it."""
    text = page.read_text(encoding="utf-8")
    wrong = []
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
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


def test_every_tag_stands_on_the_writers_page():
    """The page of the writer's module explains each scalar."""
    writer = pytest.importorskip("gradwatch_tensorboard.writer")
    scalars = pytest.importorskip("gradwatch_tensorboard.scalars")
    page = re.sub(r"(gradwatch/norm_)p05, _p50, _p95", r"\1p05`` \1p50`` \1p95``", writer.__doc__)
    assert [name for name in scalars.STEP_SCALARS if f"gradwatch/{name}``" not in page] == []


def test_records_and_frames_agree():
    """Frames have a column for every field of the records."""
    from gradwatch import Event, StepRecord

    assert {f.name for f in fields(StepRecord)} - {"step", "global_step"} == set(STEP_COLUMNS)
    assert {f.name for f in fields(Event)} - {"global_step"} == set(EVENT_COLUMNS)
