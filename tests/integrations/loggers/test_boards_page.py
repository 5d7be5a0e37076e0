"""docs/boards.md: every snippet runs and does what the page says; recipes where the board is installed."""

import contextlib
import io
import json
import logging
import shutil
import subprocess
import textwrap
from pathlib import Path

import pytest

from tests.support import processes

from .page import PAGE, SNIPPETS

NEEDS = {
    "Aim": "aim",
    "ClearML": "clearml",
    "Comet": "comet_ml",
    "Neptune": "neptune",
    "Trackio": "trackio",
}

# Each prints the steps and norms that the board has, in the order of the steps.
READ = {
    "Aim": """
        from aim.storage.context import Context
        metric = aim.Run(run.hash, repo="aim-repo").get_metric("gradwatch/grad_norm", Context({}))
        _, (norms, _, _) = metric.data.items_list()
        show(range(1, 1 + len(norms)), norms)
    """,
    "ClearML": """
        import json, pathlib
        folder = pathlib.Path(task.get_offline_mode_folder())
        rows = []
        for line in (folder / "metrics.jsonl").read_text().splitlines():
            rows += [one for one in json.loads(line) if one["variant"] == "grad_norm"]
        show([one["iter"] for one in rows], [one["value"] for one in rows])
    """,
    "Comet": """
        import json, pathlib, zipfile
        file = max(pathlib.Path("comet").glob("*.zip"), key=lambda one: one.stat().st_mtime)
        lines = zipfile.ZipFile(file).read("messages.json").decode().splitlines()
        rows = [json.loads(line)["payload"].get("metric", {}) for line in lines]
        rows = [one for one in rows if one.get("metricName") == "gradwatch/grad_norm"]
        show([one["step"] for one in rows], [one["metricValue"] for one in rows])
    """,
    "Neptune": """
        import json, pathlib
        text = next(pathlib.Path(".neptune").rglob("data-*.log")).read_text()
        rows, decoder = [], json.JSONDecoder()
        while text.strip("\\0 \\n"):
            entry, end = decoder.raw_decode(text.lstrip("\\0 \\n"))
            text = text.lstrip("\\0 \\n")[end:]
            operation = entry["obj"]
            if operation["path"] == ["gradwatch", "grad_norm"]:
                rows += operation["values"]
        show([one["step"] for one in rows], [one["value"] for one in rows])
    """,
    "Trackio": """
        import json, os, pathlib, sqlite3
        file = next(pathlib.Path(os.environ["TRACKIO_DIR"]).glob("*.db"))
        rows = sqlite3.connect(file).execute("SELECT step, metrics FROM metrics ORDER BY step").fetchall()
        show([step for step, _ in rows], [json.loads(one)["gradwatch/grad_norm"] for _, one in rows])
    """,
}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs the snippets of a section, one after the other; what they define, and print."""
    monkeypatch.chdir(tmp_path)

    def snippets(section):
        names = {}
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            for snippet in SNIPPETS[section]:
                exec(compile(snippet, section, "exec"), names)
        return {**names, "printed": printed.getvalue()}

    return snippets


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:mlflow", "ignore::ResourceWarning")
def test_mlflow(run, monkeypatch):
    """The run has 100 rows of ours and 10 of the loop's."""
    mlflow = pytest.importorskip("mlflow", reason="NOT TESTED: MLflowSink without MLflow")
    pytest.importorskip("sqlalchemy", reason="NOT TESTED: MLflowSink without a database for MLflow")
    before = mlflow.get_tracking_uri()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER", "0")
    monkeypatch.setattr(mlflow.tracking.fluent, "_active_experiment_id", None)
    logging.getLogger("mlflow").setLevel(logging.WARNING)
    try:
        run("MLflow")
        client = mlflow.MlflowClient()
        run_id = mlflow.last_active_run().info.run_id
        assert len(client.get_metric_history(run_id, "gradwatch/grad_norm")) == 100
        assert len(client.get_metric_history(run_id, "gradwatch_blocks/0")) == 100
        assert len(client.get_metric_history(run_id, "loss")) == 10
    finally:
        mlflow.set_tracking_uri(before)


