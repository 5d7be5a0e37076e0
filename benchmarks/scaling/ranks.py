"""Measures the cost of watching by number of ranks: real processes with gloo, on one machine."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from benchmarks.overhead.counts import CountCalls
from benchmarks.overhead.timing import TIMERS, InterleavedTiming
from benchmarks.overhead.variants import EVERY_STEP_CLIPPED, MAX_NORMS, Variant, bare, watched
from benchmarks.overhead.workloads import Training
from benchmarks.spread import Spread, spread

# FSDP2 on a CPU needs torch 2.9.
KINDS = ("DDP", "FSDP2") if torch.__version__ >= "2.9" else ("DDP",)
LAYERS, WIDTH, ROWS = 30, 64, 16
LIMIT = MAX_NORMS[EVERY_STEP_CLIPPED]


@dataclass(frozen=True)
class Ranks:
    """The cost for one number of ranks, measured on rank 0.

    Attributes:
        kind: ``"DDP"`` or ``"FSDP2"``.
        ranks: Number of ranks.
        bare_s: Seconds of a bare step.
        added_s: Seconds that ``watch(clip=)`` adds to a step if every step is clipped.
        collectives: Number of collectives that it adds to a step.
        payload: Bytes that these collectives carry.
    """

    kind: str
    ranks: int
    bare_s: float
    added_s: Spread
    collectives: int
    payload: int


def run_ranks(kind: str, ranks: int, rounds: int) -> Ranks:
    """Trains one of the ``KINDS`` in several processes, and returns what rank 0 measured."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (kind, ranks, rounds, folder), nprocs=ranks)
        told = json.loads((Path(folder) / "told.json").read_text(encoding="utf-8"))
    return Ranks(**{**told, "added_s": Spread(**told["added_s"])})


def _rank(rank: int, kind: str, ranks: int, rounds: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    method = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=ranks)
    try:
        found = _measured(kind, ranks, rounds)
        if rank == 0:
            (Path(folder) / "told.json").write_text(json.dumps(asdict(found)), encoding="utf-8")
    finally:
        dist.destroy_process_group()


def _measured(kind: str, ranks: int, rounds: int) -> Ranks:
    model = _sharded() if kind == "FSDP2" else nn.parallel.DistributedDataParallel(_layers())
    x, y = torch.randn(2, ROWS, WIDTH)
    training = Training(model, lambda: F.mse_loss(model(x), y))
    variant = Variant("watch(clip=)", partial(watched, training, clip=LIMIT))
    timing = InterleavedTiming(bare(training), [variant], TIMERS["wall"], steps=5)
    timing.rehearse()
    measured = [timing.measure_round(4) for _ in range(rounds)]
    bare_s = spread([seconds for each in measured for seconds in each.bare]).middle
    added_s = spread([each.added[variant.key] for each in measured])
    own, more = _collectives(bare(training)), _collectives(variant)
    return Ranks(kind, ranks, bare_s, added_s, more[0] - own[0], more[1] - own[1])


def _layers() -> nn.Sequential:
    layers = [layer for _ in range(LAYERS) for layer in (nn.Linear(WIDTH, WIDTH), nn.Tanh())]
    return nn.Sequential(*layers)


def _sharded() -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = _layers()
    return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))


class _CountCollectives(CountCalls):
    """Counts collectives, and the bytes of their tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.payload = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if str(function).startswith("c10d."):
            tensors = [t for arg in args if isinstance(arg, list) for t in arg]
            self.payload += sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))
        return super().__torch_dispatch__(function, types, args, kwargs)


def _collectives(variant: Variant) -> tuple[int, int]:
    with variant.prepare() as loop:
        loop.step()
        with _CountCollectives() as counter:
            loop.step()
    number = sum(n for name, n in counter.calls.items() if name.startswith("c10d."))
    return number, counter.payload
