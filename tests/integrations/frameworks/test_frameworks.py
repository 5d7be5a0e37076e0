"""What `watch()` records in each framework: what the same training does without it, in float64."""

import functools
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from tests.integrations.frameworks import trainings
from tests.integrations.frameworks.reference import expect_as, recorded, same_bits, weights
from tests.integrations.frameworks.trainings import Watching

# What the frameworks themselves warn about. Everything else is an error.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{text}")
    for text in (
        "CUDA is not available or torch_xla is imported",  # ignite's autocast
        ".torch.jit.* is deprecated",  # what ignite imports of torch
    )
]

NOT_IN_CI = ("composer", "timm", "ultralytics", "mmengine")
SLOW = ("A2C", "TD3")


def case(name: str, training: str = "", divisor: int = 1, **settings: Any) -> Any:
    """Return one training of a framework, by the name of its package."""
    train = functools.partial(getattr(trainings, training or name), **settings)
    told = "-".join([training or name, *(f"{key}={value}" for key, value in settings.items())])
    missing = importlib.util.find_spec(name) is None
    marks = [pytest.mark.skipif(missing, reason=f"NOT TESTED: {name} is not installed")]
    marks += [pytest.mark.slow] * (name in NOT_IN_CI or settings.get("algorithm") in SLOW)
    # What they and their packages warn about changes with their versions, which nothing pins.
    marks += [pytest.mark.filterwarnings("ignore")] * (name in NOT_IN_CI)
    return pytest.param(train, divisor, id=told, marks=marks)


CASES = [
    case("ignite"),
    case("ignite", divisor=4, accumulate=4),
    case("ignite", scaled=True),
    case("ignite", "ignite_engine"),
    case("ignite", "ignite_engine", notes=True),
    case("skorch"),
    case("skorch", clip=0.5),
    *(case("stable_baselines3", algorithm=one) for one in ("PPO", "A2C", "DQN", "TD3", "SAC")),
    case("composer"),
    case("composer", kind="norm", size=4, divisor=2),
    case("composer", kind="adaptive", size=3, divisor=3),
    case("composer", kind="value"),
    case("timm"),
    case("timm", accumulate=3, divisor=3),
    case("timm", mode="agc", clip=0.01),
    case("timm", mode="value", clip=0.01),
    case("timm", mode="agc", clip=0.01, scaled=True, accumulate=3, divisor=3),
    case("timm", optimizer="adamw", scaled=True),
    case("ultralytics"),
    case("ultralytics", nominal=8),
    case("mmengine"),
    case("mmengine", clip_grad={"max_norm": 0.5}),
    case("mmengine", clip_grad={"type": "value", "clip_value": 0.05}),
    case("mmengine", clip_grad={"max_norm": 0.5}, accumulative_counts=4, divisor=4),
]
ONE_EACH = [one for one in CASES if "=" not in str(one.id) or "PPO" in str(one.id)]
BAD = {"timm": (4, (2,)), "ultralytics": (5, (1,))}
"""Step and examples of the bad batch, where they are others than in most trainings."""
WITH_LOSS = ("skorch", "composer", "notes=True")


@pytest.mark.parametrize(("train", "divisor"), CASES)
def test_numbers_are_those_of_the_training_by_itself(
    train: Any, divisor: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Norms, coefficients, micro-batches, losses; and the weights are the same, to the bit."""
    plain = Watching(False, tmp_path)
    with recorded(plain.scale_now) as reference:
        unwatched = weights(train(plain))
    watching = Watching(True, tmp_path)
    assert same_bits(weights(train(watching)), unwatched)
    assert watching.watcher is not None
    alone = [one for one in reference.stepped if len(one.gradients()) == 1]
    reference.stepped = [one for one in reference.stepped if one not in alone]  # SAC's coefficient
    expect_as(reference, watching.watcher, divisor)
    losses = watching.watcher.history.steps()["loss"]
    assert losses.notna().all() == any(name in request.node.name for name in WITH_LOSS)


@pytest.mark.parametrize(("train", "divisor"), ONE_EACH)
def test_a_nan_is_explained(train: Any, divisor: int, tmp_path: Path) -> None:
    """The step of a bad batch is left out, and what was bad first is named, with its line."""
    watching = Watching(True, tmp_path, {"on_nonfinite": "explain"})
    model = train(watching, bad=True)
    assert watching.watcher is not None
    told = watching.watcher.explanations[0]
    outcomes = watching.watcher.history.steps()["outcome"]
    assert outcomes.loc[told.step] == "skipped_nonfinite"
    assert told.line
    if train.func is trainings.stable_baselines3:
        # Rewards lie in NumPy arrays, and the advantages are made of them there.
        assert told.origin == "input", str(told)
        assert "advantages" in told.source
    else:
        assert told.origin == "input", str(told)
        assert (told.step, told.examples) == BAD.get(train.func.__name__, (4, (6,)))
    assert all(bool(value.isfinite().all()) for value in weights(model).values())


@pytest.mark.parametrize(("train", "divisor"), ONE_EACH)
def test_tensorboard_gets_each_step(train: Any, divisor: int, tmp_path: Path) -> None:
    """A writer among the sinks has the norms of all steps."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from gradwatch_tensorboard import TensorBoardWriter

    writer = TensorBoardWriter(str(tmp_path / "board"))
    watching = Watching(True, tmp_path, {"sinks": [writer]})
    train(watching)
    assert watching.watcher is not None
    read = EventAccumulator(str(tmp_path / "board"))
    read.Reload()
    logged = [event.value for event in read.Scalars("gradwatch/grad_norm")]
    norms = watching.watcher.history.steps()["grad_norm"].tolist()
    assert logged == pytest.approx(norms, rel=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_composers_sam(tmp_path: Path) -> None:
    """It passes arguments to its closure, and evaluates it twice: one step, the same weights."""
    pytest.importorskip("composer", reason="NOT TESTED: composer is not installed")
    sam = functools.partial(trainings.composer, kind="sam", size=4)
    watching = Watching(True, tmp_path)
    assert same_bits(weights(sam(watching)), weights(sam(Watching(False, tmp_path))))
    assert watching.watcher is not None
    assert watching.watcher.history.steps()["micro_batches"].tolist() == [2] * 22
    explaining = Watching(True, tmp_path, {"on_nonfinite": "explain"})
    sam(explaining, bad=True)
    assert explaining.watcher is not None
    assert [one.origin for one in explaining.watcher.explanations] == ["input"] * 2
