"""What watch_all() leaves on the disk: a folder for each model that has stepped, and no other."""

import gc
import json
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gradwatch
from gradwatch.process.watchers import ProcessWatch
from gradwatch.testing import CapturingSink
from tests.support.launch import on_ranks


@pytest.fixture(autouse=True)
def no_models_of_other_tests():
    """Has optimizers collected that are still in a cycle: they would be found."""
    gc.collect()


class Generator(nn.Linear):
    """A model."""


class Discriminator(nn.Linear):
    """Another model."""


class Unused(nn.Linear):
    """A model whose gradients are thrown away."""


def step(model, optimizer, x=None):
    """Take a step."""
    model(torch.ones(4, 3) if x is None else x).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()


def build(kind):
    """Build a model and its optimizer."""
    model = kind(3, 1)
    return model, torch.optim.SGD(model.parameters(), lr=0.01)


def names(folder):
    """Return what is in a folder."""
    return sorted(path.name for path in folder.iterdir())


def test_each_model_has_a_run_folder_in_the_order_of_first_steps(tmp_path):
    """load_all() has the numbers of the watchers."""
    with gradwatch.watch_all(run_dir=tmp_path / "a") as watching:
        generator, discriminator = build(Generator), build(Discriminator)
        assert not (tmp_path / "a").exists()
        for _ in range(3):
            step(*discriminator)
            step(*generator)
        step(*generator)
    found = gradwatch.load_all(tmp_path / "a")
    assert [one.label for one in watching.watchers] == list(found) == ["Discriminator", "Generator"]
    for watcher in watching.watchers:
        live, kept = watcher.history.steps(), found[watcher.label].steps()
        assert live["grad_norm"].tolist() == pytest.approx(kept["grad_norm"].tolist(), rel=1e-6)
    assert [len(one) for one in found.values()] == [3, 4]


@pytest.mark.filterwarnings("ignore")
def test_a_model_is_named_at_its_first_step(tmp_path):
    """One of the same class that never steps, such as a teacher, does not take the name from it."""
    lines, made = [], []
    options = {
        "run_dir": tmp_path / "a",
        "explain": True,
        "sinks": lambda label: made.append(label) or [CapturingSink()],
    }
    with ProcessWatch(options, say=lines.append) as watching:
        teacher, _optimizer = build(Generator)
        student, later = build(Generator), build(Generator)
        teacher(torch.full((4, 3), math.nan)).sum().backward()
        student[0](torch.ones(4, 3)).sum().backward()
        student[0].zero_grad()
        step(*later, torch.full((4, 3), math.inf))
        step(*student)
    assert [one.label for one in watching.watchers] == made == ["Generator", "Generator-1"]
    assert names(tmp_path / "a") == ["Generator", "Generator-1", "models.jsonl"]
    first, second = gradwatch.load_all(tmp_path / "a").values()
    assert (len(first.explanations()), len(second.explanations())) == (1, 0)
    shown = [line for line in lines if line.startswith("watching ")]
    assert [line.partition(" -> ")[2] for line in shown] == [
        str(tmp_path / "a" / label) for label in made
    ]


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_is_never_stepped_leaves_nothing(tmp_path):
    """No folder, no sink, no explanation of its NaN; the others are not concerned."""
    made = []
    options = {
        "run_dir": tmp_path / "a",
        "explain": True,
        "keep_batches": True,
        "sinks": lambda label: made.append(label) or [CapturingSink()],
    }
    with ProcessWatch(options, say=lambda line: None) as watching:
        unused, _optimizer = build(Unused)
        used = build(Generator)
        for _ in range(3):
            unused(torch.full((4, 3), math.nan)).sum().backward()
            unused.zero_grad()
            step(*used)
    assert [one.label for one in watching.watchers] == made == ["Generator"]
    assert names(tmp_path / "a") == ["Generator", "models.jsonl"]


@pytest.mark.filterwarnings("ignore:gradwatch")
def test_the_end_tells_of_no_model_that_never_stepped(tmp_path, caplog):
    """Its report would be nowhere."""
    with gradwatch.watch_all(run_dir=tmp_path):
        unused, _optimizer = build(Unused)
        used = build(Generator)
        for _ in range(30):
            unused(torch.ones(4, 3)).sum().backward()
            unused.zero_grad()
            step(*used, torch.full((4, 3), math.nan))
    assert f"gradwatch report {tmp_path / 'Generator'}" in caplog.text
    assert "Unused" not in caplog.text


