"""Programs that know nothing of gradwatch, and what they do without it and under `gradwatch run`."""

import subprocess
import sys
from typing import NamedTuple

from tests.support import processes

QUIET = ("-m", "gradwatch", "run", "--quiet")

SCRIPTS = {
    "its arguments": "import sys; print(sys.argv, sys.path[0], len(sys.path))",
    "its globals": """
        print([(key, str(value).split(" at ")[0]) for key, value in globals().items()])
        import sys
        print(sys.modules["__main__"].__dict__ is globals(), __name__, __file__)
        """,
    "no future of ours": "def f(x: int): ...\nprint(f.__annotations__)",
    "a module beside it": "import beside; print(beside.__file__)",
    "an encoding": "# -*- coding: latin-1 -*-\nprint(ascii('\u00e4'))\n",
    "its standard input": "import sys; print(sys.stdin.read().upper(), input.__name__)",
    "exit 0": "import sys; sys.exit()",
    "exit 3": "import sys; print('x'); sys.exit(3)",
    "exit -1": "import sys; sys.exit(-1)",
    "exit True": "import sys; sys.exit(True)",
    "exit with words": "import sys; sys.exit('no such data')",
    "exit with an object": "import sys; sys.exit({'a': 1})",
    "exit in a function at the exit": "import atexit, sys; atexit.register(sys.exit, 4)",
    "os._exit": "import os; print('x', flush=True); os._exit(5)",
    "abort": "import os; os.abort()",
    "terminated": "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    "its own SIGTERM": """
        import os, signal, sys
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(9))
        os.kill(os.getpid(), signal.SIGTERM)
        """,
    "no handlers of ours": """
        import signal
        print([(one.name, str(signal.getsignal(one)).split(" at ")[0]) for one in signal.Signals])
        """,
    "Ctrl-C": """
        import signal
        def wait():
            signal.raise_signal(signal.SIGINT)
        wait()
        """,
    "Ctrl-C, caught": """
        import signal
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            print("stopped early")
        """,
    "an error": "def f():\n    return [][1]\n\nf()",
    "an error with its source": "x = {'a': [1, 2]}\nprint(x['a'][0] + x['b'][1])",
    "a chain of errors": """
        def f():
            try:
                {}["a"]
            except KeyError as error:
                try:
                    raise ValueError("b") from error
                except ValueError:
                    raise TypeError("c")
        f()
        """,
    "a group of errors": """
        import sys
        errors = []
        for value in ("a", "b"):
            try:
                int(value)
            except ValueError as error:
                errors.append(error)
        if sys.version_info >= (3, 11):
            raise ExceptionGroup("several", errors)
        """,
    "an error with a note": """
        error = ValueError("a")
        if hasattr(error, "add_note"):
            error.add_note("look there")
        raise error
        """,
    "a class of its own": "class Oh(Exception): pass\nraise Oh('x')",
    "no end of recursion": "def f(n):\n    return f(n + 1)\nf(0)",
    "recursion, caught": """
        depth = 0
        def f():
            global depth
            depth += 1
            f()
        try:
            f()
        except RecursionError:
            print(depth)
        """,
    "a syntax error": "x = 1\nif x = 1:\n    pass\n",
    "an indentation error": "x = 1\n    y = 2\n",
    "a syntax error in an import": "import broken",
    "an import that is not there": "import not_there_at_all",
    "an import that fails": "import failing",
    "an import that fails, told by itself": """
        import traceback
        try:
            import failing
        except Exception:
            traceback.print_exc()
        """,
    "its own excepthook": """
        import sys, traceback
        def hook(kind, error, trace):
            print("caught", kind.__name__, [f.name for f in traceback.extract_tb(trace)])
            print([f.name for f in traceback.extract_tb(error.__traceback__)])
            print([f.name for f in traceback.extract_tb(sys.last_traceback)])
        sys.excepthook = hook
        def f():
            raise ValueError
        f()
        """,
    "an excepthook that calls the first": """
        import sys
        before = sys.excepthook
        print(before is sys.__excepthook__)
        def hook(*given):
            print("mine", file=sys.stderr)
            before(*given)
        sys.excepthook = hook
        1 / 0
        """,
    "an excepthook that exits": """
        import sys
        def hook(*given):
            sys.exit(7)
        sys.excepthook = hook
        1 / 0
        """,
    "an excepthook that fails": """
        import sys
        def hook(*given):
            raise TypeError("broken")
        sys.excepthook = hook
        1 / 0
        """,
    "an excepthook that is no function": "import sys; sys.excepthook = 3; 1 / 0",
    "an error in a thread": """
        import threading
        def f():
            1 / 0
        thread = threading.Thread(target=f, name="worker")
        thread.start(); thread.join()
        print("on")
        """,
    "a thread that goes on": """
        import threading, time
        main = threading.main_thread()
        def f():
            main.join()
            print("last")
        threading.Thread(target=f).start()
        print("first")
        """,
    "an error at the exit": """
        import atexit
        class F:
            def __call__(self): 1 / 0
            def __repr__(self): return "F()"
        atexit.register(F())
        print("x")
        """,
    "what is there at the exit": """
        import atexit
        atexit.register(lambda: print("__file__" in globals(), "__name__" in globals()))
        """,
    "what is there at the exit after an error": """
        import atexit
        atexit.register(lambda: print("__file__" in globals(), "__name__" in globals()))
        raise ValueError
        """,
    "what is there at the exit after sys.exit": """
        import atexit, sys
        atexit.register(lambda: print("__file__" in globals(), "__name__" in globals()))
        sys.exit(3)
        """,
    "objects that end last": """
        class Noisy:
            def __init__(self, name): self.name = name
            def __del__(self): print("end of", self.name)
        a, b = Noisy("a"), Noisy("b")
        """,
    "a closed output": "import sys; sys.stdout.close(); sys.stderr.close()",
    "output that is not written": """
        import os, sys
        sys.stdout.write("x" * 10)
        os.close(1)
        """,
    "warnings": "import warnings; warnings.warn('careful')",
    "pickles of its own classes": """
        import pickle
        class A:
            x = 3
        data = pickle.dumps(A())
        print(b"__main__" in data, type(pickle.loads(data)) is A)
        """,
    "its source": "import inspect, sys\ndef f():\n    return 1\nprint(inspect.getsource(f))",
    "a dataclass": """
        from dataclasses import dataclass, fields
        from typing import get_type_hints
        @dataclass
        class A:
            x: int = 1
        print(A(), get_type_hints(A), A.__module__)
        """,
    "a doctest": '''
        """A page.

        >>> 1 + 1
        3
        """
        import doctest
        print(__doc__, doctest.testmod().failed)
        ''',
    "unittest": """
        import unittest
        class T(unittest.TestCase):
            def test(self):
                self.assertEqual(1, 1)
        unittest.main(verbosity=0, exit=False)
        """,
    "argparse": """
        import argparse
        parser = argparse.ArgumentParser()
        parser.add_argument("--lr", type=float)
        print(parser.parse_args(["--lr", "3"]), parser.prog)
        parser.parse_args(["--lr", "x"])
        """,
    "a fork": """
        import os, sys
        if os.fork() == 0:
            print("child", flush=True)
            sys.exit(0)
        print(os.waitstatus_to_exitcode(os.wait()[1]))
        """,
    "its children": """
        import multiprocessing, sys
        def f(x):
            return x * x, __name__
        if __name__ == "__main__":
            for method in ("spawn", "forkserver", "fork"):
                with multiprocessing.get_context(method).Pool(2) as pool:
                    print(pool.map(f, range(3)))
        """,
    "a child that fails": """
        import multiprocessing
        def f():
            1 / 0
        if __name__ == "__main__":
            child = multiprocessing.get_context("spawn").Process(target=f, name="child")
            child.start(); child.join()
            print(child.exitcode)
        """,
    "its environment": "import os; print(sorted(set(os.environ) - {'_'}))",
    "the import system": """
        import sys
        print(sys.meta_path[-3:], len(sys.path_hooks), "torch" in sys.modules, "numpy" in sys.modules)
        """,
    "a program that runs another": """
        import runpy, sys
        runpy.run_path("beside.py", run_name="__main__")
        runpy.run_module("beside")
        """,
    "asyncio": """
        import asyncio
        async def f():
            await asyncio.sleep(0)
            1 / 0
        asyncio.run(f())
        """,
    "code that it makes": "exec('def f():\\n  1 / 0'); f()",
    "a generator that fails": "def g():\n    yield 1\n    1 / 0\nlist(g())",
}
"""Source by what is looked at."""

BESIDE = {
    "beside.py": "print('beside', __name__)\n",
    "broken.py": "def f(:\n",
    "failing.py": "def f():\n    return 1 / 0\n\nf()\n",
    "package/__init__.py": "",
    "package/__main__.py": "import sys\nfrom . import part\nprint(sys.argv, part.X, __spec__.name)\n1/0\n",
    "package/part.py": "X = 1\nif __name__ == '__main__':\n    raise SystemExit('as a program')\n",
    "folder/__main__.py": "import sys, other\nprint(sys.argv, sys.path[0], __file__)\n1/0\n",
    "folder/other.py": "",
}
"""Files that lie beside each program."""


class Ran(NamedTuple):
    """What a program did."""

    code: int
    out: str
    err: str


def run(*words, cwd, stdin="hello\n", python=sys.executable, **environment):
    """Run Python in a folder, and return what it did."""
    ran = subprocess.run(
        [python, *words],
        cwd=cwd,
        env=processes.environment(COLUMNS="80", **environment),
        input=stdin,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=processes.HANG_S,
        check=False,
    )
    return Ran(ran.returncode, ran.stdout, ran.stderr)


def script_of(folder):
    """Return a console script, as pip would write it."""
    script = folder / "gradwatch"
    script.write_text(
        f"#!{sys.executable}\nimport sys\nfrom gradwatch.cli.main import main\n"
        "if __name__ == '__main__':\n    sys.exit(main())\n"
    )
    return script


def names_in(folder):
    """Return the names of the files and folders in a folder."""
    return sorted(path.name for path in folder.iterdir())
