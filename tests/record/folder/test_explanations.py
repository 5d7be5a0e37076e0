"""The evidence of bad steps in the folder: explanations, micro-batches, and which of them count."""

import contextlib
import json
import pickle
import random
import re
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import gradwatch
from gradwatch.cli.main import main
from gradwatch.history import load
from gradwatch.record.folder import explanations, writer
from gradwatch.record.folder.explanations import ExplanationStore
from tests.support import zoo
from tests.support.explanations import call, explanation

from . import runs


def _named(path):
    return sorted(one.name for one in (path / "nonfinite").iterdir())


def _content(path, name="step-000120"):
    text = (path / "nonfinite" / name / "explanation.json").read_text()
    return json.loads(text, parse_constant=pytest.fail)


def _steps(path):
    return load(path).explanations()["step"].tolist()


def _batch(path, name="step-000120"):
    return torch.load(path / "nonfinite" / name / "batch.pt", weights_only=True)["calls"]


class TestExplanation:
    def test_comes_back_as_it_was(self, tmp_path):
        """All fields come back, and the NaN of a range; the file is strict JSON."""
        store = ExplanationStore(tmp_path)
        assert store.write(explanation()) == tmp_path / "nonfinite" / "step-000120"
        (read,) = store.read()
        assert repr(read) == repr(explanation())  # a NaN equals none, but is written alike
        assert _content(tmp_path)["inputs"][0]["low"] == "nan"

    @pytest.mark.parametrize(
        ("label", "name"),
        [
            ("Adam-1", "step-000120-Adam-1"),
            ("a/b\\c:d", "step-000120-a_b_c_d"),
            ("../..", "step-000120-.._.."),
            ("x" * 300, f"step-000120-{'x' * 64}"),
            ("优化", "step-000120-_"),
            ("", "step-000120"),
        ],
    )
    def test_where_there_are_several_optimizers_has_its_label(self, tmp_path, label, name):
        """The label is in the name, made safe for every file system, and whole in the file."""
        ExplanationStore(tmp_path).write(explanation(optimizer=label), labeled=True)
        assert _named(tmp_path) == [name]
        assert _content(tmp_path, name)["optimizer"] == label

    def test_several_of_a_step_are_all_kept(self, tmp_path):
        """A second explanation of a step does not overwrite the first."""
        store = ExplanationStore(tmp_path)
        for micro_batch in (1, 2, 3):
            store.write(explanation(micro_batch=micro_batch))
        assert _named(tmp_path) == ["step-000120", "step-000120-2", "step-000120-3"]
        assert [one.micro_batch for one in store.read()] == [1, 2, 3]

    def test_of_another_rank_has_a_folder_of_its_own(self, tmp_path):
        """The other ranks write beside the first one's, and the reader knows whose is whose."""
        for rank in (0, 1, 12):
            ExplanationStore(tmp_path, rank).write(explanation())
        assert _named(tmp_path) == ["step-000120", "step-000120-rank-1", "step-000120-rank-12"]
        runs.write(tmp_path, runs.batch([119, 120, 121]))
        frame = load(tmp_path).explanations()
        assert sorted(frame["rank"]) == [1, 12]  # that of rank 0 came before its session began

    def test_counts_only_when_it_is_complete(self, tmp_path, monkeypatch):
        """Killed before the last file, it is not there; the next one is."""
        store = ExplanationStore(tmp_path)

        def killed(*_, **__):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(explanations, "write_whole", killed)
            with pytest.raises(KeyboardInterrupt):
                store.write(explanation())
        assert store.read() == []
        store.write(explanation(121))
        assert [one.step for one in store.read()] == [121]

    @pytest.mark.parametrize(
        "content",
        [
            "",
            "{",
            "[]",
            "null",
            "[" * 100_000,
            '{"step": 3}',
            '{"written": 5, "step": "three"}',
            '{"written": 5, "step": true}',
            '{"written": 5, "examples": 3}',
            '{"written": 5, "made_possible_by": [1]}',
            f'{{"written": 5, "step": {2**63}}}',
        ],
    )
    def test_that_is_damaged_is_left_out(self, tmp_path, content):
        """A file that is no explanation costs none of the others."""
        store = ExplanationStore(tmp_path)
        store.write(explanation())
        damaged = tmp_path / "nonfinite" / "step-000121"
        damaged.mkdir()
        (damaged / "explanation.json").write_text(content)
        (tmp_path / "nonfinite" / "a file").write_text("")
        assert [one.step for one in store.read()] == [120]

    def test_of_a_newer_version_is_read(self, tmp_path):
        """Fields that are not known are left out."""
        store = ExplanationStore(tmp_path)
        path = store.write(explanation()) / "explanation.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"mood": "bad"}))
        assert [one.step for one in store.read()] == [120]


