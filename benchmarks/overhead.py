"""Measures the time that gradwatch adds to a training step, against that of clip_grad_norm_.

All ways to train take turns of a few steps on one model within one process, so that whatever else
the machine does meets all of them alike. What a way adds is the median, over the rounds, of its
step time less that of the bare loop in the same round.
"""

from __future__ import annotations

import argparse
import math
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter

import gradwatch
from gradwatch.record import hub
from gradwatch_tensorboard import TensorBoardWriter

TURN = 4  # timed steps of one way before the next has its turn
DELIVERIES = 4  # to TensorBoard, of hub.FLUSH_STEPS steps each
LIMITS = {"nothing clipped": 1e6, "every step clipped": 1e-3}  # max_norm

BARE = ("bare loop", "")
WATCH = ("watch()", "")
CLIP = "clip_grad_norm_"
WATCH_CLIP = "watch(clip=)"
WATCH_CLIP_TENSORBOARD = "watch(clip=) + TensorBoard"
Key = tuple[str, str]  # what runs, and under which of LIMITS

LossOf = Callable[[nn.Module], Tensor]
Step = Callable[[], None]
Way = Callable[[], AbstractContextManager[Step]]
Clock = Callable[[], float]  # seconds
CLOCKS: dict[str, Clock] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Workload:
    """A model to train and the numbers to reach on it.

    Attributes:
        title: What the table calls it.
        build: Makes the model and a function that takes its loss on a fixed batch.
        watch_target: Largest share of the bare step that ``watch()`` may add.
        targets: Largest ratio to what ``clip_grad_norm_`` adds.
    """

    title: str
    build: Callable[[], tuple[nn.Module, LossOf]]
    watch_target: float
    targets: Mapping[Key, float]


def build_gpt() -> tuple[nn.Module, LossOf]:
    """Makes a transformer of 10 million parameters and its loss on 2 x 48 tokens."""
    width, vocabulary, batch, length = 384, 128, 2, 48
    layer = nn.TransformerEncoderLayer(
        width, 6, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
    )
    model = nn.ModuleDict(
        {
            "embedding": nn.Embedding(vocabulary, width),
            "blocks": nn.TransformerEncoder(layer, 6, enable_nested_tensor=False),
            "head": nn.Linear(width, vocabulary),
        }
    )
    tokens = torch.randint(vocabulary, (batch, length + 1))
    mask = nn.Transformer.generate_square_subsequent_mask(length)

    def loss_of(gpt: nn.Module) -> Tensor:
        parts = dict(gpt.named_children())
        hidden = parts["blocks"](parts["embedding"](tokens[:, :-1]), mask=mask, is_causal=True)
        return F.cross_entropy(parts["head"](hidden).flatten(0, 1), tokens[:, 1:].flatten())

    return model, loss_of


def build_mlp() -> tuple[nn.Module, LossOf]:
    """Makes 150 narrow linear layers, 300 tensors, and their loss on 64 rows."""
    width, rows = 64, 64
    model = nn.ModuleList([nn.Linear(width, width) for _ in range(150)])
    inputs, targets = torch.randn(2, rows, width)

    def loss_of(layers: nn.Module) -> Tensor:
        x = inputs
        for layer in layers.children():
            # The sum keeps the gradient from vanishing over so many layers.
            x = x + torch.tanh(layer(x))
        return F.mse_loss(x, targets)

    return model, loss_of


def _targets(untouched: float, clipped: float, tensorboard: float) -> dict[Key, float]:
    return {
        (WATCH_CLIP, "nothing clipped"): untouched,
        (WATCH_CLIP, "every step clipped"): clipped,
        (WATCH_CLIP_TENSORBOARD, "nothing clipped"): tensorboard,
        (WATCH_CLIP_TENSORBOARD, "every step clipped"): tensorboard,
    }


WORKLOADS = {
    "gpt": Workload("GPT, 10 million parameters", build_gpt, 0.01, _targets(0.3, 0.6, 0.6)),
    "mlp": Workload("MLP, 300 tensors", build_mlp, 0.05, _targets(0.55, 0.6, 0.8)),
}


