"""`%load_ext gradwatch` and `%%gradwatch` in a real IPython."""

import atexit
import gc
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import gradwatch

from .support import processes

pytest.importorskip("IPython", reason="NOT TESTED: notebooks. pip install 'gradwatch[dev]'")

from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from traitlets.config import Config

MODEL = """
import torch
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
x = torch.ones(4, 3)
def train(steps):
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return steps
"""


class Ran:
    """What a cell has left: its result, and what it showed."""

    def __init__(self, result, shown):
        self.result = result
        self.out, self.err = shown.stdout, shown.stderr
        self.html = [one.data["text/html"] for one in shown.outputs if "text/html" in one.data]
        self.text = self.out + "".join(one.data["text/plain"] for one in shown.outputs)


@pytest.fixture
def shell(tmp_path, monkeypatch):
    """An IPython with the extension loaded."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    config = Config()
    config.HistoryManager.enabled = False
    config.InteractiveShell.colors = "nocolor"
    config.InteractiveShell.xmode = "Context"
    InteractiveShell.clear_instance()
    main, hook = sys.modules["__main__"], sys.displayhook
    one = InteractiveShell.instance(config=config)
    one.run_cell("%load_ext gradwatch").raise_error()
    yield one
    one.run_cell("%unload_ext gradwatch")
    one.atexit_operations()
    atexit.unregister(one.atexit_operations)
    InteractiveShell.clear_instance()
    sys.modules["__main__"], sys.displayhook = main, hook


@pytest.fixture
def run(shell):
    """Runs a cell."""

    def run(cell):
        with capture_output() as shown:
            result = shell.run_cell(cell)
        return Ran(result, shown)

    return run


@pytest.fixture
def trained(run):
    """Runs a cell, after one that has made a model, an optimizer and train()."""
    run(MODEL).result.raise_error()
    return run


def test_the_report_is_the_output_of_the_cell(trained):
    """A cell that trains what earlier cells have made shows its report, as HTML and as text."""
    ran = trained("%%gradwatch\ntrain(3)")
    ran.result.raise_error()
    assert "Sequential" in ran.err
    assert len(ran.html) == 1
    assert "3 steps, 4 parameters" in ran.html[0]
    assert "3 steps, 4 parameters" in ran.text


def test_the_cell_is_run_as_any_other(trained, shell):
    """Its output, its last expression and its variables are there as ever; they come before the report."""
    ran = trained("%%gradwatch\nprint('begin')\nloss = train(2)\nloss + 40")
    assert ran.result.result == 42
    assert shell.user_ns["loss"] == 2
    assert ran.text.index("begin") < ran.text.index("42") < ran.text.index("gradwatch report")


def test_the_training_is_the_same(trained, shell):
    """The weights are those of a cell that is not watched, bit by bit."""
    trained("train(5)")
    plain = [one.detach().clone() for one in shell.user_ns["model"].parameters()]
    trained(MODEL)
    trained("%%gradwatch --statistics max\ntrain(5)").result.raise_error()
    assert all(map(torch.equal, plain, shell.user_ns["model"].parameters()))


def test_the_norms_are_those_of_the_gradients(trained, shell):
    """The run has the norm of each parameter, from the first step on, by its name."""
    pytest.importorskip("pyarrow", reason="NOT TESTED: run folders. pip install 'gradwatch[runs]'")
    trained(
        "%%gradwatch --run-dir runs/a\n"
        "norms = {}\n"
        "for step in (1, 2):\n"
        "    train(1)\n"
        "    norms |= {(step, name): one.grad.norm().item() for name, one in model.named_parameters()}"
    ).result.raise_error()
    frame = gradwatch.load("runs/a/Sequential").parameters()
    found = {(one.step, one.parameter): one.grad_norm for one in frame.itertuples()}
    assert found == pytest.approx(shell.user_ns["norms"], rel=1e-6)
    assert len(found) == 8


def test_an_error_is_shown_as_ever(trained):
    """The traceback is that of a cell that is not watched, line numbers and all, and the report comes after it."""
    body = "\ntrain(2)\n\n\n\n\n\n1 / 0"
    plain, watched = trained("pass" + body), trained("%%gradwatch" + body)
    assert isinstance(watched.result.error_in_exec, ZeroDivisionError)
    below = [one.out[one.out.index("----> ") :].splitlines() for one in (plain, watched)]
    assert below[0] == below[1][: len(below[0])]
    assert "notebook.py" not in watched.text
    assert "2 steps, 4 parameters" in watched.text
    assert watched.text.index("ZeroDivisionError") < watched.text.index("gradwatch report")


def test_a_cell_may_await(trained):
    """A cell with an await at its top level is watched like any other."""
    cell = "%%gradwatch\nimport asyncio\nawait asyncio.sleep(0)\ntrain(2)"
    # In a thread: a browser that another test has open runs an event loop in this one.
    with ThreadPoolExecutor(1) as pool:
        ran = pool.submit(trained, cell).result()
    assert ran.result.result == 2
    assert "2 steps, 4 parameters" in ran.text


def test_the_options_are_those_of_gradwatch_run(trained, shell):
    """`--clip` acts, and words in braces are the notebook's variables."""
    shell.user_ns["most"] = 1e-3
    ran = trained(
        "%%gradwatch --clip {most} --on-nonfinite skip\ntrain(1)\n"
        "torch.nn.utils.get_total_norm([one.grad for one in model.parameters()]).item()"
    )
    assert ran.result.result == pytest.approx(1e-3, rel=1e-4)
    assert "1 step, 4 parameters" in ran.text


