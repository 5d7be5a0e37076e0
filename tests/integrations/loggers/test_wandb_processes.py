"""WandbSink in programs that end without a word, fork, lose W&B's service, or have no W&B."""

import os
import textwrap

import pytest

from tests.support import processes

pytest.importorskip("wandb", reason="NOT TESTED: WandbSink, without wandb")

from tests.support.wandb_runs import rows, series

NORM = "gradwatch/grad_norm"
BEGIN = textwrap.dedent(
    """
    import os, sys, threading, time
    import torch, wandb, gradwatch
    from gradwatch_loggers import WandbSink

    settings = wandb.Settings(mode="offline", console="off", silent=True, x_disable_stats=True)
    run = wandb.init(project="tests", dir=sys.argv[1], settings=settings)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    sink = WandbSink(run, media=False)

    def train(steps):
        for _ in range(steps):
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    """
)


def run(folder, code):
    """Runs a program that begins like the others; what it printed."""
    # Not the service of this process, which outlives the program.
    base = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    env = processes.environment(base=base)
    return processes.run(folder, code=BEGIN + textwrap.dedent(code), env=env)


@pytest.mark.slow
@pytest.mark.parametrize("closes", [True, False])
def test_a_program_may_end_without_a_word(closes, tmp_path):
    """Rows that wait are written at the exit, whether the watcher was closed or not."""
    done = run(
        tmp_path,
        f"""
        watcher = gradwatch.watch(model, optimizer, sinks=[sink]).attach()
        for epoch in range(3):
            train(10)
            run.log({{"loss": 1.0}}, step=epoch)
        if {closes}:
            watcher.close()
        """,
    )
    assert (done.returncode, done.stderr) == (0, "")
    found = rows(tmp_path)
    assert [step for step, _ in series(found, NORM)] == list(range(1, 31))
    assert [row["_step"] for row in found if "loss" in row] == [0, 1, 2]


@pytest.mark.slow
def test_a_fork_writes_nothing_of_ours(tmp_path):
    """What the child logs is its own; all rows of the parent are there once."""
    done = run(
        tmp_path,
        """
        with gradwatch.watch(model, optimizer, sinks=[sink]):
            train(5)
            child = os.fork()
            if child == 0:
                os._exit("log" not in vars(run))
            assert os.waitpid(child, 0)[1] == 0
            train(5)
        run.finish()
        """,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert [step for step, _ in series(rows(tmp_path), NORM)] == list(range(1, 11))


@pytest.mark.slow
@pytest.mark.parametrize("live", [True, None])
def test_the_training_goes_on_without_the_service(live, tmp_path):
    """It is killed in the middle; the records that are lost are counted."""
    done = run(
        tmp_path,
        f"""
        import signal
        from pathlib import Path

        sink = WandbSink(run, media=False, live={live})
        with gradwatch.watch(model, optimizer, sinks=[sink]) as watcher:
            train(10)
            for status in Path("/proc").glob("[0-9]*/status"):
                fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
                if fields["Name"].strip().startswith("wandb-core"):
                    if int(fields["PPid"]) == os.getpid():
                        os.kill(int(status.parent.name), signal.SIGKILL)
            while True:
                try:
                    run.step
                except Exception:
                    break
                time.sleep(0.05)
            train(100)
        print("trained", len(watcher.history))
        """,
    )
    assert done.stdout == "trained 110\n", done.stderr
    assert "Lost: " + ("steps 10" if live else "110 rows") in done.stderr


def test_missing_wandb_is_named(tmp_path):
    """The error tells the command that installs it; asking for the package alone is no error."""
    done = processes.run(
        code="""
        import sys
        sys.modules["wandb"] = None
        import gradwatch_loggers
        gradwatch_loggers.WandbSink
        """
    )
    assert "pip install 'gradwatch[wandb]'" in done.stderr.splitlines()[-1]