class DrainedTensorBoard:
    """A TensorBoardWriter whose background thread is waited for.

    Else its work would fall into the steps of another way.
    """

    def __init__(self, folder: str) -> None:
        """Opens the writer.

        Args:
            folder: Where to write.
        """
        self.deliveries = 0
        self._writer = SummaryWriter(folder)
        self._sink = TensorBoardWriter(self._writer)

    def write(self, batch: gradwatch.RecordBatch) -> None:
        """Writes, and waits until the file has it."""
        self._sink.write(batch)
        self._writer.flush()
        self.deliveries += 1

    def close(self) -> None:
        """Closes the file."""
        self._sink.close()
        self._writer.close()


class Training:
    """One model and its optimizer, which all ways train in turn.

    A copy for each would not do: where a copy lies in memory changes the time of its steps by as
    much as what is measured here.
    """

    def __init__(self, workload: Workload) -> None:
        """Builds the model.

        Args:
            workload: What to train.
        """
        torch.manual_seed(0)
        self.model, self._loss_of = workload.build()
        # Too little to get anywhere: the gradients of the last step are like those of the first.
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-7)

    def step(self) -> None:
        """Takes one step of the bare loop."""
        self._loss_of(self.model).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def clipped_step(self, max_norm: float) -> None:
        """Takes one step, clipped by PyTorch."""
        self._loss_of(self.model).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @contextmanager
    def bare(self) -> Iterator[Step]:
        """Lends the step of the bare loop."""
        yield self.step

    @contextmanager
    def clipped(self, max_norm: float) -> Iterator[Step]:
        """Lends the step that PyTorch clips."""
        yield partial(self.clipped_step, max_norm)

    @contextmanager
    def watched(
        self, max_norm: float | None = None, *, tensorboard: bool = False
    ) -> Iterator[Step]:
        """Lends the bare step while a watcher is attached."""
        with tempfile.TemporaryDirectory() as folder:
            sinks = [DrainedTensorBoard(folder)] if tensorboard else []
            with gradwatch.watch(self.model, self.optimizer, clip=max_norm, sinks=sinks):
                yield self.step

    def ways(self) -> dict[Key, Way]:
        """Returns all the ways that are compared."""
        ways: dict[Key, Way] = {BARE: self.bare, WATCH: self.watched}
        for regime, max_norm in LIMITS.items():
            ways[CLIP, regime] = partial(self.clipped, max_norm)
            ways[WATCH_CLIP, regime] = partial(self.watched, max_norm)
            ways[WATCH_CLIP_TENSORBOARD, regime] = partial(self.watched, max_norm, tensorboard=True)
        return ways


Times = list[list[float]]  # seconds of each step, one list per turn


def measure(ways: Mapping[Key, Way], rounds: int, clock: Clock) -> dict[Key, Times]:
    """Lets all ways take their turns.

    Args:
        ways: What to compare.
        rounds: How many turns each has.
        clock: What to time the steps with.

    Returns:
        The times of each way.
    """
    times: dict[Key, Times] = {key: [] for key in ways}
    order = list(ways)
    for _ in range(rounds):
        random.shuffle(order)  # nobody always follows the same neighbour
        for key in order:
            with ways[key]() as step:
                step()  # the first after a change pays for the change
                times[key].append([_timed(step, clock) for _ in range(TURN)])
    return times


def delivery_time(training: Training, clock: Clock) -> float:
    """Measures what a delivery of records to TensorBoard adds to the step it falls into.

    Args:
        training: What to train.
        clock: What to time the steps with.

    Returns:
        Seconds for a batch of ``hub.FLUSH_STEPS`` steps, the background thread's work included.
    """
    ordinary, delivering = [], []
    with tempfile.TemporaryDirectory() as folder:
        sink = DrainedTensorBoard(folder)
        with gradwatch.watch(training.model, training.optimizer, clip=1.0, sinks=[sink]):
            while sink.deliveries < DELIVERIES:
                before = sink.deliveries
                seconds = _timed(training.step, clock)
                (ordinary if sink.deliveries == before else delivering).append(seconds)
    # The first one opens the file and writes the layout, once in a run.
    return statistics.median(delivering[1:]) - statistics.median(ordinary)


