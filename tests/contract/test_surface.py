"""The buffer, the tables, imports and public names."""

import ast
import gc
import inspect
import os
import pickle
import pkgutil
import subprocess
import sys
import tracemalloc
import typing
from pathlib import Path

import pytest
import torch

import gradwatch
import gradwatch.adapters

from .lives import model_and_optimizer, train


@pytest.mark.parametrize("found", [False, True], ids=["named", "found"])
def test_the_buffer_is_bounded(found: bool) -> None:
    """Only the newest buffer_size steps are kept; the step numbers go on."""
    case, optimizer = model_and_optimizer()
    with gradwatch.watch(case.model, None if found else optimizer, buffer_size=8) as watcher:
        train(case, optimizer, 50)
    steps = watcher.history.steps()
    assert list(steps.index) == list(range(43, 51))
    assert set(watcher.history.parameters()["step"]) == set(range(43, 51))


def test_the_buffer_is_bounded_without_an_optimizer() -> None:
    """The same where each backward is a step."""
    x = torch.tensor(2.0, requires_grad=True)
    with gradwatch.watch({"x": x}, buffer_size=3) as watcher:
        for index in range(10):
            x.grad = None
            (x * index).backward()
    assert list(watcher.history.steps()["grad_norm"]) == [7.0, 8.0, 9.0]
    assert list(watcher.history.steps().index) == [8, 9, 10]


@pytest.mark.slow
def test_memory_is_flat() -> None:
    """Four thousand further steps, take no further memory once the buffers are full."""
    x = torch.tensor(2.0, requires_grad=True)
    optimizer = torch.optim.SGD([x], lr=0.0)
    with gradwatch.watch({"x": x}, optimizer, buffer_size=64, clip=1.0) as watcher:
        tracemalloc.start()
        try:
            held = []
            for _ in range(2):
                for _ in range(4000):
                    (x * 3).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                gc.collect()
                held.append(tracemalloc.get_traced_memory()[0])
        finally:
            tracemalloc.stop()
    assert held[1] - held[0] < 20_000
    assert len(watcher.history.steps()) == 64


def test_a_frame_that_was_read_is_the_readers_own() -> None:
    """Reading in the middle costs nothing, and changing a frame changes no record."""
    case, optimizer = model_and_optimizer()
    with gradwatch.watch(case.model, optimizer) as watcher:
        train(case, optimizer, 2)
        frame = watcher.history.steps()
        norm = frame.loc[1, "grad_norm"]
        frame.loc[:, "grad_norm"] = -1.0
        parameters = watcher.history.parameters()
        parameters.loc[:, "grad_norm"] = -1.0
        train(case, optimizer, 2)
    assert watcher.history.steps().loc[1, "grad_norm"] == norm
    assert (watcher.history.parameters()["grad_norm"] > 0).all()
    assert list(watcher.history.steps().index) == [1, 2, 3, 4]


COLUMNS = [
    "optimizer", "time_s", "micro_batches", "weight", "grad_norm", "grad_norm_clipped",
    "grad_norm_local", "clip_coef",
    "clip_threshold", "clipped", "outcome", "nonfinite_parameters", "loss", "lr", "loss_scale",
    "noise_scale",
]  # fmt: skip


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_the_tables_have_the_columns_of_the_contract(steps: int) -> None:
    """steps(), parameters() and events() have their columns with and without rows."""
    case, optimizer = model_and_optimizer()
    with gradwatch.watch(case.model, optimizer) as watcher:
        train(case, optimizer, steps)
    table = watcher.history.steps()
    assert table.index.name == "step"
    assert list(table.columns[: len(COLUMNS)]) == COLUMNS
    assert len(table) == steps
    parameters = watcher.history.parameters()
    assert list(parameters.columns[:3]) == ["step", "parameter", "grad_norm"]
    assert len(parameters) == 6 * steps
    assert list(watcher.history.events().columns[:8]) == [
        "step", "micro_batch", "kind", "parameter", "module", "value", "rank", "message",
    ]  # fmt: skip


