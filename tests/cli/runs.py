"""Runs as watch(run_dir=) leaves them, and some made up step by step."""

import numpy as np
import torch

import gradwatch
from gradwatch.record.folder.writer import RunFolder
from gradwatch.record.records import Event, Layout, RecordBatch, StepRecord
from tests.support import zoo

HOSTILE = ("\x1b[31mred", "[bold]x[/bold]", "two\nlines", "\u202egnp", "宽" * 20, '=cmd|x, "y"')


def train(path, steps=100, *, lr=0.05, clip=0.5, nan=None, names=None):
    """Trains a small model, or parameters of some names, and keeps the run."""
    model = zoo.small()
    if names:
        model = {name: torch.ones(2, 2).requires_grad_() for name in names}
    parameters = list(model.values() if names else model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=lr)
    with gradwatch.watch(model, optimizer, clip=clip, on_nonfinite="skip", run_dir=path):
        for step in range(1, steps + 1):
            x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
            loss = (
                sum(one.square().sum() for one in parameters) if names else model(x).square().mean()
            )
            (loss * float("nan") if step == nan else loss).backward()
            optimizer.step()
            optimizer.zero_grad()
    return path


def batch(steps, names=("a", "b"), *, events=(), optimizer="SGD", norm=1.0):
    """Some steps; the norm of a parameter is `norm` times its place, from 1."""
    records = [
        StepRecord(step, optimizer, grad_norm=norm, grad_norm_clipped=norm) for step in steps
    ]
    norms = np.tile(np.arange(1.0, len(names) + 1, dtype=np.float32) * norm, (len(records), 1))
    layout = Layout(tuple(names), ("",) * len(names), ((2,),) * len(names), ((),) * len(names))
    return RecordBatch(layout, records, norms, norms.copy(), events=tuple(events))


def nan_at(step, optimizer="SGD"):
    """An event."""
    return Event(step, 1, "nan", "a", "", 1.0, 0, f"NaN at {step}", 1, 0, optimizer)


def write(path, *batches, close=True):
    """Writes one session."""
    sink = RunFolder(path)
    for one in batches:
        sink.write(one)
    if close:
        sink.close()
    return sink
