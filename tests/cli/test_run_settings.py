"""The settings of `gradwatch run`: where they come from, what they may be, and which folder a run gets."""

import json
import sys

import pytest

from gradwatch.cli import launch, settings
from gradwatch.cli.locate import UsageError
from gradwatch.cli.program import Program
from gradwatch.cli.settings import settle
from gradwatch.measure import statistics
from gradwatch.options import CHECKS, ON_NONFINITE

from .foreign import QUIET, names_in, run


def test_the_names_are_those_of_watch_all():
    """What is written down here, so that torch need not be loaded, is what the options are."""
    assert ("norm", *statistics.STATISTICS) == settings.STATISTICS
    assert settings.ON_NONFINITE == ON_NONFINITE
    assert set(settings.SETTINGS) - set(CHECKS) == {"quiet", "tensorboard"}
    of_one_model = {"accumulate", "scaler", "curvature", "sinks"}
    assert set(CHECKS) - set(settings.SETTINGS) == of_one_model


def test_the_command_line_comes_before_the_environment_and_that_before_the_file(tmp_path):
    """Each of them may say something else."""
    path = tmp_path / "options.json"
    path.write_text(json.dumps({"clip": 1, "every": 2, "run_dir": "a", "skip_spikes": None}))
    environment = {"GRADWATCH_EVERY": "3", "GRADWATCH_RUN_DIR": "b", "GRADWATCH_CLIP": ""}
    assert settle({"config": str(path), "run_dir": "c"}, environment) == {
        "clip": 1.0,
        "every": 3,
        "run_dir": "c",
    }
    assert settle({}, {**environment, "GRADWATCH_CONFIG": str(path)})["clip"] == 1.0


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("clip", "auto", "auto"),
        ("clip", "1e-1", 0.1),
        ("statistics", "max, zeros", ("max", "zeros")),
        ("on_nonfinite", "explain", "explain"),
        ("every", "10", 10),
        ("quiet", "1", True),
        ("quiet", "no", False),
        ("tensorboard", "tb", "tb"),
    ],
)
def test_text_becomes_the_value_of_the_option(name, text, value):
    """As the command line and the environment have it."""
    assert settle({name: text}, {}) == {name: value}
    assert settle({}, {f"GRADWATCH_{name.upper()}": text}) == {name: value}


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("clip", "0", 'a number greater than 0, or "auto"'),
        ("clip", "nan", "a number greater than 0"),
        ("clip", "one", "a number greater than 0"),
        ("every", "0", "a whole number of at least 1"),
        ("every", "1.5", "a whole number of at least 1"),
        ("on_nonfinite", "ignore", "one of record, skip, raise, explain"),
        ("statistics", "max,median", "names out of norm, max"),
        ("quiet", "maybe", "true or false"),
        ("run_dir", "", "the path of a folder"),
    ],
)
def test_a_wrong_value_is_told_with_where_it_comes_from(name, text, wanted):
    """The error has the option or the variable, what it must be, and what it is."""
    option = f"--{name.replace('_', '-')}"
    with pytest.raises(UsageError, match=f"^{option} must be ") as caught:
        settle({name: text}, {})
    assert wanted in str(caught.value)
    assert str(caught.value).endswith(f"got {text!r}.")
    if text:
        with pytest.raises(UsageError, match=f"^GRADWATCH_{name.upper()} must be "):
            settle({}, {f"GRADWATCH_{name.upper()}": text})


def _file(folder, name, content):
    path = folder / name
    path.write_text(content)
    return {"config": str(path)}


