"""Two processes of Accelerate: one writer, the numbers of float64, bit-identical weights."""

import json
import os

import pytest
import torch
import torch.distributed as dist

import gradwatch
from tests.support import float64, processes
from tests.support.launch import on_ranks

pytest.importorskip("accelerate", reason="NOT TESTED: accelerate is not installed")

from gradwatch_huggingface import AcceleratorSink
from tests.integrations.huggingface.accelerate_loops import (
    data,
    fresh,
    net,
    same,
    squared,
    train,
)

pytestmark = pytest.mark.slow

RANKS = 2


def _as_launched():
    """Tells Accelerate what torchrun does: it looks into the environment."""
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size, LOCAL_WORLD_SIZE=size)


def _poison(batch, inputs):
    if batch == 1 and dist.get_rank() == 1:
        inputs = inputs.clone()
        inputs[0, 0] = float("nan")
    return inputs


def _trained(watch, setting):
    from accelerate.tracking import GeneralTracker

    class Rows(GeneralTracker):
        name, requires_logging_directory, tracker = "rows", False, None

        def __init__(self):
            self.rows = []
            super().__init__()

        def log(self, values, step=None, **kwargs):
            self.rows.append((step, values))

    _as_launched()
    tracker = Rows()
    run = train(
        watch,
        sinks=lambda accelerator: [AcceleratorSink(accelerator)],
        log_with=tracker,
        after_step=lambda accelerator, step, loss: (
            accelerator.init_trackers("run") if step == 1 else None
        ),
        **setting,
    )
    steps = run.steps
    plain = train(None, **setting) if "clip" not in watch and "on_nonfinite" not in watch else run
    return {
        "norms": steps["grad_norm"].tolist(),
        "clipped": steps["grad_norm_clipped"].tolist(),
        "micro_batches": steps["micro_batches"].tolist(),
        "outcomes": steps["outcome"].tolist(),
        "losses": steps["loss"].tolist(),
        "expected": run.expected,
        "rows": [row for row in tracker.rows if "gradwatch/grad_norm" in row[1]],
        "same": same(run.weights, plain.weights),
        "weights": [w.tolist() for w in run.weights],
        "explained": [(e.step, e.micro_batch, e.rank, e.origin) for e in run.watcher.explanations],
        "wrapped": type(run.model).__name__,
    }


@pytest.mark.parametrize(
    "setting",
    [
        {"gradient_accumulation_steps": 3},
        {"gradient_accumulation_steps": 3, "before_prepare": True},
        {"mixed_precision": "bf16"},
    ],
    ids=["accumulated", "watched before prepare()", "bf16"],
)
def test_numbers_and_weights(setting):
    """Both ranks record the reduced norms, only the first one logs, and the weights are the same."""
    first, second = on_ranks(_trained, RANKS, watch={}, setting=setting)
    assert first["wrapped"] == "DistributedDataParallel"
    assert first["norms"] == second["norms"]
    assert first["norms"] == pytest.approx(first["expected"].seen, rel=1e-6)
    assert first["clipped"] == pytest.approx(first["expected"].after, rel=1e-6)
    assert first["micro_batches"] == first["expected"].micro_batches
    assert first["losses"] == pytest.approx(first["expected"].losses, rel=1e-6)
    assert [values["gradwatch/grad_norm"] for _, values in first["rows"]] == first["norms"]
    assert second["rows"] == []
    assert first["same"]
    assert second["same"]
    assert first["weights"] == second["weights"]


def _recomputed():
    """Trains, and computes each gradient again in float64, reduced over the ranks."""
    _as_launched()
    accelerator = fresh(gradient_accumulation_steps=3)
    model, window, expected = net(), [], []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, data())
    with gradwatch.watch(model, optimizer) as watcher:
        for inputs, targets in [*loader, *loader]:
            with accelerator.accumulate(model):
                window.append((inputs.double(), targets.double()))
                accelerator.backward(squared(model(inputs), targets))
                if accelerator.sync_gradients:
                    twin = float64.widen_module(net())
                    state = accelerator.unwrap_model(model).state_dict()
                    twin.load_state_dict({name: one.double() for name, one in state.items()})
                    for x, y in window:
                        (squared(twin(x), y) / 3).backward()
                    for p in twin.parameters():
                        dist.all_reduce(p.grad)
                        p.grad /= RANKS
                    expected.append(float64.gradient_norm(twin))
                    window = []
                optimizer.step()
                optimizer.zero_grad()
    return watcher.history.steps()["grad_norm"].tolist(), expected


def test_norms_are_those_of_float64_over_the_ranks():
    """Each step's gradient, computed again from the saved weights and all ranks' batches."""
    for norms, expected in on_ranks(_recomputed, RANKS):
        assert norms == pytest.approx(expected, rel=1e-5)
        assert len(norms) > 1


def test_a_nan_on_one_rank_is_explained():
    """Both ranks leave the same step out; the sick rank's micro-batch is named."""
    first, second = on_ranks(
        _trained_poisoned, RANKS, watch={"on_nonfinite": "explain"}, setting={}
    )
    assert first["outcomes"] == second["outcomes"]
    assert first["outcomes"].count("skipped_nonfinite") == 1
    assert second["explained"] == [(2, 1, 1, "input")]
    assert first["weights"] == second["weights"]


def _trained_poisoned(watch, setting):
    return _trained(watch, {**setting, "change": _poison})


SCRIPT = """
    import json, pathlib, sys
    import torch, gradwatch
    from accelerate import Accelerator
    from gradwatch_huggingface import AcceleratorSink

    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=sys.argv[1])
    accelerator.init_trackers("run")
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = torch.utils.data.DataLoader(torch.randn(80, 4), batch_size=4)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    watcher = gradwatch.watch(model, optimizer, sinks=[AcceleratorSink(accelerator)]).attach()
    for step, batch in enumerate(loader):
        loss = model(batch).square().mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        accelerator.log({"loss": loss.item()}, step=step)
    rank = accelerator.process_index
    accelerator.end_training()
    norms = watcher.history.steps()["grad_norm"].tolist()
    pathlib.Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(norms))
"""


@pytest.mark.parametrize(
    "launcher",
    [
        ("torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        (
            *("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
            *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
            *("--main_process_port", "0"),
        ),
    ],
    ids=["torchrun", "accelerate launch"],
)
def test_launched_and_ended_before_the_watcher_is_closed(launcher, tmp_path):
    """end_training() in front of the watcher's end loses no row, and hangs no rank."""
    from tensorboard.backend.event_processing import event_accumulator

    script = tmp_path / "train.py"
    script.write_text("\n".join(line.removeprefix("    ") for line in SCRIPT.splitlines()))
    result = processes.run("-m", *launcher, script, tmp_path)
    assert result.returncode == 0, result.stderr
    norms = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(RANKS)]
    assert norms[0] == norms[1]
    reader = event_accumulator.EventAccumulator(str(tmp_path / "run"))
    reader.Reload()
    for tag in ("loss", "gradwatch/grad_norm"):
        assert len(reader.Scalars(tag)) == 10
    logged = [one.value for one in reader.Scalars("gradwatch/grad_norm")]
    assert logged == pytest.approx(norms[0], rel=1e-6)
    assert len(list(tmp_path.rglob("events.out.tfevents.*"))) == 1
