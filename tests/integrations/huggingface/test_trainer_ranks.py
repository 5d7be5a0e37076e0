"""GradientMonitorCallback on two processes: the numbers of each, the same weights, and a NaN on one."""

from __future__ import annotations

import json
import subprocess

import pytest

pytest.importorskip("transformers", reason="NOT TESTED: the Trainer (transformers is missing)")

from tests.support import processes

pytestmark = pytest.mark.slow

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
SCRIPT = """
import json, os, sys
import torch, torch.distributed as dist
from transformers import Trainer
from gradwatch_huggingface import GradientMonitorCallback
from tests.integrations.huggingface.trainer_runs import is_clean, rows_of, same_weights, trained


class Gathers(Trainer):
    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        self.accelerator.gather_for_metrics(loss.detach())  # as TRL does for its metrics
        if self.state.global_step == 3 and dist.get_rank() == 1 and BAD:
            loss = loss * torch.log(loss.detach() * 0)
        return loss


BAD = sys.argv[1] == "bad"
given = {"gradient_accumulation_steps": 2, "kind": Gathers}
given |= {"fsdp": True, "fsdp_config": {
    "fsdp_version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]
}} if sys.argv[1] == "fsdp2" else {}
monitor = GradientMonitorCallback(on_nonfinite="explain")
watched = trained("out", monitor, **given)
steps = monitor.history.steps()
names = monitor.history.parameters()["parameter"]
found = {
    "norms": steps["grad_norm"].tolist(),
    "logged": [row["gradwatch/grad_norm"] for row in rows_of(watched)],
    "theirs": [row["grad_norm"] for row in rows_of(watched)],
    "losses": steps["loss"].tolist(),
    "their_losses": [row["loss"] for row in rows_of(watched)],
    "micro_batches": steps["micro_batches"].tolist(),
    "outcomes": steps["outcome"].tolist(),
    "names": sorted(set(names)),
    "sources": [one.source for one in monitor.explanations],
    "clean": is_clean(watched),
}
if not BAD:
    found["same"] = same_weights(watched, trained("out", **given))
with open(f"rank{dist.get_rank()}.json", "w") as file:
    json.dump(found, file)
dist.destroy_process_group()
"""


def on_two(folder, kind):
    """Runs the script on two processes; returns what each has found."""
    script = folder / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    root = processes.Path(__file__).parents[3]
    environment = processes.environment(path=[root], ACCELERATE_USE_CPU="true")
    done = processes.run(
        *TORCHRUN, script, kind, cwd=folder, env=environment, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, done.stdout
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_have_the_numbers_of_the_trainer(tmp_path, kind):
    """Norms are the Trainer's on both, its loss is the mean over both, and weights are bit-identical."""
    ranks = on_two(tmp_path, kind)

    for one in ranks:
        assert one["norms"] == one["logged"] == one["theirs"]
        assert one["micro_batches"] == [2] * 6
        assert one["same"]
        assert one["clean"]
        assert "model.layers.0.self_attn.q_proj.weight" in one["names"]
        assert not any(name.startswith("module.") for name in one["names"])
    means = [sum(both) / 2 for both in zip(ranks[0]["losses"], ranks[1]["losses"], strict=True)]
    assert means == pytest.approx(ranks[0]["their_losses"], rel=1e-6)


def test_a_bad_batch_of_one_process_is_explained_there(tmp_path):
    """Its compute_loss() gathers; run again on one process it asks nobody, and names the line."""
    ranks = on_two(tmp_path, "bad")

    outcomes = ["applied"] * 3 + ["skipped_nonfinite"] + ["applied"] * 2
    assert all(one["outcomes"] == outcomes for one in ranks)
    assert ranks[1]["sources"] == ["loss = loss * torch.log(loss.detach() * 0)"]
    assert all(one["clean"] for one in ranks)
