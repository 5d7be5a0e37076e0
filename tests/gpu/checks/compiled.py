"""torch.compile: of the model, with CUDA graphs, and of the optimizer's step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import gradwatch
from tests.gpu.place import Place, adamw
from tests.gpu.registry import Found, check, require
from tests.gpu.training import Training, apart, batch, equal, loss_of, net, relative

STEPS = 10


@check(alone_s=150)
def compiled_model(place: Place) -> Found:
    """torch.compile of the model."""
    # Where there may be no compiler, what traces the model is checked, without generated code.
    return _checked(place, {} if place.cuda else {"backend": "aot_eager"})


@check(cuda=True, alone_s=150)
def compiled_with_graphs(place: Place) -> Found:
    """torch.compile(mode="reduce-overhead"): the gradients come out of CUDA graphs."""
    return _checked(place, {"mode": "reduce-overhead"})


@check(cuda=True, alone_s=150)
def compiled_optimizer(place: Place) -> Found:
    """torch.compile of the optimizer's step."""
    return _checked(place, None)


def _checked(place: Place, how: dict[str, Any] | None) -> Found:
    """Checks weights, norms and clip; ``how`` compiles the model, None the optimizer's step."""
    plain, _ = _run(place, how, None)
    again, _ = _run(place, how, None)
    with place.late():
        watched, watcher = _run(place, how, {})
        clipped, _ = _run(place, how, {"clip": 1e-2})
    repeats = equal(plain, again)
    # Tuning may choose other kernels in each run; then bits cannot be compared.
    near = equal(plain, watched) if repeats else apart(plain, watched) < 1e-3
    require(near, f"weights differ by {apart(plain, watched)}")
    norms = watcher.history.steps()["grad_norm"].tolist()
    error = relative(norms, Training({}, steps=STEPS).run("cpu").norms)
    require(error < 1e-2, f"norms {norms}")
    by_hand = Training(None, steps=STEPS, clip=1e-2).run(place.device).weights
    require(apart(by_hand, clipped) < 1e-3, f"clipped weights differ by {apart(by_hand, clipped)}")
    return {"an unwatched run repeats": repeats, "largest relative difference": error}


def _run(
    place: Place, how: dict[str, Any] | None, options: dict[str, Any] | None
) -> tuple[list[Tensor], Any]:
    torch._dynamo.reset()
    model = net(place.device)
    compiled = model if how is None else torch.compile(model, **how)
    optimizer = adamw(model.parameters())
    watcher: Any = None
    if options is not None:
        watcher = gradwatch.watch(compiled, optimizer, **options).attach()
    take = torch.compile(optimizer.step) if how is None else optimizer.step
    for step in range(STEPS):
        if how is not None and "mode" in how:
            torch.compiler.cudagraph_mark_step_begin()
        loss_of(compiled, batch(step, place.device)).backward()
        take()
        optimizer.zero_grad()
    if watcher is not None:
        watcher.close()
    return [p.detach().cpu() for p in model.parameters()], watcher
