"""What every command has in common: help, version, exit codes, and errors in one line."""

import json
import signal

import pytest

from gradwatch import __version__
from gradwatch.cli import main

from .runs import write

ON_A_RUN = {
    "report": ("report", "{run}"),
    "explain": ("explain", "{run}"),
    "tail": ("tail", "{run}", "--once"),
    "plot": ("plot", "{run}", "-o", "new.png"),
    "compare": ("compare", "{run}", "good"),
    "compare with": ("compare", "good", "{run}"),
    "export": ("export", "{run}", "-o", "new.csv"),
}
COMMANDS = ("report", "explain", "tail", "plot", "compare", "export")


def _on(name, run):
    return [part.format(run=run) for part in ON_A_RUN[name]]


@pytest.fixture(params=ON_A_RUN)
def on(request):
    """Makes the arguments of a command for a run."""
    return lambda run: _on(request.param, run)


@pytest.fixture(params=[name for name in ON_A_RUN if name != "explain"])
def on_tables(request):
    """Likewise of a command that reads the tables of a run."""
    return lambda run: _on(request.param, run)


def _assert_one_line(ran):
    assert ran.code == 2
    assert ran.out == ""
    assert ran.err.startswith("gradwatch")
    assert ran.err.count("\n") == 1
    assert ran.err[:-1].isprintable()


class TestHelp:
    def test_names_every_command_and_exit_code(self, command):
        """The help lists the commands and the exit codes."""
        ran = command("--help")
        assert ran.code == 0
        assert all(f"    {name}" in ran.out for name in COMMANDS)
        assert "1  the report has findings" in ran.out

    @pytest.mark.parametrize("name", COMMANDS)
    def test_each_command_has_examples_of_itself(self, command, name):
        """Each command's help ends with lines to copy, and no line is too wide."""
        ran = command(name, "--help")
        assert ran.code == 0
        assert f"examples:\n  gradwatch {name} runs/a" in ran.out
        assert "--json" in ran.out
        assert max(map(len, ran.out.splitlines())) <= 100

    def test_without_arguments_it_is_shown(self, command):
        """`gradwatch` alone shows the help, and says with its exit code that this was no use."""
        ran = command()
        assert ran.out.startswith("usage: gradwatch")
        assert ran.code == 2

    def test_the_version(self, command):
        """--version tells the version of the package."""
        assert command("--version") == (0, f"gradwatch {__version__}\n", "")


class TestWrongUsage:
    @pytest.mark.parametrize(
        "arguments",
        [
            ("frobnicate",),
            ("report",),
            ("report", "good", "--fail"),
            ("report", "good", "extra\x1b[2J"),
            ("report", ""),
            ("compare", "good"),
            ("tail", "good", "--once", "-n", "0"),
            ("tail", "good", "--once", "--interval", "nan"),
            ("plot", "good"),
            ("plot", "good", "-o", "x.png", "--kind", "cake"),
            ("plot", "good", "-o", "x.cake"),
            ("export", "good", "--format", "xml"),
            ("export", "good", "--format", "parquet"),
            ("export", "good", "--json"),
            ("export", "good", "-o", "x.dat"),
        ],
    )
    def test_is_one_line_and_exit_code_2(self, command, runs, arguments):
        """Wrong arguments end with one line on stderr and exit code 2."""
        _assert_one_line(command(*arguments))