@pytest.mark.filterwarnings("ignore")
def test_what_came_before_the_first_step_is_there_with_it(tmp_path):
    """Events and the explanation of a gradient that was thrown away, with its batch as it was."""
    sink, x = CapturingSink(), torch.full((4, 3), math.nan)
    options = {
        "run_dir": tmp_path / "a",
        "explain": True,
        "keep_batches": True,
        "sinks": lambda label: [sink],
    }
    with ProcessWatch(options, say=lambda line: None):
        model, optimizer = build(Generator)
        for _ in range(2):  # the forward of the first one nobody could know
            model(x).sum().backward()
            model.zero_grad()
        step(model, optimizer)
        x.zero_()
    history = gradwatch.load(tmp_path / "a")
    assert history.steps()["outcome"].tolist() == ["applied"]
    kinds = history.events()["kind"].tolist()
    assert {"nan", "explained"} <= set(kinds)
    assert [one.kind for one in sink.events] == kinds
    kept = sorted((tmp_path / "a" / "Generator" / "nonfinite").glob("*/batch.pt"))
    (given,) = torch.load(kept[-1], weights_only=True)["calls"][0]["args"]
    assert given.isnan().all()


def test_a_first_step_that_raises_is_kept(tmp_path):
    """The program ends with it; step and explanation are on disk."""
    options = {"run_dir": tmp_path / "a", "on_nonfinite": "raise", "explain": True}
    with ProcessWatch(options, say=lambda line: None) as watching:
        model, optimizer = build(Generator)
        with pytest.raises(gradwatch.NonFiniteGradientError):
            step(model, optimizer, torch.full((4, 3), math.nan))
    assert len(gradwatch.load(tmp_path / "a").explanations()) == 1
    assert watching.nothing_watched() == ""


def test_a_wrong_folder_is_refused_at_once(tmp_path):
    """Before anything is watched."""
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        gradwatch.watch_all(run_dir=tmp_path / "file" / "a")
    assert names(tmp_path) == ["file"]


def test_sinks_that_are_none_cost_only_themselves(tmp_path):
    """The warning says what was wrong with them; the run is recorded."""
    told = []
    options = {"run_dir": tmp_path / "a", "sinks": lambda label: CapturingSink()}
    with ProcessWatch(options, say=told.append):
        step(*build(Generator))
    assert any("a sequence of sinks" in line for line in told)
    assert len(gradwatch.load(tmp_path / "a")) == 1


def _on_each_rank(folder):
    """Train two models of which one is stepped; rank 1 makes a NaN in each, before the step."""
    told = []
    options = {"run_dir": folder, "explain": True}
    with ProcessWatch(options, say=told.append):
        models = [DistributedDataParallel(kind(3, 1)) for kind in (Generator, Unused)]
        optimizers = [torch.optim.SGD(one.parameters(), lr=0.01) for one in models]
        for number in range(4):
            bad = number in (1, 2) and dist.get_rank() == 1
            for model, optimizer in zip(models, optimizers, strict=True):
                x = torch.full((4, 3), math.nan if bad else 1.0)
                model(x).square().mean().backward()
                if number != 1 and isinstance(model.module, Generator):
                    optimizer.step()
                optimizer.zero_grad()
        dist.barrier()
    return told


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory):
    """Return the folder that two ranks have written."""
    folder = tmp_path_factory.mktemp("runs") / "a"
    on_ranks(_on_each_rank, 2, folder=str(folder))
    return folder


class TestRanks:
    def test_one_writes_and_no_rank_shows_what_never_steps(self, of_ranks):
        """Neither tables nor notes nor explanations."""
        assert names(of_ranks) == ["Generator", "models.jsonl"]
        assert len((of_ranks / "models.jsonl").read_text().splitlines()) == 1

    def test_the_culprit_is_known(self, of_ranks):
        """From the notes of the other rank, also for what it threw away before the next step."""
        events = gradwatch.load(of_ranks).events()
        nan = events.loc[events["kind"] == "nan"]
        assert nan.loc[nan["step"] == 2, "rank"].tolist()[0] == 1

    def test_explanations_of_all_ranks_are_there(self, of_ranks):
        """That of the rank that made the NaN."""
        found = (of_ranks / "Generator" / "nonfinite").glob("*-rank-1*/explanation.json")
        assert all(json.loads(path.read_text())["rank"] == 1 for path in found)
        assert 1 in gradwatch.load(of_ranks).explanations()["rank"].tolist()
