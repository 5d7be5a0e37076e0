"""`gradwatch run` with torch: what is watched, what is said, and what a program shows of its errors."""

import contextlib
import subprocess
import sys
import textwrap
import traceback

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch.cli import frames
from tests.support import processes

from .foreign import QUIET, names_in, run

RUN = ("-m", "gradwatch", "run")

TRAINING = """
    import atexit, os, sys, logging
    assert "torch" not in sys.modules
    atexit.register(lambda: train(Late(), 3))
    import torch
    from torch import nn

    class Net(nn.Sequential): pass
    class Late(nn.Linear):
        def __init__(self): super().__init__(2, 1)

    def train(model, steps, bad=None):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(steps):
            x = torch.ones(4, 2)
            if step == bad:
                x[1] = float("nan")
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        print(type(model).__name__, [p.tolist() for p in model.parameters()], flush=True)

    torch.manual_seed(0)
    train(Net(nn.Linear(2, 3), nn.Linear(3, 1)), 20, bad=18)
    print([type(one) for one in sys.meta_path], torch.__spec__.loader.__class__.__name__, logging.root.handlers)
    if os.fork() == 0:
        sys.exit(0)
    os.wait()
    sys.exit("over")
    """


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A training, plain and under `gradwatch run`; it prints, forks, and trains at the exit."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "train.py").write_text(textwrap.dedent(TRAINING))
    plain = run("train.py", cwd=folder)
    assert names_in(folder) == ["train.py"]
    ours = run(*RUN, "train.py", cwd=folder, GRADWATCH_STATISTICS="max")
    return folder, plain, ours


def _said(ran):
    return [line for line in ran.err.splitlines() if line.startswith("gradwatch: ")]


def test_a_training_is_as_it_was(trained):
    """Weights, output and exit code are those of the plain program."""
    _, plain, ours = trained
    assert (ours.code, ours.out) == (plain.code, plain.out)
    assert plain.code == 1
    rest = [line for line in ours.err.splitlines() if not line.startswith("gradwatch: ")]
    assert rest == plain.err.splitlines() == ["over"]


def test_the_first_step_of_each_model_is_told(trained):
    """With its parameters, its optimizer and its folder."""
    folder, _, ours = trained
    (kept,) = names_in(folder / "runs")
    said = _said(ours)
    what = "4 parameters (13 elements), SGD"
    assert said[0] == f"gradwatch: watching Net: {what} -> runs/{kept}/Net"
    assert any(line.startswith("gradwatch: watching Late: 2 parameters") for line in said)


def test_the_end_has_the_findings_and_where_to_look(trained):
    """Once, though the program had a child; and after what it trained at the exit."""
    folder, _, ours = trained
    (kept,) = names_in(folder / "runs")
    net, nan, late, line, look = _said(ours)[-5:]
    assert net == "gradwatch: Net: 20 steps, 4 parameters, 1 finding."
    assert nan.startswith("gradwatch:   [critical] nan: NaN in 2 steps, from step 19 on")
    assert late == "gradwatch: Late: 3 steps, 2 parameters. Nothing was found."
    assert line.startswith(
        "gradwatch: For the line of code that made the NaN: gradwatch run --on-n"
    )
    assert look.startswith(f"gradwatch: The run is in runs/{kept}: gradwatch report runs/{kept} ")


def test_the_whole_run_is_in_its_folder(trained):
    """A folder for each model, with all steps and the statistics that were asked for."""
    folder, _, _ = trained
    (kept,) = names_in(folder / "runs")
    histories = {name: gradwatch.load(folder / "runs" / kept / name) for name in ("Net", "Late")}
    assert {name: len(one.steps()) for name, one in histories.items()} == {"Net": 20, "Late": 3}
    assert "max" in histories["Net"].parameters().columns
    assert set(histories["Net"].parameters()["parameter"]) == {
        "0.weight",
        "0.bias",
        "1.weight",
        "1.bias",
    }


def _fails_in_backward(model, optimizer):
    torch.ones(3).sum().backward()


def _fails_in_a_function_of_its_own(model, optimizer):
    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, gradient):
            raise ValueError("mine")

    Failing.apply(model(torch.ones(3, 2))).sum().backward()


