"""GradientMonitorCallback: a training that is resumed goes on, also after it was killed."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("transformers", reason="NOT TESTED: the Trainer (transformers is missing)")

import torch

import gradwatch
from gradwatch_huggingface import GradientMonitorCallback
from tests.integrations.huggingface.trainer_runs import WARNINGS, rows_of, same_weights, trained
from tests.support import processes

pytestmark = [pytest.mark.filterwarnings(one) for one in WARNINGS]

SAVING = {"save_strategy": "steps", "save_steps": 4, "max_steps": 12, "max_grad_norm": 0.0}
SAVING |= {"gradient_accumulation_steps": 2, "lr_scheduler_type": "linear"}
COLUMNS = ["grad_norm", "grad_norm_clipped", "clip_threshold", "clip_coef", "noise_scale", "loss"]

KILLED = """
import os, signal, sys
from transformers import TrainerCallback
from gradwatch_huggingface import GradientMonitorCallback
from tests.integrations.huggingface.test_trainer_resume import SAVING
from tests.integrations.huggingface.trainer_runs import trained

class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 7:
            os.kill(os.getpid(), signal.SIGKILL)

monitor = GradientMonitorCallback(clip="auto", run_dir="kept")
trained("out", monitor, Kill(), **SAVING)
"""


def frame(monitor, first=1):
    """Returns the columns that a resumed run must have as well, from a step on."""
    return monitor.history.steps().loc[first:, COLUMNS]


@pytest.mark.filterwarnings("ignore:.*weights_only")
@pytest.mark.parametrize("restores", [False, True])
def test_a_resumed_training_goes_on(tmp_path, restores):
    """Step numbers, the clip policy, the noise scale and the rows are those of an unbroken run."""
    whole, first, second = (GradientMonitorCallback(clip="auto") for _ in range(3))
    unbroken = trained(tmp_path / "whole", whole, **SAVING)
    trained(tmp_path / "out", first, **SAVING)
    resumed = trained(
        tmp_path / "out",
        second,
        resume=str(tmp_path / "out" / "checkpoint-8"),
        restore_callback_states_from_checkpoint=restores,
        **SAVING,
    )

    assert same_weights(unbroken, resumed)
    assert frame(second).equals(frame(whole, 9))
    assert repr(second.noise_scale) == repr(whole.noise_scale)  # NaN is not NaN
    ours = [row["gradwatch/grad_norm"] for row in rows_of(resumed)]
    assert ours == whole.history.steps()["grad_norm"].tolist()


@pytest.mark.filterwarnings("ignore:.*weights_only")
def test_a_checkpoint_from_without_can_be_resumed_with(tmp_path):
    """Such a run begins at step 1, under the Trainer's global_step; and the other way round."""
    trained(tmp_path, **SAVING)
    monitor = GradientMonitorCallback()
    changes = {**SAVING, "max_steps": 14}
    trainer = trained(tmp_path, monitor, resume=True, **changes)
    assert monitor.history.steps().index.tolist() == [1, 2]
    assert [row["step"] for row in rows_of(trainer) if "gradwatch/grad_norm" in row] == [13, 14]

    plain = trained(tmp_path, resume=True, **{**SAVING, "max_steps": 16})
    assert plain.state.global_step == 16


def test_a_checkpoint_has_the_same_files_and_plain_json(tmp_path):
    """Our state is part of trainer_state.json, also of what save_state() writes after the end."""
    trained(tmp_path / "plain", **SAVING)
    trainer = trained(tmp_path / "ours", GradientMonitorCallback(clip="auto"), **SAVING)
    trainer.save_state()

    names = [
        sorted(path.name for path in (tmp_path / run / "checkpoint-12").iterdir())
        for run in ("plain", "ours")
    ]
    assert names[0] == names[1]
    for path in ("checkpoint-12/trainer_state.json", "trainer_state.json"):
        text = (tmp_path / "ours" / path).read_text(encoding="utf-8")
        state = json.loads(text)["stateful_callbacks"]["gradwatch"]
        assert json.loads(json.dumps(state)) == state


def test_a_policy_whose_state_is_no_json_costs_the_state_and_not_the_checkpoint(tmp_path):
    """A warning says so, once, and the checkpoints are written."""

    class Odd:
        norm_type = 2.0

        def decide(self, total_norm):
            return gradwatch.ClipDecision(torch.ones_like(total_norm), threshold=total_norm)

        def state_dict(self):
            return {"norm": torch.ones(1)}

        def load_state_dict(self, state):
            pass

    with pytest.warns(gradwatch.GradwatchWarning, match="saves no state") as told:
        trained(tmp_path, GradientMonitorCallback(clip=Odd()), **SAVING)

    assert len(told) == 1
    text = (tmp_path / "checkpoint-12" / "trainer_state.json").read_text(encoding="utf-8")
    assert "gradwatch" not in json.loads(text)["stateful_callbacks"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*weights_only")
def test_a_killed_training_goes_on_in_its_run_folder(tmp_path, monkeypatch):
    """After SIGKILL at step 7, a run that is resumed at step 4 has one record of each step."""
    pytest.importorskip("pyarrow", reason="NOT TESTED: run folders (pyarrow is missing)")
    monkeypatch.chdir(tmp_path)
    whole = GradientMonitorCallback(clip="auto")
    trained("whole", whole, **SAVING)
    environment = processes.environment(path=[processes.Path(__file__).parents[3]])
    done = processes.run(code=KILLED, cwd=tmp_path, env=environment)
    assert done.returncode == -9, done.stderr

    monitor = GradientMonitorCallback(clip="auto", run_dir="kept")
    trained("out", monitor, resume=True, **SAVING)

    kept = gradwatch.load(tmp_path / "kept").steps()
    assert kept.index.tolist() == list(range(1, 13))
    assert kept["grad_norm"].tolist() == whole.history.steps()["grad_norm"].tolist()
    assert frame(monitor).equals(frame(whole, 5))
