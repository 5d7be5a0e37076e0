"""`gradwatch run`: a program prints, ends and fails as under plain Python, to the byte."""

import os
import signal
import subprocess
import sys
import textwrap
import zipfile

import pytest

from tests.support import processes

from .foreign import BESIDE, QUIET, SCRIPTS, run, script_of

FAILING = "def f():\n    return 1 / 0\n\nf()\n"
SHOWN = "import sys; print(sys.argv, sys.path[0], __file__); 1 / 0\n"


@pytest.fixture
def there(tmp_path):
    """A folder with the files that lie beside each program."""
    for name, text in BESIDE.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def _assert_same(cwd, *words, before=(), **options):
    """A program does the same plain and under `gradwatch run`, and something at all."""
    plain = run(*before, *words, cwd=cwd, **options)
    assert run(*before, *QUIET, *words, cwd=cwd, **options) == plain
    return plain


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_does_what_it_does_plain(there, name):
    """Exit status, stdout and stderr are those of plain Python, byte by byte."""
    encoding = "latin-1" if name == "an encoding" else "utf-8"
    (there / "program.py").write_text(textwrap.dedent(SCRIPTS[name]), encoding=encoding)
    _assert_same(there, "program.py", "a", "--help", "", "--", "-m")


@pytest.mark.parametrize(
    "words",
    [
        ("-m", "package", "--help", ""),
        ("-mpackage",),
        ("-m", "package.part"),
        ("-m", "package.nothing"),
        ("-m", "json.tool", "--help"),
        ("-m", "failing"),
        ("-m", "broken"),
        ("folder", "a"),
        ("./folder/",),
        ("archive.zip", "a"),
        ("./failing.py",),
        ("folder/../failing.py",),
        ("link/here.py",),
        ("-c", "import sys; print(sys.argv, sys.path[0], sorted(globals()))\n1/0", "a", ""),
        ("-cprint(1)",),
        ("-c", "x = = 1"),
    ],
)
def test_every_way_to_name_a_program(there, words):
    """Modules, folders, archives, paths, links and code run as under plain Python."""
    with zipfile.ZipFile(there / "archive.zip", "w") as archive:
        archive.writestr("__main__.py", SHOWN)
    (there / "link").mkdir()
    (there / "real.py").write_text(SHOWN)
    (there / "link" / "here.py").symlink_to(there / "real.py")
    plain = _assert_same(there, *words)
    assert plain.out or plain.code


def test_the_program_may_come_from_the_standard_input(there):
    """`-` is a program on stdin, which is at its end then."""
    program = "import sys\nprint(sys.argv, sys.stdin.read(), __file__)\n1/0\n"
    assert _assert_same(there, "-", "a", stdin=program).code == 1


def test_compiled_files_run(there):
    """A .pyc file is a program, too."""
    import py_compile

    py_compile.compile(str(there / "failing.py"), cfile=str(there / "compiled.pyc"), doraise=True)
    assert _assert_same(there, "compiled.pyc").code == 1


@pytest.mark.parametrize("flags", [("-O",), ("-W", "error"), ("-X", "utf8"), ("-B", "-u")])
def test_flags_of_python_hold(there, flags):
    """Python's own options come before -m gradwatch."""
    code = "import sys, warnings; print(sys.flags); assert 0; warnings.warn('x')"
    (there / "program.py").write_text(code)
    _assert_same(there, "program.py", before=flags)


@pytest.mark.skipif(sys.version_info < (3, 11), reason="-P is new in Python 3.11")
def test_a_safe_path_is_left_safe(there):
    """Under -P no folder is put on the path."""
    (there / "program.py").write_text("import sys; print(sys.path); import beside")
    assert _assert_same(there, "program.py", before=("-P",)).code == 1
    assert _assert_same(there, "folder", before=("-P",)).out


@pytest.mark.parametrize("name", ["its arguments", "an error", "recursion, caught", "Ctrl-C"])
def test_the_console_script_does_the_same(there, name):
    """`gradwatch run` leaves nothing of itself behind: neither its folder nor its frames."""
    (there / "program.py").write_text(textwrap.dedent(SCRIPTS[name]))
    (there / "bin").mkdir()
    script = script_of(there / "bin")
    plain = run("program.py", "x", cwd=there)
    assert run(script, "run", "--quiet", "program.py", "x", cwd=there) == plain