def _fails_in_a_hook(model, optimizer):
    model.weight.register_hook(lambda gradient: 1 / 0)
    model(torch.ones(3, 2)).sum().backward()


def _fails_in_a_closure(model, optimizer):
    def closure():
        model(torch.ones(3, 2)).sum().backward()
        raise KeyError("x")

    optimizer.step(closure)


def _fails_in_a_later_closure(model, optimizer):
    calls = []

    def closure():
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("third")
        optimizer.zero_grad()
        loss = model(torch.ones(3, 2)).square().sum()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)


def _fails_in_forward(model, optimizer):
    model(torch.ones(3, 2)).sum().backward()
    optimizer.step()
    model(torch.ones(3, 3))


def _fails_in_a_chain(model, optimizer):
    try:
        torch.ones(3).sum().backward()
    except RuntimeError as error:
        raise ValueError("later") from error


CASES = [
    _fails_in_backward,
    _fails_in_a_function_of_its_own,
    _fails_in_a_hook,
    _fails_in_a_closure,
    _fails_in_a_later_closure,
    _fails_in_forward,
    _fails_in_a_chain,
]


def _shown(case, watching):
    torch.manual_seed(0)
    with watching:
        model = nn.Linear(2, 1)
        optimizer = torch.optim.LBFGS(model.parameters())
        try:
            case(model, optimizer)
        except Exception as error:
            frames.strip(error)
            return "".join(traceback.format_exception(error))
    raise AssertionError("it did not fail")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__.strip("_"))
@pytest.mark.filterwarnings("ignore::gradwatch.GradwatchWarning")
def test_errors_are_shown_without_our_frames(case):
    """Of the engine, of closures and of hooks: the traceback is that of the plain program."""
    plain = _shown(case, contextlib.nullcontext())
    assert _shown(case, gradwatch.watch_all()) == plain
    assert "torch" in plain


def test_errors_of_gradwatch_that_the_program_calls_keep_their_frames():
    """A program that uses gradwatch itself sees where its call went wrong."""
    with pytest.raises(ValueError, match="clip=") as caught:
        gradwatch.watch(nn.Linear(1, 1), clip=-1)
    before = traceback.format_exception(caught.value)
    frames.strip(caught.value)
    assert traceback.format_exception(caught.value) == before


@pytest.mark.slow
def test_a_program_that_fails_in_backward_ends_as_plain(tmp_path):
    """In a process of its own, with Python's own ending."""
    (tmp_path / "x.py").write_text(
        "import torch\nnet = torch.nn.Linear(1, 1)\n"
        "optimizer = torch.optim.SGD(net.parameters())\ntorch.ones(1).backward()\n"
    )
    plain = run("x.py", cwd=tmp_path)
    assert run(*QUIET, "x.py", cwd=tmp_path) == plain
    assert names_in(tmp_path) == ["x.py"]  # a run in which nothing was trained leaves no folder


@pytest.mark.slow
def test_without_pyarrow_the_report_is_printed(tmp_path):
    """There is no run folder; the end says how to get one. A closed stderr does not matter."""
    (tmp_path / "train.py").write_text(textwrap.dedent(TRAINING))
    start = (
        "import sys; sys.modules['pyarrow'] = None; from gradwatch.cli.main import main; "
        "sys.exit(main(['run', *sys.argv[1:]]))"
    )
    ran = run("-c", start, "train.py", cwd=tmp_path)
    assert ran.code == 1
    assert names_in(tmp_path) == ["train.py"]
    assert any(line.startswith("gradwatch: 1. [critical] nan: NaN in 2") for line in _said(ran))
    assert _said(ran)[-1].endswith("To keep it: pip install 'gradwatch[runs]'.")
    refused = run("-c", start, "--run-dir", "a", "train.py", cwd=tmp_path)
    assert (refused.code, refused.out) == (2, "")
    assert "--run-dir needs pyarrow" in refused.err
    command = f"exec {sys.executable} -m gradwatch run train.py 2>&-"
    closed = subprocess.run(
        command,
        shell=True,
        cwd=tmp_path,
        env=processes.environment(),
        capture_output=True,
        check=False,
    )
    assert (closed.returncode, closed.stdout.decode()) == (1, ran.out)


