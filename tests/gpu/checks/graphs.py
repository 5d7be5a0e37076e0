"""CUDA graphs: what is captured is left alone, and gradwatch says so once."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import gradwatch
from tests.gpu.place import Place, adamw
from tests.gpu.registry import Found, check, require
from tests.gpu.training import Training, apart, batch, equal, loss_of, net, relative

WARM_UP = 3  # steps before the capture


@contextmanager
def _said() -> Iterator[list[str]]:
    """Collects what gradwatch warns of and logs."""
    texts: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            texts.append(record.getMessage())

    listener = Listener(logging.WARNING)
    logger = logging.getLogger("gradwatch")
    logger.addHandler(listener)
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            yield texts
        ours = [one for one in told if issubclass(one.category, gradwatch.GradwatchWarning)]
        texts += [str(one.message) for one in ours]
    finally:
        logger.removeHandler(listener)


def _whole_step(place: Place, options: dict[str, Any] | None) -> tuple[list[Tensor], Any]:
    """Trains as torch's notes on graphs do: a warm-up in a side stream, then one graph."""
    model, x = net(place.device), batch(0, place.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, capturable=True)
    watcher: Any = None
    if options is not None:
        watcher = gradwatch.watch(model, optimizer, **options).attach()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            optimizer.zero_grad(set_to_none=True)
            loss_of(model, x).backward()
            optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        loss_of(model, x).backward()
        optimizer.step()
    for step in range(6):
        x.copy_(batch(step, place.device))
        graph.replay()
    torch.cuda.synchronize()
    if watcher is not None:
        watcher.close()
    return [p.detach().cpu() for p in model.parameters()], watcher


@check(cuda=True, alone_s=60)
def graph_of_the_step(place: Place) -> Found:
    """The whole step in a CUDA graph: capture, replay and weights are left alone, and it is said."""
    expected, _ = _whole_step(place, None)
    found = {}
    for name, options in {"watch": {}, "clip": {"clip": 1e9}}.items():
        with _said() as texts:
            got, watcher = _whole_step(place, options)
        require(equal(expected, got), f"{name}: weights differ by {apart(expected, got)}; {texts}")
        about = [text for text in texts if "captur" in text or "graph" in text]
        require(len(about) == 1, f"{name}: told {len(about)} times: {texts}")
        rows = len(watcher.history.steps())
        require(rows >= WARM_UP, f"{name}: {rows} steps, although {WARM_UP} were not captured")
        found[name] = {"steps": rows, "said": about[0]}
    return found


@check(cuda=True, alone_s=60)
def graph_beside(place: Place) -> Found:
    """Something else is captured while the numbers of a step are on their way."""

    def capture(watcher: Any, step: int) -> None:
        if step == 5:
            x = torch.ones(4, 4, device=place.device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = x * 2
            graph.replay()
            require(bool((y == 2).all()), "the result of the graph is wrong")

    expected = Training({}, steps=10).run("cpu").norms
    training = Training({}, steps=10, after=capture, before_step=lambda step: place.busy(5))
    with _said() as texts:
        norms = training.run(place.device).norms
    error = relative(norms, expected)
    require(error < 1e-3, f"norms {norms}, expected {expected}")
    require(not texts, f"nothing of ours was captured, but it is said: {texts}")
    return {"largest relative difference": error}


@check(cuda=True, alone_s=60)
def graphed_callables(place: Place) -> Found:
    """torch.cuda.make_graphed_callables: gradients in static buffers are measured."""

    def run(options: dict[str, Any] | None) -> tuple[list[Tensor], Any]:
        model = net(place.device)
        graphed = torch.cuda.make_graphed_callables(model, (batch(0, place.device),))
        optimizer = adamw(model.parameters())
        watcher: Any = None
        if options is not None:
            watcher = gradwatch.watch(model, optimizer, **options).attach()
        for step in range(8):
            loss_of(graphed, batch(step, place.device)).backward()
            optimizer.step()
            optimizer.zero_grad()
        if watcher is not None:
            watcher.close()
        return [p.detach().cpu() for p in model.parameters()], watcher

    plain, _ = run(None)
    watched, watcher = run({})
    require(equal(plain, watched), f"weights differ by {apart(plain, watched)}")
    norms = watcher.history.steps()["grad_norm"].tolist()
    error = relative(norms, Training({}, steps=8).run("cpu").norms)
    require(error < 1e-3, f"norms {norms}")
    return {"largest relative difference": error}