class TestDisk:
    def test_that_fails_is_one_warning(self, tmp_path):
        """A folder that cannot be made costs the evidence, with one warning."""
        (tmp_path / "nonfinite").write_text("in the way")
        store = ExplanationStore(tmp_path)
        with pytest.warns(gradwatch.GradwatchWarning, match="cannot keep explanations") as told:
            written = [store.write(explanation()) for _ in range(2)]
        assert written == [None, None]
        assert len(told) == 1

    def test_that_fails_is_no_error_where_warnings_are(self, tmp_path):
        """A program that makes warnings errors trains on."""
        (tmp_path / "nonfinite").write_text("in the way")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert ExplanationStore(tmp_path).write(explanation()) is None

    def test_that_fails_leaves_training_alone(self, tmp_path):
        """The watcher has the explanation, and all steps are recorded."""
        (tmp_path / "nonfinite").write_text("in the way")
        with pytest.warns(gradwatch.GradwatchWarning, match="cannot keep explanations"):
            watcher = _train(tmp_path, explained=(2,))
        assert len(watcher.history) == 4
        assert watcher.history.explanations()["step"].tolist() == [2]
        assert len(load(tmp_path)) == 4

    def test_is_not_filled_by_a_run_that_is_bad_throughout(self, tmp_path, monkeypatch):
        """A process writes a limited number of explanations."""
        monkeypatch.setattr(explanations, "MOST_EXPLANATIONS", 3)
        store = ExplanationStore(tmp_path)
        for step in range(1, 9):
            store.write(explanation(step))
        assert [one.step for one in store.read()] == [1, 2, 3]