def test_a_file_may_set_every_option(tmp_path):
    """Also those that the command line does not have, by their names in Python."""
    content = {"explain": True, "keep_batches": True, "max_consecutive_skips": 3}
    content |= {"exploding_norm": 10, "skip_spikes": "auto", "buffer_size": 64, "quiet": True}
    assert settle(_file(tmp_path, "a.json", json.dumps(content)), {}) == content


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.json", '{"on_nonfinit": "skip"}', "Did you mean 'on_nonfinite'?"),
        ("a.json", '{"run-dir": "a"}', "Did you mean 'run_dir'?"),
        ("a.json", '{"sinks": []}', "has 'sinks', which is no option."),
        ("a.json", '{"every": "ten"}', "every in "),
        ("a.json", '{"statistics": ["median"]}', "must be names out of"),
        ("a.json", "[1]", "must hold options and their values, got [1]"),
        ("a.json", "{", "cannot be read: Expecting"),
        ("a.toml", "every = ", "cannot be read"),
        ("a.toml", "evry = 1", "Did you mean 'every'?"),
    ],
)
def test_a_wrong_file_says_what_is_wrong_in_it(tmp_path, name, content, said):
    """A key, a value, or all of it."""
    if name == "a.toml" and sys.version_info < (3, 11):
        said = "Write it as JSON"
    with pytest.raises(UsageError) as caught:
        settle(_file(tmp_path, name, content), {})
    assert said in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    """It is named, with what the system says."""
    with pytest.raises(UsageError, match=r"nothing\.json cannot be read: No such file"):
        settle({"config": str(tmp_path / "nothing.json")}, {})


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python reads TOML from 3.11 on")
def test_toml_has_the_same_keys(tmp_path):
    """As in pyproject-like files."""
    content = 'clip = "auto"\nstatistics = ["max"]\nquiet = false\n'
    found = settle(_file(tmp_path, "a.toml", content), {})
    assert found == {"clip": "auto", "statistics": ("max",), "quiet": False}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--every", "0", "x.py"), "--every must be a whole number of at least 1, got '0'."),
        (("--every=0", "x.py"), "--every must be"),
        (("--evry", "1", "x.py"), "unrecognized arguments: --evry"),
        (("--clip",), "--clip: expected one argument"),
        (("--clip", "-1", "x.py"), "--clip must be a number greater than 0"),
        (("--quiet=1", "x.py"), "--quiet: ignored explicit argument '1'"),
        (("--run-dir", "x.py/a", "x.py"), "--run-dir x.py/a cannot be written to: Not a directory"),
        (
            ("--run-dir", "gs://a/b", "x.py"),
            "--run-dir must be the path of a folder on this machine",
        ),
        (("--tensorboard", "x.py", "x.py"), "--tensorboard x.py cannot be written to"),
    ],
)
def test_the_program_does_not_start_with_a_wrong_option(tmp_path, words, said):
    """One sentence on stderr, exit code 2, and nothing was run."""
    (tmp_path / "x.py").write_text("print('ran')")
    (tmp_path / "1").write_text("print('ran')")
    ran = run("-m", "gradwatch", "run", *words, cwd=tmp_path)
    assert (ran.code, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert ran.err.startswith("gradwatch run: ")
    assert said in ran.err


def test_options_end_where_the_program_begins(tmp_path):
    """What looks like an option of ours behind it is the program's; -- may stand before it."""
    (tmp_path / "x.py").write_text("import sys; print(sys.argv[1:])")
    words = ["--every", "5", "--", "", "--quiet", "-m"]
    for before in (["--every=2"], ["--every", "2", "--"], ["--"]):
        ran = run(*QUIET, *before, "x.py", *words, cwd=tmp_path)
        assert (ran.code, ran.out, ran.err) == (0, f"{words}\n", "")


def test_help_names_every_option(tmp_path):
    """`gradwatch run --help` has all options, examples, and the variables."""
    ran = run("-m", "gradwatch", "run", "--help", cwd=tmp_path)
    assert (ran.code, ran.err) == (0, "")
    options = [name for name, one in settings.SETTINGS.items() if one.metavar != ""]
    assert all(f"--{name.replace('_', '-')}" in ran.out for name in [*options, "config"])
    assert "torchrun --nproc-per-node 2 -m gradwatch run train.py" in ran.out
    assert "GRADWATCH_OFF" in ran.out
    assert max(map(len, ran.out.splitlines())) <= 100


def test_off_runs_the_program_alone(tmp_path):
    """Nothing is waited for, and wrong settings do not matter."""
    code = "import sys; print([type(one).__name__ for one in sys.meta_path])"
    environment = {"GRADWATCH_OFF": "1", "GRADWATCH_EVERY": "x"}
    words = ("-m", "gradwatch", "run", "-c", code)
    ran = run(*words, cwd=tmp_path, **environment)
    assert ran == run("-c", code, cwd=tmp_path)


def test_it_says_that_torch_was_not_imported(tmp_path):
    """One sentence on stderr says why nothing was watched; the exit code is the program's."""
    ran = run("-m", "gradwatch", "run", "-c", "print(1); exit(3)", cwd=tmp_path)
    said = "gradwatch: Nothing was watched: the program did not import torch in this process.\n"
    assert ran == (3, "1\n", said)
    assert names_in(tmp_path) == []


def test_a_folder_is_tried_without_a_trace(tmp_path, monkeypatch):
    """The program may look there, or make it itself. An address is not for us to try."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    for place in ("a/b", "there", "there/c"):
        assert launch.writable("--run-dir", place) == str(tmp_path / place)
    assert names_in(tmp_path) == ["there"]
    assert names_in(tmp_path / "there") == []
    assert launch.writable("--tensorboard", "gs://bucket/a") == "gs://bucket/a"


class TestFolders:
    """The folder of a run that was not given one."""

    @pytest.mark.parametrize(
        ("program", "name"),
        [
            (Program("file", "a/train.py"), "train"),
            (Program("file", "/bin/yolo"), "yolo"),
            (Program("folder", "a/b/"), "b"),
            (Program("module", "my.train"), "my.train"),
            (Program("code", "import x"), "code"),
            (Program("stdin", "-"), "stdin"),
            (Program("file", "mein training!.py"), "mein-training"),
        ],
    )
    def test_it_is_called_after_the_program_and_the_time(self, program, name):
        """`runs/train-20261130-155200`."""
        folder = launch.default_folder(program, {})
        start, day, time = folder.name.rsplit("-", 2)
        assert (str(folder.parent), start, len(day), len(time)) == ("runs", name, 8, 6)

    def test_two_of_one_second_do_not_share_it(self, tmp_path):
        """The second gets -1 behind its name."""
        made = [launch.reserve(tmp_path / "runs" / "a").name for _ in range(3)]
        assert made == names_in(tmp_path / "runs") == ["a", "a-1", "a-2"]

    def test_one_in_which_nothing_was_written_goes(self, tmp_path):
        """And its parent, unless something else is in it."""
        first, second = (launch.reserve(tmp_path / "runs" / name) for name in "ab")
        launch.give_back(first)
        assert names_in(tmp_path / "runs") == ["b"]
        (tmp_path / "runs" / "b" / "file").touch()
        launch.give_back(second)
        assert names_in(tmp_path / "runs") == ["b"]
        (tmp_path / "runs" / "b" / "file").unlink()
        launch.give_back(second)
        assert names_in(tmp_path) == []

    def test_ranks_of_a_launch_agree(self, monkeypatch):
        """Whenever each of them starts: by the start of the process that started them."""
        program = Program("file", "train.py")
        folders = set()
        for rank, now in enumerate((0.0, 1e9)):
            monkeypatch.setattr(launch.time, "time", lambda now=now: now)
            environment = {"RANK": str(rank), "WORLD_SIZE": "2"}
            folders.add(launch.default_folder(program, environment))
        assert len(folders) == 1
        again = {"RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RESTART_COUNT": "1"}
        assert str(launch.default_folder(program, again)) == f"{folders.pop()}-1"

    @pytest.mark.parametrize(
        ("environment", "expected"),
        [
            ({}, (0, 1)),
            ({"RANK": "1", "WORLD_SIZE": "4", "SLURM_PROCID": "0"}, (1, 4)),
            ({"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "3"}, (2, 3)),
            ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, (0, 1)),
            ({"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "4"}, (1, 4)),
            ({"RANK": "x", "WORLD_SIZE": "4"}, (0, 1)),
            ({"RANK": "1"}, (0, 1)),
        ],
    )
    def test_the_rank_is_that_of_the_launcher(self, environment, expected):
        """torchrun, MPI and srun say it in the environment; a batch script of SLURM is no rank."""
        assert launch.rank_and_size(environment) == expected
