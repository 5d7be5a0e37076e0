"""A device that fails, and a process that ends in the middle."""

from __future__ import annotations

import tempfile
import warnings
from typing import Any

import torch
from torch import nn

import gradwatch
from gradwatch.testing import CapturingSink
from tests.gpu.place import Place, adamw
from tests.gpu.registry import Found, check, require
from tests.gpu.training import batch, loss_of, net

GOOD = 40  # steps before the device fails


@check(cuda=True, alone_s=60)
def device_side_assert(place: Place) -> Found:
    """After a device-side assert the finished steps are delivered, and the sinks closed."""
    sink = CapturingSink()
    rows = nn.Sequential(nn.Embedding(10, 64), nn.Flatten(), nn.Linear(64, 1)).to(place.device)
    optimizer, said = adamw(rows.parameters()), ""
    options: dict[str, Any] = {"sinks": [sink], "clip": 1.0}
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if _can_keep():
            options["run_dir"] = folder
        try:
            with gradwatch.watch(rows, optimizer, **options):
                for step in range(GOOD + 20):
                    row = 10**6 if step == GOOD else 3
                    x = torch.full((4, 1), row, device=place.device)
                    rows(x).square().mean().backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    if step == GOOD - 1:
                        torch.cuda.synchronize()  # the good steps are over before the bad one
        except Exception as error:
            said = str(error)
        kept = len(gradwatch.load(folder).steps()) if "run_dir" in options else GOOD
    texts = [str(one.message) for one in told]
    require("device-side assert" in said, f"raised: {said[:200]}")
    require(len(sink.steps) == kept == GOOD, f"{len(sink.steps)} in the sink, {kept} in the folder")
    require(sink.closed, "the sink was not closed")
    reports = [text for text in texts if "report" in text and "bug" in text]
    require(not reports, f"an error of the device is called a bug of gradwatch: {reports}")
    return {"steps": kept, "raised": said[:120], "said": texts}


def _can_keep() -> bool:
    """Returns whether run folders can be written here."""
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        return False
    return True


KEPT: list[Any] = []  # until the process ends


@check(alone_s=60, always_alone=True)
def end_of_the_process(place: Place) -> Found:
    """A process that ends with numbers on their way, and without close(), ends well."""
    model = net(place.device)
    optimizer = adamw(model.parameters())
    KEPT.append(gradwatch.watch(model, optimizer).attach())
    with place.late():
        for step in range(5):
            loss_of(model, batch(step, place.device)).backward()
            place.busy(50)
            optimizer.step()
            optimizer.zero_grad()
    return {}