class TestBatch:
    def test_loads_without_pickle(self, tmp_path):
        """Tensors, numbers, strings, and structures of them come back; the rest is named."""
        batch = {"image": torch.arange(6.0).reshape(2, 3), "label": [torch.tensor([1, 2]), "a"]}
        settings = {"scale": 0.5, "count": np.int64(3), "flag": True, "none": None, "of": (1, 2)}
        given = call(batch, np.ones(3, np.float32), torch.float16, threading.Lock(), **settings)
        ExplanationStore(tmp_path).write(explanation(), [given])
        (kept,) = _batch(tmp_path)
        image, array, dtype, lock = kept["args"]
        assert torch.equal(image["image"], batch["image"])
        assert image["label"][0].tolist() == [1, 2]
        assert image["label"][1] == "a"
        assert torch.equal(array, torch.ones(3))
        assert dtype is torch.float16
        assert lock is None
        assert kept["kwargs"] == {**settings, "count": 3}
        told = _content(tmp_path)
        assert told["batch"] == "batch.pt"
        assert told["left_out"] == {"calls[0].args[3]": "_thread.lock"}

    def test_is_a_copy_of_what_was_there(self, tmp_path):
        """A view is kept without the storage around it, a tensor that comes twice is kept once."""
        large = torch.zeros(1_000_000)
        view = large[10:20]
        ExplanationStore(tmp_path).write(explanation(), [call(view, view, x=large[0])])
        (kept,) = _batch(tmp_path)
        assert kept["args"][0] is kept["args"][1]
        assert (tmp_path / "nonfinite" / "step-000120" / "batch.pt").stat().st_size < 100_000

    @pytest.mark.parametrize(
        "tensor",
        [
            torch.ones(2, dtype=torch.bfloat16),
            torch.ones(2, dtype=torch.complex64).conj(),
            torch.eye(3).to_sparse(),
            torch.ones(3, requires_grad=True),
            torch.nn.Parameter(torch.ones(3)),
            torch.full((2,), float("nan")),
            torch.empty(0, 3),
            torch.tensor(5),
        ],
        ids=str,
    )
    def test_has_tensors_of_any_kind(self, tmp_path, tensor):
        """Dtype, values, layout and whether a gradient is wanted come back."""
        ExplanationStore(tmp_path).write(explanation(), [call(tensor)])
        (kept,) = _batch(tmp_path)
        torch.testing.assert_close(
            kept["args"][0].detach(), tensor.detach(), rtol=0, atol=0, equal_nan=True
        )
        assert kept["args"][0].requires_grad == tensor.requires_grad

    def test_leaves_out_what_has_no_data(self, tmp_path):
        """A tensor of a class of its own or without data is named."""

        class Mine(torch.Tensor):
            pass

        given = call(torch.ones(2, device="meta"), torch.ones(2).as_subclass(Mine), {object(): 1})
        ExplanationStore(tmp_path).write(explanation(), [given])
        assert _batch(tmp_path)[0]["args"] == (None, None, {})
        meta, mine, key = _content(tmp_path)["left_out"].values()
        assert meta == "torch.Tensor"
        assert mine.endswith("Mine")
        assert key == "builtins.object"

    def test_draws_the_same_numbers_again(self, tmp_path):
        """The random states are those at the start of the forward."""
        given = call(torch.ones(1))
        drawn = torch.rand(3).tolist(), random.random(), np.random.random()
        ExplanationStore(tmp_path).write(explanation(), [given])
        (kept,) = _batch(tmp_path)
        states = kept["random"]
        torch.set_rng_state(states["torch"]["cpu"])
        random.setstate(states["python"])
        states["numpy"]["state"]["key"] = states["numpy"]["state"]["key"].numpy()
        np.random.set_state(states["numpy"])
        assert (torch.rand(3).tolist(), random.random(), np.random.random()) == drawn
        assert kept["grad"] is True
        assert kept["autocast"] == {}

    def test_has_the_autocast_of_the_forward(self, tmp_path):
        """Kind of device and dtype of autocast are there."""
        with torch.autocast("cpu", torch.bfloat16):
            given = call(torch.ones(1))
        ExplanationStore(tmp_path).write(explanation(), [given])
        assert _batch(tmp_path)[0]["autocast"] == {"cpu": torch.bfloat16}

    def test_that_is_too_large_is_not_kept(self, tmp_path):
        """Above the limit there is no file, and the explanation says so."""
        store = ExplanationStore(tmp_path, most_bytes=100_000)
        store.write(explanation(), [call(torch.ones(30_000))])
        store.write(explanation(121), [call(torch.ones(10_000))])
        assert "take more than 0.0953" in _content(tmp_path)["batch_note"]
        assert _content(tmp_path)["batch"] is None
        assert not (tmp_path / "nonfinite" / "step-000120" / "batch.pt").exists()
        assert torch.equal(_batch(tmp_path, "step-000121")[0]["args"][0], torch.ones(10_000))

    def test_limit_is_256_mib_and_counts_each_tensor_once(self, tmp_path):
        """The same tensor in several places takes its bytes once; nothing is copied before."""
        large = torch.ones(1).expand(2**26)  # 256 MiB, but only 4 bytes of memory
        store = ExplanationStore(tmp_path)
        store.write(explanation(), [call(large, torch.ones(1))])
        assert "256 MiB" in _content(tmp_path)["batch_note"]
        store.write(explanation(121), [call(*[torch.ones(2**20)] * 500)])
        assert _content(tmp_path, "step-000121")["batch_note"] == ""

    def test_there_are_eight_at_most(self, tmp_path):
        """The ninth explanation is kept without its batch, and says so; also in a later process."""
        for step in range(1, 11):
            ExplanationStore(tmp_path).write(explanation(step), [call(torch.ones(1))])
        files = sorted((tmp_path / "nonfinite").glob("*/batch.pt"))
        assert len(files) == 8
        assert "holds 8 batches" in _content(tmp_path, "step-000009")["batch_note"]

    def test_that_cannot_be_kept_costs_no_explanation(self, tmp_path):
        """An argument that holds itself is no batch that can be written."""
        endless = []
        endless.append(endless)
        store = ExplanationStore(tmp_path)
        store.write(explanation(), [call(endless)])
        assert [one.step for one in store.read()] == [120]
        assert "RecursionError" in _content(tmp_path)["batch_note"]

    def test_can_wait_and_is_what_it_was(self, tmp_path):
        """Nothing is made before begin(); what the training changes meanwhile changes no file."""
        x = torch.ones(3)
        store = ExplanationStore(tmp_path / "run", waits=True)
        assert store.write(explanation(1), [call(x)]) is None
        x.zero_()
        assert list(tmp_path.iterdir()) == []
        store.begin()
        store.write(explanation(2), [call(x)])
        first, second = (
            _batch(tmp_path / "run", f"step-00000{step}")[0]["args"][0] for step in (1, 2)
        )
        assert (first.sum(), second.sum()) == (3, 0)

    def test_those_that_wait_share_the_limits(self, tmp_path):
        """All of them are in memory: no more bytes than one may have, and eight."""
        store = ExplanationStore(tmp_path / "run", waits=True, most_bytes=150_000)
        for step in range(1, 4):
            store.write(explanation(step), [call(torch.ones(10_000))])
        store.begin()
        kept = [_content(tmp_path / "run", f"step-00000{step}")["batch"] for step in (1, 2, 3)]
        assert kept == ["batch.pt", "batch.pt", None]

    def test_a_claim_says_where(self, tmp_path):
        """The folder is made when there is something to write, and one that fails costs these."""
        store, claimed = ExplanationStore(tmp_path / "run", waits=True), []
        store.begin(lambda: claimed.append(1) or tmp_path / "other")
        assert claimed == []
        assert store.write(explanation(1)) == tmp_path / "other" / "nonfinite" / "step-000001"

        def fail():
            raise OSError("no disk")

        store = ExplanationStore(tmp_path / "run", waits=True)
        store.write(explanation(1))
        with pytest.warns(gradwatch.GradwatchWarning, match="no disk"):
            store.begin(fail)

    def test_is_not_there_unless_asked(self, tmp_path):
        """Without the forwards there is the explanation alone."""
        path = ExplanationStore(tmp_path).write(explanation())
        assert [one.name for one in path.iterdir()] == ["explanation.json"]
        assert _content(tmp_path)["batch_note"] == ""