def _timed(step: Step, clock: Clock) -> float:
    start = clock()
    step()
    return clock() - start


@dataclass(frozen=True)
class Added:
    """Seconds that a way adds to the bare step, with the half-width of a 95 % interval."""

    seconds: float
    error: float


def added_time(mine: Times, bare: Times) -> Added:
    """Compares a way with the bare loop.

    Args:
        mine: The times of the way.
        bare: Those of the bare loop in the same rounds.

    Returns:
        The median over the rounds of the difference between the median steps of a turn.
    """
    differences = [
        statistics.median(turn) - statistics.median(bare_turn)
        for turn, bare_turn in zip(mine, bare, strict=True)
    ]
    low, middle, high = statistics.quantiles(differences, n=4)
    return Added(middle, 1.57 * (high - low) / math.sqrt(len(differences)))


def report(workload: Workload, times: Mapping[Key, Times], delivery_s: float) -> None:
    """Prints the table of one workload.

    Args:
        workload: The workload.
        times: The times of all ways.
        delivery_s: Seconds of one delivery to TensorBoard.
    """
    bare_s = statistics.median(map(statistics.median, times[BARE]))
    added = {key: added_time(mine, times[BARE]) for key, mine in times.items()}
    for key in [key for key in added if key[0] == WATCH_CLIP_TENSORBOARD]:
        seconds = added[key].seconds + delivery_s / hub.FLUSH_STEPS
        added[key] = replace(added[key], seconds=seconds)
    print(f"\n{workload.title}: {bare_s * 1e3:.1f} ms for a bare step")
    print(f"  {'':27} {'added ms':>15} {'of the step':>12} {'ratio':>13}  target")
    share, error = added[WATCH].seconds / bare_s, added[WATCH].error / bare_s
    verdict = _verdict(share, error, workload.watch_target)
    print(f"{_row(WATCH[0], added[WATCH], bare_s)} {'':>13}  {workload.watch_target:.0%} {verdict}")
    for regime in LIMITS:
        print(f"  -- {regime}")
        base = added[CLIP, regime]
        print(_row(CLIP, base, bare_s))
        for name in (WATCH_CLIP, WATCH_CLIP_TENSORBOARD):
            mine, target = added[name, regime], workload.targets[name, regime]
            ratio, error = _ratio(mine, base)
            print(
                f"{_row(name, mine, bare_s)} {ratio:6.2f} ± {error:4.2f}  "
                f"{target:.2f} {_verdict(ratio, error, target)}"
            )


def _row(name: str, added: Added, bare_s: float) -> str:
    number = f"{added.seconds * 1e3:.3f} ± {added.error * 1e3:.3f}"
    return f"  {name:27} {number:>15} {added.seconds / bare_s:>12.1%}"


def _ratio(mine: Added, base: Added) -> tuple[float, float]:
    ratio = mine.seconds / base.seconds
    return ratio, math.hypot(mine.error, ratio * base.error) / abs(base.seconds)


def _verdict(value: float, error: float, target: float) -> str:
    if abs(value - target) < error:
        return "too noisy to tell"
    return "reached" if value <= target else "missed"


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--workload", choices=[*WORKLOADS, "all"], default="all")
    parser.add_argument(
        "--rounds", type=int, default=64, help=f"turns of {TURN} timed steps per way"
    )
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="threads of PyTorch"
    )
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu, with --threads 1, is steadier on a machine that is busy with other work",
    )
    return parser.parse_args()


def main() -> None:
    """Measures the workloads and prints a table for each."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    hub.FLUSH_SECONDS = math.inf  # a step on a slow machine still counts as one of 64
    random.seed(0)
    threads = f"{args.threads} thread" + "s" * (args.threads != 1)
    print(f"torch {torch.__version__}, {platform.machine()}, {threads}, {args.clock} time")
    for name in WORKLOADS if args.workload == "all" else [args.workload]:
        training = Training(WORKLOADS[name])
        clock = CLOCKS[args.clock]
        delivery_s = delivery_time(training, clock)
        report(WORKLOADS[name], measure(training.ways(), args.rounds, clock), delivery_s)


if __name__ == "__main__":
    main()
