"""The command as a process: pipes that close, signals, terminals, and a run that is being written."""

import fcntl
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
from contextlib import suppress
from pathlib import Path
from select import select

import pytest

import gradwatch

from .runs import batch, write

ROOT = Path(gradwatch.__file__).parent.parent
COMMAND = [sys.executable, "-m", "gradwatch"]
ENVIRONMENT = {
    "PATH": "/usr/bin:/bin",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
    "TERM": "xterm-256color",
    "LANG": "C.UTF-8",
}
A_HANG_S = 300.0
"""Whatever has not come by then never will."""

LINES, COLUMNS = 24, 80
_started = []

TRAIN = """
import sys, torch, gradwatch
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
with gradwatch.watch(model, optimizer, run_dir=sys.argv[1]):
    for step in range(1000):
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 500:
            print("half", flush=True)
            sys.stdin.readline()
"""


def _start(*arguments, command=COMMAND, **options):
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8", **options}
    process = subprocess.Popen([*command, *map(str, arguments)], env=ENVIRONMENT, **options)
    _started.append(process)
    return process


def _terminal(columns=COLUMNS):
    """Both sides of a terminal of some width, whatever that of the tests is."""
    mine, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, columns, 0, 0))
    return mine, theirs


def _ended(process):
    out, err = process.communicate(timeout=A_HANG_S)
    return process.returncode, out, err


@pytest.fixture(autouse=True)
def _processes(tmp_path, monkeypatch):
    """Gives them an empty home, lets them hear Ctrl-C, and leaves none behind.

    A shell that starts the tests in the background has them ignore it, and so their children.
    """
    (tmp_path / "home").mkdir()
    monkeypatch.setitem(ENVIRONMENT, "HOME", str(tmp_path / "home"))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
    while _started:
        with _started.pop() as process:
            process.kill()


@pytest.fixture
def long_run(tmp_path):
    """A run of many steps."""
    write(tmp_path / "run", batch(range(1, 20_001)))
    return tmp_path / "run"


def test_a_reader_that_has_enough_is_no_error(long_run):
    """`gradwatch export ... | head -1` is silent, and its exit code 0."""
    process = _start("export", long_run)
    assert process.stdout.readline().startswith("step,optimizer")
    process.stdout.close()
    assert process.wait(A_HANG_S) == 0
    with process.stderr as errors:
        assert errors.read() == ""


def test_no_output_at_all_is_no_error(long_run):
    """With standard output closed the exit code is still what the command found."""
    shell = ["sh", "-c", '"$@" >&-', "sh", *COMMAND]
    code, _, err = _ended(_start("report", long_run, command=shell))
    assert (code, err) == (0, "")


def test_an_encoding_without_the_characters(tmp_path):
    """In a locale without Unicode, names are escaped rather than an error."""
    write(tmp_path / "a", batch([1, 2], ("宽", "b")))
    write(tmp_path / "b", batch([1, 2], ("宽", "b"), norm=2.0))
    shell = ["env", "PYTHONIOENCODING=ascii", *COMMAND]
    code, out, err = _ended(_start("compare", tmp_path / "a", tmp_path / "b", command=shell))
    assert (code, err) == (0, "")
    assert "\\u5bbd" in out


@pytest.mark.slow
def test_follows_a_run_that_is_written(tmp_path):
    """A live training is followed to its last step; Ctrl-C ends it with exit code 0."""
    training = _start(
        tmp_path / "run", command=[sys.executable, "-c", TRAIN], stdin=subprocess.PIPE
    )
    assert training.stdout.readline() == "half\n"
    tail = _start("tail", tmp_path / "run", "-n", "1024", "--interval", "0.1")
    lines = [tail.stdout.readline()]
    training.communicate("go\n", timeout=A_HANG_S)
    while not lines[-1].startswith("step    1,000"):
        lines.append(tail.stdout.readline())
    tail.send_signal(signal.SIGINT)
    assert _ended(tail) == (0, "", "")
    steps = [line.split()[1] for line in lines if line.startswith("step ")]
    assert steps == [f"{step:,}" for step in range(1, 1001)]


@pytest.mark.parametrize(
    ("columns", "ending", "code"),
    [(30, signal.SIGINT, 0), (80, signal.SIGTERM, 143), (200, signal.SIGINT, 0)],
)
def test_the_screen_leaves_the_terminal_in_order(long_run, columns, ending, code):
    """On a terminal it draws, and shows the cursor again after Ctrl-C and after SIGTERM."""
    mine, theirs = _terminal(columns)
    process = _start("tail", long_run, stdout=theirs, stderr=theirs, stdin=theirs)
    os.close(theirs)
    shown = _read_until(mine, b"Ctrl-C ends")
    process.send_signal(ending)
    shown += _read_until(mine, b"\x1b[?25h")
    assert process.wait(A_HANG_S) == code
    os.close(mine)
    assert b"step 20,000" in shown
    assert b"Traceback" not in shown


def _read_until(terminal, wanted):
    """What a terminal shows up to some text; all that it ever shows where that does not come."""
    shown = b""
    with suppress(OSError):  # the other side is closed
        while wanted not in shown and select([terminal], [], [], A_HANG_S)[0]:
            shown += os.read(terminal, 1 << 16)
    return shown


def test_help_starts_without_torch_and_pandas():
    """What is not needed for the help is not loaded."""
    code = (
        "import sys, gradwatch.cli.main; gradwatch.cli.main.main(['--help']); "
        "print(*{'torch', 'numpy', 'pandas', 'pyarrow', 'rich', 'matplotlib'}.intersection(sys.modules))"
    )
    returned, out, err = _ended(_start(command=[sys.executable, "-c", code]))
    assert (returned, err) == (0, "")
    assert out.splitlines()[-1] == ""


def test_the_module_is_the_command(long_run):
    """`python -m gradwatch` is the script, under its name."""
    module = [sys.executable, "-m", "gradwatch"]
    code, _, err = _ended(_start("report", long_run / "x", command=module))
    assert (code, err.count("\n")) == (2, 1)
    assert err.startswith("gradwatch report: There is no folder")


def test_a_process_that_was_killed_leaves_a_run_to_read(tmp_path, command):
    """After SIGKILL every command reads what had been written."""
    training = _start(
        tmp_path / "run", command=[sys.executable, "-c", TRAIN], stdin=subprocess.PIPE
    )
    assert training.stdout.readline() == "half\n"
    training.kill()
    training.communicate()
    for name, *options in (
        ["report"],
        ["explain"],
        ["tail", "--once"],
        ["export", "--table", "parameters"],
    ):
        ran = command(name, tmp_path / "run", *options)
        assert (ran.code, ran.err) == (0, "")
        assert ran.out


def test_without_rich_tail_writes_lines(long_run, tmp_path):
    """Where rich is not installed, tail says so in a line and goes on with plain lines."""
    code = (
        "import sys; sys.modules['rich'] = None; "
        "import gradwatch.cli.main; sys.exit(gradwatch.cli.main.main(sys.argv[1:]))"
    )
    mine, theirs = _terminal()
    tail = _start("tail", long_run, command=[sys.executable, "-c", code], stdout=theirs)
    os.close(theirs)
    assert b"step   20,000" in _read_until(mine, b"step   20,000")
    tail.send_signal(signal.SIGINT)
    assert tail.wait(A_HANG_S) == 0
    with tail.stderr as errors:
        assert "pip install 'gradwatch[runs]'" in errors.read()
    os.close(mine)