def _train(path, *, explained=(), close=True):
    """Trains a small model; steps in `explained` have an explanation, as a replay would add it."""
    model = zoo.small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    watcher = gradwatch.watch(model, optimizer, run_dir=path)
    with watcher if close else contextlib.nullcontext(watcher.attach()):
        for step in range(1, 5):
            model(torch.ones(2, 4)).square().mean().backward()
            if step in explained:
                watcher._run.explain(explanation(step), [call(torch.ones(2, 4))])
            optimizer.step()
            optimizer.zero_grad()
    return watcher


class TestRun:
    def test_is_the_same_live_and_loaded(self, tmp_path):
        """The frame of the watcher is that of the folder."""
        watcher = _train(tmp_path, explained=(2, 3))
        live, loaded = (history.explanations() for history in (watcher.history, load(tmp_path)))
        assert live.to_dict("records") == loaded.to_dict("records")
        assert live.dtypes.tolist() == loaded.dtypes.tolist()
        assert loaded["step"].tolist() == [2, 3]

    def test_can_be_read_at_once(self, tmp_path):
        """An explanation does not wait until its step is delivered."""
        watcher = _train(tmp_path, explained=(2,), close=False)
        assert [one.step for one in ExplanationStore(tmp_path).read()] == [2]
        watcher.close()

    def test_that_is_resumed_replaces_what_came_after(self, tmp_path):
        """Explanations from the first new step on are void at once, and then removed."""
        _train(tmp_path, explained=(2, 3, 4))
        runs.write(tmp_path, runs.batch([3, 4]))
        assert _steps(tmp_path) == [2]
        assert _named(tmp_path) == ["step-000002"]

    def test_rule_holds_before_the_files_are_removed(self, tmp_path, monkeypatch):
        """Killed between its first part and the cutting, a resumed process has resumed."""
        _train(tmp_path, explained=(2, 3, 4))
        monkeypatch.setattr(writer.Session, "tidy", lambda self, batch: None)
        runs.write(tmp_path, runs.batch([3, 4]))
        assert _named(tmp_path) == ["step-000002", "step-000003", "step-000004"]
        assert _steps(tmp_path) == [2]

    def test_that_is_resumed_gives_the_step_its_plain_name(self, tmp_path):
        """The new explanation of a step has the name, the void one is removed."""
        _train(tmp_path, explained=(3,))
        sink = writer.RunFolder(tmp_path)
        ExplanationStore(tmp_path).write(explanation(3, operation="sqrt"))
        assert _named(tmp_path) == ["step-000003", "step-000003-2"]
        sink.write(runs.batch([3, 4]))
        sink.close()
        assert _named(tmp_path) == ["step-000003"]
        assert load(tmp_path).explanations()["operation"].tolist() == ["sqrt"]

    def test_that_begins_again_moves_those_of_the_earlier_one(self, tmp_path):
        """They go to earlier-1; what the new run has explained before its first delivery stays."""
        _train(tmp_path, explained=(2, 3))
        with pytest.warns(gradwatch.GradwatchWarning, match="earlier run"):
            _train(tmp_path, explained=(3, 4))
        assert _named(tmp_path) == ["step-000003", "step-000004"]
        assert _steps(tmp_path) == [3, 4]
        assert _steps(tmp_path / "earlier-1") == [2, 3]

    def test_that_wrote_no_step_leaves_nothing_to_the_next(self, tmp_path):
        """Explanations of a process that was killed before its first delivery do not count later."""
        ExplanationStore(tmp_path).write(explanation(3))
        _train(tmp_path)
        assert _steps(tmp_path) == []

    def test_survives_a_copy(self, tmp_path):
        """A pickled watcher has its explanations."""
        copy = pickle.loads(pickle.dumps(_train(tmp_path, explained=(2,))))
        assert copy.history.explanations()["step"].tolist() == [2]
        history = pickle.loads(pickle.dumps(copy.history))
        assert history.explanations()["step"].tolist() == [2]

    def test_has_an_event_for_each(self, tmp_path):
        """The event says in one line what the explanation says."""
        events = _train(tmp_path, explained=(2,)).history.events()
        loaded = load(tmp_path).events()
        assert events.to_dict("records") == loaded.to_dict("records")
        (event,) = events.to_dict("records")
        assert event["kind"] == "explained"
        assert (event["step"], event["optimizer"], event["micro_batch"]) == (2, "SGD", 1)
        assert (event["module"], event["value"], event["rank"]) == ("encoder.norm", 2.0, 0)
        assert "model.py:42" in event["message"]
        assert event["message"].endswith("(return scores.log())")