class TestUnreadableRuns:
    def test_a_missing_folder(self, command, runs, on):
        """A folder that is not there is said to be missing."""
        ran = command(*on("nowhere\x1b[2J"))
        _assert_one_line(ran)
        assert "There is no folder 'nowhere" in ran.err

    def test_an_empty_folder(self, command, runs, on):
        """An empty folder is no run."""
        (runs / "empty").mkdir()
        ran = command(*on("empty"))
        _assert_one_line(ran)
        assert "'empty' is not a run folder" in ran.err

    def test_a_folder_of_something_else(self, command, runs, on):
        """A meta.json that gradwatch has not written is told from one of its own."""
        (runs / "foreign").mkdir()
        (runs / "foreign" / "meta.json").write_text('{"format": "other"}', encoding="utf-8")
        _assert_one_line(command(*on("foreign")))

    def test_the_folder_above(self, command, runs, on):
        """The folder with the runs in it is answered with their names."""
        ran = command(*on(runs))
        _assert_one_line(ran)
        assert "Did you mean" in ran.err

    def test_half_a_folder(self, command, runs, on):
        """A table that is missing is named."""
        (runs / "sick" / "steps").rename(runs / "elsewhere")
        ran = command(*on("sick"))
        _assert_one_line(ran)
        assert "no steps/" in ran.err

    def test_a_damaged_part(self, command, runs, on_tables):
        """A part that was cut off is named."""
        (part,) = (runs / "sick" / "steps").iterdir()
        part.write_bytes(part.read_bytes()[:-20])
        ran = command(*on_tables("sick"))
        _assert_one_line(ran)
        assert "is damaged" in ran.err
        assert "ValueError" not in ran.err  # it is the file's fault, and not ours

    def test_a_part_of_another_tool(self, command, runs, on_tables):
        """A Parquet file with other columns is damaged, and the column that is missing is named."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        (part,) = (runs / "sick" / "steps").iterdir()
        pq.write_table(pa.table({"row": [0], "step": [1], "x": [1.0]}), part)
        ran = command(*on_tables("sick"))
        _assert_one_line(ran)
        assert "has no column 'optimizer'" in ran.err

    def test_a_meta_that_is_nested_without_end(self, command, runs, on):
        """What no reader of JSON follows to its end is a foreign file."""
        (runs / "sick" / "meta.json").write_text("[" * 100_000, encoding="utf-8")
        ran = command(*on("sick"))
        _assert_one_line(ran)
        assert "was not written by gradwatch" in ran.err

    def test_a_run_that_has_only_just_begun(self, command, runs, on):
        """Before its first steps are written, a run is said to have none yet."""
        sink = write(runs / "new", close=False)
        ran = command(*on("new"))
        sink.close()
        _assert_one_line(ran)
        assert "holds no step yet" in ran.err

    def test_garbage_in_place_of_a_part(self, command, runs, on_tables):
        """A part that is no Parquet at all is named."""
        (part,) = (runs / "sick" / "steps").iterdir()
        part.write_bytes(b"\x00garbage" * 100)
        _assert_one_line(command(*on_tables("sick")))

    def test_a_folder_that_may_not_be_read(self, command, runs, on, unprivileged):
        """A folder without permission is one line."""
        (runs / "sick").chmod(0)
        arguments = on("sick")
        ran = unprivileged(lambda: command(*arguments))
        (runs / "sick").chmod(0o755)
        _assert_one_line(ran)
        assert "Permission denied" in ran.err

    @pytest.mark.parametrize("name", ["steps", "parameters", "events", "meta.json"])
    def test_a_part_that_may_not_be_read(self, command, runs, unprivileged, name):
        """So is one file or table without permission, and it is named."""
        (runs / "sick" / name).chmod(0)
        ran = unprivileged(lambda: command("report", "sick"))
        (runs / "sick" / name).chmod(0o755)
        _assert_one_line(ran)
        assert f"sick/{name}" in ran.err

    def test_nothing_is_written(self, command, runs):
        """A command that fails leaves no file behind."""
        before = sorted(runs.iterdir())
        for name in ("plot", "export"):
            command(*_on(name, "nowhere"))
        assert sorted(runs.iterdir()) == before


class TestErrorsOfOurOwn:
    def test_are_one_line_that_says_how_to_see_more(self, command, runs, monkeypatch):
        """A bug is told in one line too, with its type and the way to the traceback."""
        monkeypatch.setattr("gradwatch.cli.report.open_run", lambda path: {}["no\nway"])
        ran = command("report", "good")
        _assert_one_line(ran)
        assert "KeyError" in ran.err
        assert main.TRACEBACK in ran.err

    def test_show_where_they_come_from_if_asked(self, command, runs, monkeypatch):
        """GRADWATCH_TRACEBACK=1 lets the error through."""
        monkeypatch.setenv(main.TRACEBACK, "1")
        with pytest.raises(Exception, match="There is no folder"):
            command("report", "nowhere")

    def test_a_missing_package_is_one_line(self, command, runs, on, monkeypatch):
        """Without pyarrow the way to install it is told."""
        monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
        ran = command(*on("good"))
        _assert_one_line(ran)
        assert "pip install 'gradwatch[runs]'" in ran.err

    def test_ctrl_c_is_130(self, command, runs, monkeypatch):
        """A command that is interrupted says nothing, and ends with 130."""

        def interrupt(path):
            raise KeyboardInterrupt

        monkeypatch.setattr("gradwatch.cli.report.open_run", interrupt)
        assert command("report", "good") == (130, "", "")


class TestJson:
    @pytest.mark.parametrize("run", ["good", "sick", "hostile"])
    def test_is_strict_and_ascii(self, command, runs, on, run):
        """--json of each command is JSON without NaN, and moves no cursor."""
        ran = command(*on(run), "--json")
        assert ran.code == 0
        assert ran.err == ""
        assert ran.out.isascii()
        assert ran.out.replace("\n", "").isprintable()
        documents = ran.out.splitlines() if on("")[0] == "tail" else [ran.out]
        for document in documents:
            json.loads(document, parse_constant=pytest.fail)


class TestHostileNames:
    def test_are_shown_escaped(self, command, runs, on):
        """What a name would do to the terminal is shown, not done."""
        ran = command(*on("hostile"))
        assert ran.code == 0
        assert ran.out.replace("\n", "").isprintable()


def test_a_caller_keeps_its_own_handler_of_signals(capsys):
    """main() as a function leaves SIGTERM as it was."""
    before = signal.getsignal(signal.SIGTERM)
    assert main.main(["report", "no-such-folder"]) == 2
    assert signal.getsignal(signal.SIGTERM) is before