def test_json_lines(run):
    """pandas finds the step whose gradient was NaN, and jq too where there is one."""
    names = run("JSON lines")
    assert "[50] ['NaN in the gradient of" in names["printed"]
    assert len(names["steps"]) == 100
    asked = next(line for line in PAGE.splitlines() if line.startswith("jq -r "))
    if shutil.which("jq"):
        done = subprocess.run(["sh", "-c", asked], capture_output=True, text=True, check=True)
        assert done.stdout == "50\n"


def test_duckdb(run):
    """DuckDB reads the numbers, NaN too, as the page says."""
    duckdb = pytest.importorskip("duckdb", reason="NOT TESTED: JSON lines in DuckDB")
    names = run("JSON lines")
    asked = next(line for line in PAGE.splitlines() if line.startswith("duckdb -c "))
    rows = duckdb.sql(asked.split('"')[1]).fetchall()
    norms = names["steps"]["grad_norm"]
    assert rows[0][0] == 50  # DuckDB sorts NaN above all numbers
    assert [norm for _, norm in rows[1:]] == norms.dropna().nlargest(4).tolist()


def test_prometheus(run):
    """The file is there, with the labels."""
    pytest.importorskip(
        "prometheus_client", reason="NOT TESTED: PrometheusSink without its library"
    )
    run("Prometheus")
    text = Path("collector/gradwatch.prom").read_text(encoding="utf-8")
    assert 'gradwatch_steps_total{optimizer="SGD",run="lr0.1"} 100.0' in text
    assert 'gradwatch_block_norm{block="0",optimizer="SGD",run="lr0.1"}' in text
    table = PAGE.partition("| metric |")[2].partition("\n\n")[0]
    for name in ("grad_norms", "clipped_steps_total", "events_total", "training_running"):
        assert f"`gradwatch_{name}`" in table
        assert f"gradwatch_{name}" in text


def test_the_text_log(run, caplog):
    """Three lines come in 150 steps."""
    caplog.set_level(logging.INFO, logger="gradwatch")
    run("The text log")
    lines = [one.getMessage() for one in caplog.records if one.name == "gradwatch.steps"]
    assert [one.split(":")[0] for one in lines] == [f"gradwatch step {n}" for n in (50, 100, 150)]


def test_anything_else(run):
    """The function is called for each step."""
    assert len(run("Anything else")["printed"].splitlines()) == 20


@pytest.mark.slow
@pytest.mark.parametrize("board", NEEDS)
def test_recipes(board, tmp_path):
    """All 20 steps are on the board, with the numbers of history.steps()."""
    pytest.importorskip(NEEDS[board], reason=f"NOT TESTED: the recipe for {board}, not installed")
    loop = SNIPPETS["Anything else"][0].rpartition("\n\n\n")[0]
    (recipe,) = SNIPPETS[board]
    show = "import json\nshow = lambda steps, norms: print('BOARD', json.dumps([list(steps), list(norms)]))"
    keep = "watcher = train("
    read = textwrap.dedent(READ[board])
    norms = "print('HISTORY', watcher.history.steps()['grad_norm'].tolist())"
    script = tmp_path / "recipe.py"
    script.write_text(
        "\n".join([loop, recipe.replace("\ntrain(", f"\n{keep}"), show, norms, read]), "utf-8"
    )
    environment = processes.environment(
        TRACKIO_DIR=str(tmp_path / "trackio"),
        CLEARML_CACHE_DIR=str(tmp_path / "clearml"),
        COMET_OFFLINE_DIRECTORY=str(tmp_path / "comet"),
    )
    done = processes.run(script, cwd=tmp_path, env=environment)
    found = dict(
        line.split(" ", 1)
        for line in done.stdout.splitlines()
        if line.startswith(("BOARD", "HIST"))
    )
    assert found.keys() == {"BOARD", "HISTORY"}, done.stdout + done.stderr
    steps, values = json.loads(found["BOARD"])
    assert steps == list(range(1, 21))
    assert values == json.loads(found["HISTORY"])


def test_the_page_names_what_was_run():
    """Each recipe says with which version it was run."""
    for board in NEEDS:
        text = PAGE.partition(f"### {board}\n")[2].partition("###")[0]
        assert f"\n{board} " in text
