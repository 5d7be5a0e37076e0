"""GradientMonitor: explains a bad step to the line in training_step, and the Trainer does not notice."""

from __future__ import annotations

import copy
import gc
import os
import warnings
import weakref

import pytest
import torch
import torch.distributed as dist
import torchmetrics
from lightning.pytorch import LightningModule, seed_everything
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.profilers import SimpleProfiler
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader, Dataset

from gradwatch_lightning import GradientMonitor
from tests.integrations.lightning.conftest import CapturingLogger, trainer
from tests.support.launch import on_ranks
from tests.support.state import differences, pieces, state_of

GONE = 2.0
LINE = "return -torch.log(chosen).mean()"
BATCHES = 6


class Classifier(LightningModule):
    """Logs, prints, counts and measures in its training_step, whose loss is a log of 0 at times."""

    def __init__(self, kind="loss", optimizer="Adam", gathers=False):
        super().__init__()
        self.kind, self.optimizer, self.gathers = kind, optimizer, gathers
        with torch.random.fork_rng():
            torch.manual_seed(2)
            self.body = nn.Sequential(
                nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3)
            )
        self.mean = torchmetrics.MeanMetric(nan_strategy="ignore")
        self.cat = torchmetrics.CatMetric(nan_strategy="ignore")
        self.automatic_optimization = kind != "manual"
        self.steps, self.printed = [], []

    def forward(self, x):
        return self.body(x)

    def loss(self, x, target):
        chosen = self(x).float().softmax(1)[:, 0] * (target != GONE)
        return -torch.log(chosen).mean()

    def training_step(self, batch, batch_idx):
        x, target = batch["x"], batch["target"]
        if self.gathers:
            self.all_gather(x.mean())
        with self.trainer.profiler.profile("the loss"):
            loss = self.loss(x + 0.01 * torch.rand_like(x), target)
        self.mean(x.mean())
        self.cat(x[:1, 0])
        self.steps.append((batch_idx, self.global_step))
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log("mean", self.mean, on_step=True, on_epoch=True)
        self.log_dict({"largest": x.max()}, on_epoch=True, reduce_fx="max")
        self.logger.log_metrics({"direct": float(batch_idx)})
        self.print("a step")
        if self.kind == "manual":
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            return None
        return {"loss": loss, "more": 1} if self.kind == "dict" else loss

    def configure_optimizers(self):
        options = {"max_iter": 3} if self.optimizer == "LBFGS" else {}
        return getattr(torch.optim, self.optimizer)(self.parameters(), lr=0.02, **options)


class Data(Dataset):
    """Rows of four numbers; of the batch with number ``bad`` row 2 has the class that is gone."""

    def __init__(self, bad):
        generator = torch.Generator().manual_seed(4)
        self.x = torch.randn(BATCHES * 4, 4, generator=generator)
        self.target = torch.zeros(BATCHES * 4)
        if bad is not None:
            self.target[bad * 4 + 2] = GONE

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return {"x": self.x[index], "target": self.target[index]}


def fit(mode, module=None, bad=3, monitor=None, **options):
    """Trains two epochs; returns the module, the monitor, and what is to be the same each time."""
    seed_everything(5, verbose=False)
    module = module or Classifier()
    monitor = monitor or GradientMonitor(on_nonfinite=mode)
    logger = CapturingLogger()
    profiler = SimpleProfiler()
    one = trainer(monitor, logger=logger, profiler=profiler, max_epochs=2, **options)
    one.fit(module, DataLoader(Data(bad), batch_size=4))
    assert "training_step" not in vars(one.strategy)
    own = {"log", "log_dict", "print"}
    assert own.isdisjoint(vars(module))
    rows = [(step, {k: v for k, v in row.items() if k[:4] != "grad"}) for step, row in logger.rows]
    same = {
        "state": state_of(module, *one.optimizers),
        "rows": rows,
        "metrics": dict(one.callback_metrics),
        "progress": one.progress_bar_metrics,
        "fit": one.fit_loop.state_dict(),
        "steps": module.steps,
        "cat": module.cat.compute(),
        "numbers": (one.global_step, one.current_epoch),
        "profiled": len(profiler.recorded_durations["the loss"]),
    }
    return module, monitor, pieces(same)