def test_the_first_step_of_the_cell_is_explained(trained):
    """A NaN in the first batch is explained to its line, though its model was built in an earlier cell."""
    ran = trained("%%gradwatch --on-nonfinite explain\nx[1, 0] = float('nan')\ntrain(1)")
    assert "1 of 12 elements of the input input (float32, [4, 3]) is NaN, in example 1." in ran.err
    assert "model(x).square()" in ran.err


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("--on-nonfinite sometimes", "must be one of record, skip, raise, explain"),
        ("--evry 3", "unrecognized arguments: --evry 3"),
        ("--clip", "expected one argument"),
        ("--run-dir 'a", "No closing quotation"),
        ("--run-dir /dev/null/a", "--run-dir /dev/null/a cannot be written to: Not a directory"),
    ],
)
def test_a_wrong_option_is_told_on_one_line_before_the_cell_runs(trained, line, told):
    """Nothing of the cell is run, and there is no traceback."""
    ran = trained(f"%%gradwatch {line}\nprint('was here')")
    assert not ran.result.success
    (shown,) = [one for one in (ran.out + ran.err).splitlines() if one]
    assert shown.startswith("UsageError: %gradwatch: ")
    assert told in shown
    assert "3 steps" in trained("%%gradwatch\ntrain(3)").text


def test_a_run_is_kept_where_it_is_asked_for(trained):
    """The line that tells where is as short as what was typed; the help says what happens without."""
    ran = trained("%%gradwatch --run-dir kept\ntrain(2)")
    assert ran.err.endswith(f", SGD -> kept{os.sep}Sequential\n")
    assert "(default: it is not kept)" in " ".join(trained("%gradwatch --help").text.split())


def test_the_help_lists_the_options(run):
    """`%gradwatch --help` is the help of the options, and no error."""
    ran = run("%gradwatch --help")
    assert ran.result.success
    assert "--on-nonfinite" in ran.out
    assert ran.html == []


def test_the_line_watches_to_the_end_of_the_cell(trained):
    """`%gradwatch` begins where it stands; what was trained before it is not watched."""
    assert "3 steps, 4 parameters" in trained("train(2)\n%gradwatch\ntrain(3)").text


def test_each_cell_has_a_watch_of_its_own(trained):
    """A watch ends with its cell: the next one begins at step 1, and a cell without one shows nothing."""
    assert "3 steps" in trained("%%gradwatch\ntrain(3)").text
    assert "report" not in trained("train(4)").text
    assert "2 steps" in trained("%%gradwatch\ntrain(2)").text


def test_quiet_shows_nothing(trained):
    """With `--quiet` a cell shows what it shows itself."""
    ran = trained("%%gradwatch --quiet\n_ = train(2)")
    assert (ran.text, ran.err) == ("", "")


def test_nothing_watched_is_said(run):
    """A cell that trains nothing says so in one sentence."""
    assert "Nothing was watched" in run("%%gradwatch\n1 + 1").text


def test_twice_in_a_cell_is_refused(trained):
    """One cell has one watch."""
    ran = trained("%%gradwatch\n%gradwatch\ntrain(1)")
    assert "UsageError: This cell is being watched already" in ran.out + ran.err


def test_another_magic_may_follow(trained):
    """`%%gradwatch` above `%%time`, or below it, watches all the same."""
    for cell in ("%%gradwatch\n%%time\n_ = train(2)", "%%time\n%%gradwatch\n_ = train(2)"):
        ran = trained(cell)
        assert "2 steps, 4 parameters" in ran.text
        assert "Wall time" in ran.text


def test_no_model_outlives_its_cell(trained, shell):
    """What a cell has built and dropped again is gone after it."""
    trained(
        "%%gradwatch\nimport weakref\n" + MODEL + "train(2)\nrefs = [weakref.ref(model), "
        "weakref.ref(optimizer)]\ndel model, optimizer, train"
    ).result.raise_error()
    gc.collect()
    assert [ref() for ref in shell.user_ns["refs"]] == [None, None]


def test_loading_twice_and_unloading(run, shell):
    """A second load changes nothing; after an unload the magics are unknown, and can be loaded again."""
    before = len(shell.input_transformers_cleanup)
    gradwatch.load_ipython_extension(shell)
    assert len(shell.input_transformers_cleanup) == before
    run("%unload_ext gradwatch")
    assert len(shell.input_transformers_cleanup) == before - 1
    assert "not found" in "".join([(ran := run("%%gradwatch\n1")).out, ran.err])
    run("%load_ext gradwatch")
    assert len(shell.input_transformers_cleanup) == before


def test_loading_needs_no_torch():
    """`%load_ext gradwatch` loads neither torch nor NumPy."""
    code = """
import sys
from IPython.core.interactiveshell import InteractiveShell
InteractiveShell.instance().run_cell("%load_ext gradwatch").raise_error()
print({"torch", "numpy"} & set(sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=processes.environment(), capture_output=True, text=True,
        check=True, timeout=300,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "set()"