def test_ctrl_c_from_outside_kills_by_the_signal(there):
    """A shell sees that the program was interrupted, and so stops its own loop."""
    (there / "program.py").write_text("import time\nprint('on', flush=True)\ntime.sleep(600)\n")
    ends = []
    for words in ((), QUIET):
        process = processes.start(
            *words,
            "program.py",
            cwd=there,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A process that was started in the background hands on that it ignores the signal.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        assert process.stdout.readline() == "on\n"
        process.send_signal(signal.SIGINT)
        _, shown = process.communicate(timeout=processes.HANG_S)
        # Which line it is on when the signal comes is nobody's to say.
        first, where, *_, last = shown.splitlines()
        ends.append((first, where.partition(", line")[0], last, process.returncode))
    assert ends[0] == ends[1]
    assert ends[0][2:] == ("KeyboardInterrupt", -signal.SIGINT)


def test_a_pipe_that_closes_is_the_programs_own(there):
    """`| head` ends a program as it does plain."""
    (there / "program.py").write_text("for i in range(100_000):\n    print(i)\n")
    ends = []
    for words in ((), QUIET):
        with processes.start(
            *words, "program.py", cwd=there, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            process.stdout.readline()
            process.stdout.close()
            ends.append((process.stderr.read(), process.wait(processes.HANG_S)))
    assert ends[0] == ends[1]
    assert b"BrokenPipeError" in ends[0][0]


def test_nothing_heavy_and_no_other_command_is_loaded(there):
    """Before the program runs, neither torch nor pandas nor the other commands are there."""
    code = "import sys; print(*sorted(sys.modules), sep='\\n')"
    loaded = run(*QUIET, "-c", code, cwd=there).out.split()
    assert not {"torch", "numpy", "pandas", "pyarrow", "rich"}.intersection(loaded)
    ours = {name.rpartition(".")[2] for name in loaded if name.startswith("gradwatch.cli.")}
    launcher = {"frames", "launch", "locate", "main", "on_import", "program", "run", "settings"}
    assert ours == launcher
    assert "gradwatch.process" not in loaded


class TestCommands:
    """Console scripts on the path."""

    @pytest.fixture
    def on_path(self, there, monkeypatch):
        """Puts an executable file on the path."""

        def put(text, name="trainer"):
            (there / "bin").mkdir(exist_ok=True)
            path = there / "bin" / name
            path.write_text(text)
            path.chmod(0o755)
            monkeypatch.setenv("PATH", f"{there / 'bin'}:{os.environ['PATH']}")
            return path

        return put

    @pytest.mark.parametrize(
        "first",
        [
            "#!{python}",
            "#!{python} -u",
            "#!/bin/sh\n'''exec' {python} \"$0\" \"$@\"\n' '''",
            "#!/bin/sh\n'''exec' '{python}' \"$0\" \"$@\"\n' '''",
        ],
    )
    def test_a_python_script_runs_as_from_the_shell(self, there, on_path, first):
        """A command runs with the path that the shell would find, whatever pip wrote in it."""
        path = on_path(f"{first.format(python=sys.executable)}\nimport sys\nprint(sys.argv)\n1/0\n")
        plain = run(str(path), "train", "--help", cwd=there)
        assert plain.out == f"{[str(path), 'train', '--help']}\n"
        assert run(*QUIET, "trainer", "train", "--help", cwd=there) == plain

    def test_a_script_of_uv_runs(self, there, on_path):
        """A script that looks for Python beside itself."""
        path = on_path(
            "#!/bin/sh\n'''exec' \"$(dirname -- \"$(realpath -- \"$0\")\")\"/'python' "
            "\"$0\" \"$@\"\n' '''\nprint(1)\n"
        )
        ran = run(*QUIET, "trainer", cwd=there)
        assert ran.code == 2  # the Python beside it is not this one
        assert f"{path.parent}/python -m gradwatch run trainer" in ran.err

    def test_a_file_comes_before_a_command(self, there, on_path):
        """What Python would open is what runs."""
        on_path(f"#!{sys.executable}\nprint('command')\n", "failing.py")
        assert _assert_same(there, "failing.py").code == 1

    @pytest.mark.parametrize(
        ("words", "said"),
        [
            ((), "Name a program"),
            (("-m",), "-m needs a module"),
            (("nothing.py",), "There is no program 'nothing.py'"),
            (("empty",), "has no __main__.py"),
            (("ls", "-l"), "is no Python script"),
            (("python", "train.py"), "write gradwatch run train.py"),
            (("python3.11", "-m", "my module"), "write gradwatch run -m 'my module'"),
            (
                ("torchrun", "--nproc-per-node", "2", "train.py", "--lr", "1"),
                "write torchrun --nproc-per-node 2 -m gradwatch run train.py --lr 1",
            ),
            (
                ("accelerate", "launch", "--num_processes=2", "train.py"),
                "write accelerate launch --num_processes=2 -m gradwatch run train.py",
            ),
            (("deepspeed", "train.py"), "--module gradwatch run train.py"),
            (
                ("-m", "torch.distributed.run", "--standalone", "train.py"),
                "write torchrun --standalone -m gradwatch run train.py",
            ),
        ],
    )
    def test_what_cannot_be_run_says_what_to_write(self, there, on_path, words, said):
        """One sentence on stderr, and exit code 2."""
        (there / "empty").mkdir()
        for name in ("torchrun", "accelerate", "deepspeed"):
            on_path(f"#!{sys.executable}\n", name)
        ran = run("-m", "gradwatch", "run", *words, cwd=there)
        assert (ran.code, ran.out) == (2, "")
        assert ran.err.startswith("gradwatch run: ")
        assert said in ran.err
        assert ran.err.count("\n") == 1

    def test_a_script_of_another_python_says_where_to_install(self, there, on_path):
        """A command of another environment cannot be run in this one."""
        on_path("#!/opt/other/bin/python3\nprint(1)\n")
        ran = run(*QUIET, "trainer", cwd=there)
        assert ran.code == 2
        assert "write /opt/other/bin/python3 -m gradwatch run trainer." in ran.err
