"""Lightning: the callback waits for the device neither at a batch nor when it logs."""

from __future__ import annotations

import logging
import tempfile
import warnings
from typing import Any

import torch

from tests.gpu.place import Place
from tests.gpu.registry import Found, Skipped, check, require


@check(alone_s=90)
def lightning_waits(place: Place) -> Found:
    """GradientMonitor adds no wait to a batch, with logging switched off and at every batch."""
    try:
        import lightning.pytorch as pl  # noqa: F401
    except ImportError:
        raise Skipped("Lightning is not installed") from None
    found = {}
    # On a CPU Lightning's own reading of what is logged, from tensors of the host, counts as well.
    for log in (False,) if place.dry else (False, True):
        few, many = (
            _waits(place, batches, log) - _waits(place, batches, None) for batches in (10, 30)
        )
        require(many == few, f"log={log}: {few:g} waits in 10 batches, {many:g} in 30")
        found[f"log={log}"] = (many - few) / 20
    return found


def _waits(place: Place, batches: int, log: bool | None) -> float:
    """Returns how often a fit waits; ``log`` is the monitor's, and None fits without it."""
    import lightning.pytorch as pl
    from lightning.pytorch.demos.boring_classes import BoringModel
    from lightning.pytorch.loggers import CSVLogger

    from gradwatch_lightning import GradientMonitor

    class Busy(pl.Callback):
        """Keeps the device behind the host."""

        def on_train_batch_start(self, *_: Any) -> None:
            place.busy(3)

    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    callbacks: list[pl.Callback] = [Busy()]
    if log is not None:
        # On a CPU Lightning's own reading of what the bar shows counts as well.
        callbacks.append(GradientMonitor(log=log, prog_bar=not place.dry))
    with tempfile.TemporaryDirectory() as folder, place.late(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            max_steps=batches,
            callbacks=callbacks,
            logger=CSVLogger(folder),
            log_every_n_steps=1,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            **_where(place),
        )
        with place.counting() as count:
            trainer.fit(BoringModel())
    return count.waits


def _where(place: Place) -> dict[str, Any]:
    """Returns what tells a Trainer to train on the device."""
    if place.cuda or place.dry:
        return {"accelerator": "gpu" if place.cuda else "cpu", "devices": 1}
    from lightning.pytorch.accelerators import CPUAccelerator
    from lightning.pytorch.strategies import SingleDeviceStrategy

    class StandIn(CPUAccelerator):
        """Takes a device that Lightning does not know."""

        def setup_device(self, device: torch.device) -> None:
            pass

    return {"strategy": SingleDeviceStrategy(place.devices[0], accelerator=StandIn())}
