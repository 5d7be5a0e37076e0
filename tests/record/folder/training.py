"""A training that can be killed: saves checkpoints, resumes from them, and tells how far it is."""

import json
import os

import torch

import gradwatch
from gradwatch.record.folder.writer import RunFolder
from tests.support import zoo

FOREVER = 10**9
CHECKPOINT_EVERY = 90


def train(folder, steps):
    """Trains up to a step, from the checkpoint that is there.

    Args:
        folder: Gets `run/`, `checkpoint.json` and `progress`.
        steps: The last step.
    """
    torch.set_num_threads(1)
    model = zoo.small()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    watcher = gradwatch.watch(
        model,
        optimizer,
        clip=0.5,
        on_nonfinite="skip",
        statistics=("norm", "max"),
        every=5,
        sinks=[RunFolder(folder / "run")],
    )
    first = _resume(folder, model, optimizer, watcher)
    progress = os.open(folder / "progress", os.O_CREAT | os.O_WRONLY)
    with watcher:
        for step in range(first, steps + 1):
            generator = torch.Generator().manual_seed(step)
            loss = model(torch.randn(5, 4, generator=generator)).square().mean()
            (loss * float("nan") if step % 77 == 0 else loss).backward()
            optimizer.step()
            optimizer.zero_grad()
            os.pwrite(progress, f"{step:9d}".encode(), 0)
            if step % CHECKPOINT_EVERY == 0:
                watcher.flush()  # the folder is never behind the checkpoint
                _save(folder, step, model, optimizer, watcher)


def _resume(folder, model, optimizer, watcher):
    saved = folder / "checkpoint.json"
    if not saved.exists():
        torch.manual_seed(0)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
        return 1
    step = json.loads(saved.read_text(encoding="utf-8"))["step"]
    state = torch.load(folder / f"{step}.pt", weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    watcher.load_state_dict(state["watcher"])
    return step + 1


def _save(folder, step, model, optimizer, watcher):
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "watcher": watcher.state_dict(),
    }
    torch.save(state, folder / f"{step}.pt")
    temporary = folder / "checkpoint.tmp"
    temporary.write_text(json.dumps({"step": step}), encoding="utf-8")
    temporary.replace(folder / "checkpoint.json")