class _Log(torch.nn.Module):
    def forward(self, x):
        return x.log()


class TestReplay:
    """What a real replay leaves in the folder."""

    @staticmethod
    def _train(path, zero_in, **options):
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Softmax(-1), _Log())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torch.manual_seed(0)
        with gradwatch.watch(model, optimizer, run_dir=path, **options):
            for step in range(1, 6):
                x = torch.randn(8, 4)
                if step == zero_in:
                    x[5] *= 1e4
                model(x).mean().backward()
                optimizer.step()
                optimizer.zero_grad()

    def test_names_the_line_and_keeps_the_batch(self, tmp_path):
        """The step that was skipped has its line, its example and its micro-batch."""
        self._train(tmp_path, 3, on_nonfinite="explain", keep_batches=True)
        (row,) = load(tmp_path).explanations().to_dict("records")
        assert (row["step"], row["module"], row["operation"]) == (3, "2", "log")
        assert row["file"] == __file__
        assert row["source"] == "return x.log()"
        assert row["examples"] == (5,)
        (x,) = _batch(tmp_path, "step-000003")[0]["args"]
        assert x[5].abs().max() > 1e3
        assert load(tmp_path).report().kinds[0] in ("nan", "inf")

    def test_of_several_optimizers_has_their_labels(self, tmp_path):
        """Two optimizers that step together have a folder each for the same bad step."""
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
        optimizers = {
            "first": torch.optim.SGD(model[0].parameters(), lr=0.1),
            "second": torch.optim.SGD(model[1].parameters(), lr=0.1),
        }
        with gradwatch.watch(model, optimizers, run_dir=tmp_path, on_nonfinite="explain"):
            for step in range(1, 4):
                x = torch.full((2, 4), float("nan") if step == 3 else 1.0)
                model(x).sum().backward()
                for optimizer in optimizers.values():
                    optimizer.step()
                    optimizer.zero_grad()
        assert _named(tmp_path) == ["step-000003-first", "step-000003-second"]
        assert load(tmp_path).explanations()["optimizer"].tolist() == ["first", "second"]

    def test_of_the_first_step_is_there_after_an_error(self, tmp_path, capsys):
        """With `raise` no step may ever be recorded; `gradwatch explain` has the line."""
        with pytest.raises(gradwatch.NonFiniteGradientError):
            self._train(tmp_path, 1, on_nonfinite="raise", explain=True)
        assert main(["explain", str(tmp_path)]) == 0
        assert "return x.log()" in capsys.readouterr().out


def test_the_frame_has_the_same_types_without_rows(tmp_path):
    """Columns and dtypes do not depend on what was explained."""
    empty = _train(tmp_path / "a").history.explanations()
    full = _train(tmp_path / "b", explained=(2,)).history.explanations()
    assert len(empty) == 0
    assert empty.dtypes.to_dict() == full.dtypes.to_dict()
    assert load(tmp_path / "a").explanations().dtypes.to_dict() == full.dtypes.to_dict()
    assert full["examples"].tolist() == [(3, 17)]
    assert full["module"].tolist() == ["encoder.norm"]


def test_the_page_shows_how_a_batch_is_run_again(tmp_path, monkeypatch):
    """The lines in docs/run-folder.md give the output that the training had."""
    page = Path(__file__).parents[3].joinpath("docs", "run-folder.md").read_text(encoding="utf-8")
    lines = re.search(r"```python\n(kept = .*?)```", page, re.DOTALL).group(1)
    monkeypatch.chdir(tmp_path)
    model, x = zoo.small(), torch.randn(2, 4)
    ExplanationStore("runs/a").write(explanation(120), [call(x)])
    names = {"torch": torch, "model": model}
    exec(lines, names)
    assert torch.equal(names["output"], model(x))