def _python(code: str, folder: Path) -> str:
    source = Path(gradwatch.__file__).parent.parent
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        # What is measured is an import of what was compiled before.
        env={**os.environ, "PYTHONPATH": str(source), "PYTHONDONTWRITEBYTECODE": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout


HEAVY = """
import sys
def heavy(*more):
    every = {"pandas", "pyarrow", "lightning", "pytorch_lightning", "tensorboard", "matplotlib", "IPython", "gradwatch_lightning", "gradwatch_tensorboard", *more}
    return sorted(every & set(sys.modules))
"""


def test_import_loads_nothing_heavy(tmp_path: Path) -> None:
    """`import gradwatch` loads neither torch nor NumPy, and nothing else that takes long."""
    code = f"""{HEAVY}
import gradwatch
print(gradwatch.__version__, len(dir(gradwatch)) > 30, heavy("torch", "numpy", "inspect"))
"""
    assert _python(code, tmp_path) == f"{gradwatch.__version__} True []\n"


def test_watching_loads_nothing_heavy(tmp_path: Path) -> None:
    """A watched step and its report load no pandas, no framework, no plotting."""
    code = f"""{HEAVY}
import torch, gradwatch
w = torch.ones(2, requires_grad=True)
optimizer = torch.optim.SGD([w], lr=0.1)
with gradwatch.watch({{"w": w}}, optimizer, clip=1.0) as watcher:
    w.sum().backward()
    optimizer.step()
str(watcher.report())
print(heavy())
"""
    assert _python(code, tmp_path) == "[]\n"


def test_watching_is_imported_quickly(tmp_path: Path) -> None:
    """What watch() and watch_all() need adds at most a tenth to the processor time of `import torch` (the best of three)."""
    code = """
import time
start = time.process_time()
import torch
between = time.process_time()
from gradwatch import watch, watch_all
print((time.process_time() - between) / (between - start))
"""
    assert any(float(_python(code, tmp_path)) <= 0.1 for _ in range(3))


def test_no_garbage_is_collected_while_gradwatch_is_imported(tmp_path: Path) -> None:
    """A collection among all the objects of torch takes longer than the import; it is as on or off afterwards as before."""
    code = """
import gc, gradwatch, torch
gc.callbacks.append(lambda phase, info: print(phase) if importing else None)
gc.set_threshold(1, 1, 1)
importing = True
from gradwatch import watch_all
importing = False
print(gc.isenabled())
gc.disable()
from gradwatch import curvature
print(gc.isenabled())
"""
    told = _python(code, tmp_path).split()
    assert told[-2:] == ["True", "False"]
    assert len(told) < 100  # before the modules are imported, and when they are there


PUBLIC = [
    "AccumulateByNoiseScale",
    "AccumulatePolicy",
    "AccumulationError",
    "AdaGC",
    "AdaptiveGradientClip",
    "AutoClip",
    "ClipByNorm",
    "ClipByValue",
    "ClipDecision",
    "ClipPolicy",
    "CurvatureEvery",
    "Event",
    "Explanation",
    "GradwatchWarning",
    "History",
    "Layout",
    "NoiseScale",
    "NonFiniteGradientError",
    "RecordBatch",
    "Report",
    "RobustClip",
    "RunFolder",
    "Sink",
    "StepRecord",
    "Thresholds",
    "Watcher",
    "WrongGradientError",
    "ZClip",
    "check_gradients",
    "curvature",
    "explain",
    "load",
    "load_all",
    "watch",
    "watch_all",
]


ADAPTERS = [
    "EVENT_KINDS",
    "GROUP",
    "NO_GRADIENT",
    "REDUCTIONS",
    "SCALARS",
    "STATISTICS",
    "STEP_COLUMNS",
    "BlockScalars",
    "Column",
    "Kind",
    "LatestTraining",
    "LoggerScalars",
    "Options",
    "Reduction",
    "Scalar",
    "SharedOptions",
    "SinkQueue",
    "Statistic",
    "StepScalars",
    "accumulate_policy",
    "accumulates",
    "add_aliases",
    "build_watcher",
    "check_options",
    "described",
    "group_of",
    "optimizer_parameters",
    "register_statistic",
    "sentence",
    "shown",
    "warn_safely",
    "with_watch_options",
]


def test_the_names_of_the_adapter_seam_are_these() -> None:
    """`gradwatch.adapters.__all__` is frozen too."""
    assert sorted(gradwatch.adapters.__all__) == sorted(ADAPTERS)


def test_integrations_import_nothing_else() -> None:
    """Each import from gradwatch in them is of a public name of `gradwatch` or `gradwatch.adapters`."""
    source = Path(gradwatch.__file__).parent.parent
    folders = [source / "integrations", source]  # a checkout has them in a folder of their own
    files = [file for folder in folders for file in folder.glob("gradwatch_*/**/*.py")]
    assert len(files) > 20
    imported = [
        (node.module, alias.name)
        for file in files
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "gradwatch"
        for alias in node.names
    ]
    public = {"gradwatch": PUBLIC, "gradwatch.adapters": ADAPTERS}
    assert imported
    assert [pair for pair in imported if pair[1] not in public.get(pair[0], ())] == []


def test_the_public_names_are_these() -> None:
    """`__all__` is frozen: a new or missing name is a decision."""
    assert sorted(gradwatch.__all__) == PUBLIC
    imported = {"Any", "TYPE_CHECKING", "import_module"}
    public = {name for name in dir(gradwatch) if not name.startswith("_")} - imported
    assert {n for n in public if not inspect.ismodule(getattr(gradwatch, n))} == set(PUBLIC)


def test_type_checkers_see_the_public_names() -> None:
    """What is imported on demand is imported for type checkers from the same modules."""
    tree = ast.parse(Path(gradwatch.__file__).read_text(encoding="utf-8"))
    (block,) = [one for one in tree.body if isinstance(one, ast.If)]
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    seen = {
        (alias.name, alias.asname, one.module)
        for one in block.body
        if isinstance(one, ast.ImportFrom)
        for alias in one.names
    }
    # "as" its own name: only so does a checker let others import it from here.
    assert seen == {(name, name, home) for name, home in gradwatch._HOMES.items()}


def test_no_module_has_the_name_of_something_public() -> None:
    """Importing a module of the package sets its name there, and would replace the public one."""
    modules = {module.name for module in pkgutil.iter_modules(gradwatch.__path__)}
    assert len(modules) > 20
    assert modules & {*PUBLIC, "load_ipython_extension", "unload_ipython_extension"} == set()


def test_all_public_names_come_with_a_star(tmp_path: Path) -> None:
    """`from gradwatch import *` and `help(gradwatch)` have what was not imported before."""
    code = """
import io, pydoc
from gradwatch import *
import gradwatch
print([name for name in gradwatch.__all__ if globals()[name] is not getattr(gradwatch, name)])
page = io.StringIO()
pydoc.Helper(output=page)(gradwatch)
print([name for name in gradwatch.__all__ if name not in page.getvalue()])
"""
    assert _python(code, tmp_path) == "[]\n[]\n"


def test_an_old_pickle_loads_before_anything_else(tmp_path: Path) -> None:
    """A pickle that names a module of an earlier version loads in a process that has imported nothing."""
    pickled = pickle.dumps(gradwatch.ClipByNorm(2.0), protocol=0)
    for module in (b"gradwatch", b"gradwatch.control.clip"):
        old = pickled.replace(b"cgradwatch\n", b"c%b\n" % module)
        assert (old == pickled) == (module == b"gradwatch")
        code = f"""
import pickle
print(pickle.loads({old!r}))
import gradwatch
print(gradwatch.ClipByNorm(2.0))
"""
        first, second = _python(code, tmp_path).splitlines()
        assert first == second


def test_a_name_that_is_not_public_is_an_attribute_error() -> None:
    """An unknown name is refused in the words of Python."""
    with pytest.raises(AttributeError, match=r"^module 'gradwatch' has no attribute 'wacth'$"):
        _ = gradwatch.wacth


@pytest.mark.parametrize("name", [*PUBLIC, *ADAPTERS])
def test_every_public_name_is_documented(name: str) -> None:
    """Each public name, and each public method and property of a class, has a docstring of its own."""
    thing = getattr(gradwatch if name in PUBLIC else gradwatch.adapters, name)
    if not callable(thing) or typing.get_origin(thing):
        return  # a constant, or the name of a type: the line below it in the code says what it is
    assert thing.__doc__
    assert thing.__doc__.strip()
    if inspect.isclass(thing):
        for member, value in vars(thing).items():
            described = inspect.isroutine(value) or isinstance(value, property)
            if described and not member.startswith("_"):
                assert (value.__doc__ or "").strip(), f"{name}.{member}"


def test_watch_has_the_signature_of_the_contract() -> None:
    """The names, order and defaults of watch()'s arguments."""
    signature = inspect.signature(gradwatch.watch)
    defaults = {
        "clip": None, "accumulate": 1, "on_nonfinite": "record", "statistics": ("norm",), "every": 1,
        "buffer_size": 1024, "scaler": None, "sinks": (), "run_dir": None, "exploding_norm": None, "skip_spikes": None, "max_consecutive_skips": 10,
        "curvature": None, "explain": False, "keep_batches": False,
    }  # fmt: skip
    positional = [
        p.name for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD
    ]
    assert positional == ["model", "optimizer"]
    assert signature.parameters["optimizer"].default is None
    by_name = {p.name: p.default for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY}
    assert by_name == defaults


def test_the_readme_example_of_watch_holds() -> None:
    """`watcher.last` of the x-example is the norm 7."""
    x = torch.tensor(2.0, requires_grad=True)
    with gradwatch.watch({"x": x}) as watcher:
        (x**2 + 3 * x + 1).backward()
    assert watcher.last.grad_norm == 7.0