CASES = {
    "loss": ({}, {}),
    "dict": ({"kind": "dict"}, {}),
    "lbfgs": ({"optimizer": "LBFGS"}, {}),
    "accumulates": ({}, {"accumulate_grad_batches": 2}),
    "clips": ({}, {"gradient_clip_val": 0.5}),
    "bf16-mixed": ({}, {"precision": "bf16-mixed"}),
    "bf16-true": ({}, {"precision": "bf16-true"}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_line_in_training_step_is_found(case, capsys):
    """The cause is named to its line, and the fit is that which skips: state, logs and metrics."""
    of_module, of_trainer = CASES[case]
    _, monitor, same = fit("explain", Classifier(**of_module), **of_trainer)
    printed = capsys.readouterr().out
    _, _, skipped = fit("skip", Classifier(**of_module), **of_trainer)

    accumulated = of_trainer.get("accumulate_grad_batches", 1)
    for epoch, found in enumerate(monitor.explanations):
        steps = BATCHES // accumulated
        assert found.step == epoch * steps + 3 // accumulated + 1
        assert found.micro_batch == 3 % accumulated + 1
        assert (found.origin, found.phase, found.operation) == ("operation", "forward", "log")
        assert (found.source, found.module, found.examples) == (LINE, "", (2,))
        assert found.notes == ()
    assert len(monitor.explanations) == 2
    assert list(differences(skipped, same)) == []
    assert printed == capsys.readouterr().out
    assert printed.count("a step") == len(same["steps"])


def test_manual_optimization_is_explained_up_to_the_model():
    """There training_step steps the optimizer itself: the model is run again, not the step."""
    _, monitor, same = fit("explain", Classifier("manual"), bad=0)
    _, _, skipped = fit("skip", Classifier("manual"), bad=0)

    assert [found.step for found in monitor.explanations] == [1, 7]
    for found in monitor.explanations:
        assert (found.origin, found.examples) == ("output_gradient", (2,))
    assert list(differences(skipped, same)) == []


def test_manual_optimization_finds_a_cause_in_the_model(kit):
    """A NaN in the data of a GAN is found in the forward of its networks, from the first batch on."""
    monitor = GradientMonitor(on_nonfinite="explain")
    kit.trainer(monitor).fit(kit.Gan(), kit.loader(3, poison=0))

    assert {found.optimizer for found in monitor.explanations} == {"Adam", "Adam-1"}
    for found in monitor.explanations:
        assert (found.step, found.origin, found.kind) == (1, "input", "nan")


def test_an_input_is_named_by_its_place_in_the_batch():
    """A NaN in the data is told by the name that training_step has for it."""

    class Poisoned(Data):
        def __getitem__(self, index):
            found = super().__getitem__(index)
            return {**found, "x": found["x"] * torch.nan} if index == 5 else found

    monitor = GradientMonitor(on_nonfinite="explain")
    seed_everything(5, verbose=False)
    trainer(monitor, logger=CapturingLogger()).fit(
        Classifier(), DataLoader(Poisoned(None), batch_size=4)
    )
    (found,) = monitor.explanations
    assert (found.step, found.origin, found.argument) == (2, "input", "batch['x']")
    assert found.examples == (1,)


def test_raise_carries_the_explanation():
    """explain=True beside "raise": the error has it, and the Trainer's hooks are gone."""
    monitor = GradientMonitor(on_nonfinite="raise", explain=True)
    with pytest.raises(Exception, match="NaN") as caught:
        fit("raise", monitor=monitor)
    assert caught.value.explanation.source == LINE
    assert monitor.explanations[-1].source == LINE


def test_batches_are_free_after_their_step():
    """The batch of a step is not held beyond it."""
    held = []

    class Holding(Classifier):
        def training_step(self, batch, batch_idx):
            gc.collect()
            assert sum(one() is not None for one in held) <= 1  # held by the loop of Lightning
            held.append(weakref.ref(batch["x"]))
            return super().training_step(batch, batch_idx)

    _, monitor, _ = fit("explain", Holding())
    assert len(monitor.explanations) == 2
    gc.collect()
    assert sum(one() is not None for one in held) <= 1  # Lightning itself holds the last one


def test_a_monitor_that_has_explained_can_be_copied():
    """The copy holds neither the Trainer nor what stands before its training_step."""
    _, monitor, _ = fit("explain")
    assert copy.deepcopy(monitor).watcher is None


# -- several ranks ---------------------------------------------------------------------------------


def fit_rank(mode, kind="loss", gathers=False):
    """Trains under DDP; the batch of rank 1 alone is bad."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "1", "LOCAL_WORLD_SIZE": str(ranks)}
    warnings.simplefilter("ignore")
    seed_everything(1, verbose=False)
    monitor = GradientMonitor(on_nonfinite=mode)
    strategy = DDPStrategy(cluster_environment=TorchElasticEnvironment())
    options = {"devices": ranks, "use_distributed_sampler": False}
    one = trainer(monitor, strategy=strategy, logger=CapturingLogger(), **options)
    data = Data(3 if rank == 1 else None)
    module = Classifier(kind, gathers=gathers)
    one.fit(module, DataLoader(data, batch_size=4))
    return {
        "explanations": monitor.explanations,
        "state": pieces(state_of(module, *one.optimizers)),
        "steps": module.steps,
    }


def fits():
    """What one rank does."""
    return {
        "explain": fit_rank("explain"),
        "skip": fit_rank("skip"),
        "gathers": fit_rank("explain", gathers=True),
        "manual": fit_rank("explain", kind="manual"),
    }


@pytest.fixture(scope="module")
def ranks():
    """What each of two ranks has seen; they take seconds to import Lightning."""
    return on_ranks(fits, 2)


def test_the_rank_that_is_bad_runs_its_batch_again_alone(ranks):
    """Its line is found without a collective, and all ranks train as those that skip."""
    good, bad = (rank["explain"] for rank in ranks)

    (found,) = bad["explanations"]
    assert (found.rank, found.source, found.examples) == (1, LINE, (2,))
    assert all(one.origin == "not_found" for one in good["explanations"])
    for rank in ranks:
        assert list(differences(rank["skip"]["state"], rank["explain"]["state"])) == []
        assert rank["skip"]["steps"] == rank["explain"]["steps"]


@pytest.mark.parametrize(("case", "told"), [("gathers", "communicate"), ("manual", "DDPStrategy")])
def test_what_cannot_be_run_again_alone_is_said(ranks, case, told):
    """A training_step that communicates, or steps by itself, is not run again on one rank."""
    (found,) = ranks[1][case]["explanations"]
    assert found.origin == "not_found"
    assert told in " ".join(found.notes)