@pytest.mark.slow
def test_the_end_claims_only_what_was_written(tmp_path):
    """A disk that fails, an address that nothing here can write to: no line says that a run is there."""
    program = """
        import os, torch
        from gradwatch.record.folder import writer
        def full(*args):
            raise OSError(28, "No space left on device")
        writer.Session.write = full
        model = torch.nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            model(torch.ones(4, 2)).sum().backward()
            optimizer.step()
        """
    (tmp_path / "train.py").write_text(textwrap.dedent(program))
    ran = run(*RUN, "--tensorboard", "none://a/b", "--run-dir", "a", "train.py", cwd=tmp_path)
    assert ran.code == 0
    said = "\n".join(_said(ran))
    assert "No space left on device" in said
    assert "TensorBoardWriter failed" in said
    assert "gradwatch: Linear: 2 steps" in said
    assert "The run is in" not in said
    assert "tensorboard --logdir" not in said


@pytest.mark.slow
def test_the_end_tells_of_all_steps_of_a_long_run(tmp_path):
    """Not only of the newest ones, which memory holds."""
    program = """
        import torch
        model = torch.nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(60):
            x = torch.full((4, 2), float("nan") if step == 2 else 1.0)
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        """
    (tmp_path / "train.py").write_text(textwrap.dedent(program))
    (tmp_path / "a.json").write_text('{"buffer_size": 8}')
    words = ("--config", "a.json", "--on-nonfinite", "skip", "train.py")
    said = _said(run(*RUN, *words, cwd=tmp_path))
    assert any(line.startswith("gradwatch: Linear: 60 steps, 2 parameters, ") for line in said)
    assert any("1 step of 60 (1.7%) was not applied, the first at step 3." in line for line in said)


@pytest.mark.slow
def test_children_that_train_are_told_of(tmp_path):
    """They are not watched, and the end says what to do instead."""
    program = """
        import multiprocessing
        def train():
            import torch
            model = torch.nn.Linear(1, 1)
            torch.optim.SGD(model.parameters(), lr=0.1).step()
        if __name__ == "__main__":
            child = multiprocessing.get_context("spawn").Process(target=train)
            child.start(); child.join()
        """
    (tmp_path / "x.py").write_text(textwrap.dedent(program))
    ran = run(*RUN, "x.py", cwd=tmp_path)
    assert (ran.code, ran.out) == (0, "")
    (said,) = ran.err.splitlines()
    assert said.startswith("gradwatch: Nothing was watched: the program did not import torch")
    assert "Other processes that it started are not watched." in said
    assert "gradwatch.watch_all()" in said


@pytest.mark.slow
def test_what_only_torch_can_tell_is_wrong_ends_the_program_when_it_imports_torch(tmp_path):
    """The same error as of watch_all(), and exit code 2."""
    (tmp_path / "a.json").write_text('{"keep_batches": true}')
    code = "print('begun'); import torch; print('not reached')"
    ran = run(*RUN, "--config", "a.json", "-c", code, cwd=tmp_path)
    assert (ran.code, ran.out) == (2, "begun\n")
    assert ran.err.startswith("gradwatch run: watch_all(keep_batches=True)")


@pytest.mark.slow
def test_two_ranks_of_torchrun_write_one_run(tmp_path):
    """One writer, one folder; rank 0 alone speaks."""
    program = """
        import torch, torch.distributed as dist
        dist.init_process_group("gloo")
        torch.manual_seed(dist.get_rank())
        model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(5):
            model(torch.randn(4, 2)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        dist.destroy_process_group()
        """
    (tmp_path / "ddp.py").write_text(textwrap.dedent(program))
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    ran = run(*launcher, *RUN, "ddp.py", cwd=tmp_path)
    assert ran.code == 0
    assert len(_said(ran)) == 3
    (kept,) = names_in(tmp_path / "runs")
    history = gradwatch.load(tmp_path / "runs" / kept / "Linear")
    assert list(history.steps()["grad_norm"].notna()) == [True] * 5
