"""Runs the tests once for each row of rows.cfg, in an environment of its own: `make test-matrix`."""

import argparse
import configparser
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
ROWS = Path(__file__).with_name("rows.cfg")
VERSIONS = (
    "import importlib.metadata as m, platform; print('Python', platform.python_version(), "
    "*(f'{name} {m.version(name)}' for name in ('torch', 'lightning', 'tensorboard')))"
)


def main():
    """Runs the rows that were asked for, and ends with one line about each."""
    table = configparser.ConfigParser()
    table.read_string(ROWS.read_text(encoding="utf-8"))
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="row", help=" ".join(table.sections()))
    parser.add_argument("--workers", default="2", help="processes that share the tests of a row")
    args = parser.parse_args()
    if unknown := [name for name in args.rows if name not in table.sections()]:
        parser.error(f"no row {unknown[0]!r} in {ROWS.name}; it has {' '.join(table.sections())}")

    results = {
        name: run_row(name, table[name], args.workers) for name in args.rows or table.sections()
    }
    print("\n== summary")
    for name, (outcome, story) in results.items():
        print(f"{outcome:8} {name}: {story}")
    # Where every row was skipped nothing was tested, which is no success.
    outcomes = {outcome for outcome, _ in results.values()}
    return 0 if "passed" in outcomes and "FAILED" not in outcomes else 1


def run_row(name, row, workers):
    """Sets up the environment of a row, and runs the tests that are not slow in it.

    Returns:
        `passed`, `FAILED` or `skipped`, and the rest of the line in the summary.
    """
    interpreter = find_python(row["python"])
    if interpreter is None:
        return "skipped", f"found no Python {row['python']}, neither on the PATH nor in pyenv"
    folder = ROOT / ".matrix" / name
    python = folder / "bin" / "python"
    print(f"\n== {name}: Python {row['python']} in {folder}", flush=True)
    commands = [
        [interpreter, "-m", "venv", folder],
        [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
         "--editable", ".[dev]", *row["install"].split()],
    ]  # fmt: skip
    for command in commands:
        if subprocess.run(command, cwd=ROOT, check=False).returncode:
            return "FAILED", f"could not set up the environment with Python {row['python']}"
    versions = subprocess.run([python, "-c", VERSIONS], capture_output=True, text=True, check=True)
    print(versions.stdout, end="", flush=True)
    code, last_line = run_tests(python, workers)
    return "FAILED" if code else "passed", f"{versions.stdout.strip()}: {last_line}"


def run_tests(python, workers):
    """Runs pytest and passes on what it prints.

    Returns:
        Its exit code and the last line that it printed.
    """
    command = [python, "-m", "pytest", "-rs", "-n", workers, "--dist", "worksteal"]
    command += ["-m", "not slow"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    last = ""
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as tests:
        for line in tests.stdout:
            print(line, end="", flush=True)
            last = line.strip(" =\n") or last
    return tests.returncode, last


def find_python(version):
    """Looks for an interpreter like 3.10 on the PATH and among those that pyenv has installed."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    installed = sorted(pyenv.glob(f"versions/{version}.*/bin/python{version}"))
    for candidate in [shutil.which(f"python{version}"), *reversed(installed)]:
        # A shim of pyenv may stand for a Python that is not chosen in this folder, and only fail.
        if candidate and starts(candidate):
            return candidate
    return None


def starts(python):
    """Tells whether an interpreter runs at all."""
    return subprocess.run([python, "-c", ""], capture_output=True, check=False).returncode == 0


if __name__ == "__main__":
    sys.exit(main())
