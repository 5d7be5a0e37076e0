"""Measures the time that gradwatch adds to a training step, against that of clip_grad_norm_.

Every way to train gets its own copy of the model. They take turns of a few steps within one
process, so that whatever else the machine does meets all of them alike; what a way adds is the
median, over the turns, of its step time less that of the bare loop in the same turn.
"""

from __future__ import annotations

import argparse
import copy
import math
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter

import gradwatch
from gradwatch.record import hub
from gradwatch_tensorboard import TensorBoardWriter

TURN = 4  # steps of one way before the next has its turn
WARM_UP_TURNS = 3
LIMITS = {"nothing clipped": 1e6, "every step clipped": 1e-3}  # max_norm

BARE = ("bare loop", "")
WATCH = ("watch()", "")
CLIP = "clip_grad_norm_"
WATCH_CLIP = "watch(clip=)"
WATCH_CLIP_TENSORBOARD = "watch(clip=) + TensorBoard"
Key = tuple[str, str]  # what runs, and under which of LIMITS

LossOf = Callable[[nn.Module], Tensor]
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

    Else its work would fall into the turn of another way.
    """

    def __init__(self, writer: SummaryWriter) -> None:
        """Wraps a writer.

        Args:
            writer: What to write with; the benchmark closes it.
        """
        self.deliveries = 0
        self._writer = writer
        self._sink = TensorBoardWriter(writer)

    def write(self, batch: gradwatch.RecordBatch) -> None:
        """Writes, and waits until the file has it."""
        self._sink.write(batch)
        self._writer.flush()
        self.deliveries += 1

    def close(self) -> None:
        """Closes the sink."""
        self._sink.close()


@dataclass
class Lane:
    """One way to train, with its own copy of the model.

    Attributes:
        step: Takes one step.
        deliveries: Tells how often the sinks have been written to.
        turns: Seconds of the steps without a delivery, one list per turn.
        delivering: Seconds of the steps with one.
    """

    step: Callable[[], object]
    deliveries: Callable[[], int] = lambda: 0
    turns: list[list[float]] = field(default_factory=list)
    delivering: list[float] = field(default_factory=list)

    def take_turn(self, clock: Clock) -> None:
        """Takes a few steps and notes their times.

        Args:
            clock: What to time them with.
        """
        ordinary = []
        for _ in range(TURN):
            before = self.deliveries()
            start = clock()
            self.step()
            seconds = clock() - start
            (ordinary if self.deliveries() == before else self.delivering).append(seconds)
        self.turns.append(ordinary)

    def forget(self) -> None:
        """Drops the times so far."""
        self.turns.clear()
        self.delivering.clear()


class Lanes:
    """Builds the ways to train one workload; what they hold is released by the stack."""

    def __init__(self, workload: Workload, stack: ExitStack) -> None:
        """Builds the model that all of them copy.

        Args:
            workload: The workload.
            stack: Leaves what the lanes enter.
        """
        torch.manual_seed(0)
        self._model, self._loss_of = workload.build()
        self._stack = stack

    def build(self) -> dict[Key, Lane]:
        """Returns all lanes."""
        lanes = {BARE: self._lane(), WATCH: self._watched(None)}
        for regime, max_norm in LIMITS.items():
            lanes[CLIP, regime] = self._lane(max_norm)
            lanes[WATCH_CLIP, regime] = self._watched(max_norm)
            lanes[WATCH_CLIP_TENSORBOARD, regime] = self._watched(max_norm, self._tensorboard())
        return lanes

    def _lane(self, max_norm: float | None = None) -> Lane:
        model, optimizer = self._copy()

        def step() -> None:
            self._loss_of(model).backward()
            if max_norm is not None:
                nn.utils.clip_grad_norm_(model.parameters(), max_norm)
            optimizer.step()
            optimizer.zero_grad()

        return Lane(step)

    def _watched(self, max_norm: float | None, sink: DrainedTensorBoard | None = None) -> Lane:
        model, optimizer = self._copy()
        sinks = [] if sink is None else [sink]
        self._stack.enter_context(gradwatch.watch(model, optimizer, clip=max_norm, sinks=sinks))

        def step() -> None:
            self._loss_of(model).backward()
            optimizer.step()
            optimizer.zero_grad()

        return Lane(step) if sink is None else Lane(step, lambda: sink.deliveries)

    def _copy(self) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = copy.deepcopy(self._model)
        return model, torch.optim.AdamW(model.parameters(), lr=1e-6)

    def _tensorboard(self) -> DrainedTensorBoard:
        folder = self._stack.enter_context(tempfile.TemporaryDirectory())
        return DrainedTensorBoard(self._stack.enter_context(SummaryWriter(folder)))


def measure(lanes: Sequence[Lane], rounds: int, clock: Clock) -> None:
    """Lets all lanes take their turns.

    Args:
        lanes: Those to run.
        rounds: How many turns each has.
        clock: What to time the steps with.
    """
    for number in range(-WARM_UP_TURNS, rounds):
        if number == 0:
            for lane in lanes:
                lane.forget()
        for position in range(len(lanes)):
            # Nobody always follows the same neighbour's cold start.
            lanes[(position + number) % len(lanes)].take_turn(clock)


@dataclass(frozen=True)
class Added:
    """Seconds that a way adds to the bare step, with the half-width of a 95 % interval."""

    seconds: float
    error: float


def added_time(lane: Lane, bare: Lane) -> Added:
    """Compares a lane with the bare loop.

    Args:
        lane: A lane that was measured.
        bare: The bare loop, measured with it.

    Returns:
        The median difference over the turns, plus a delivery's share of one step.
    """
    differences = [
        statistics.median(mine) - statistics.median(theirs)
        for mine, theirs in zip(lane.turns, bare.turns, strict=True)
        if mine
    ]
    low, middle, high = statistics.quantiles(differences, n=4)
    error = 1.57 * (high - low) / math.sqrt(len(differences))
    return Added(middle + _delivery(lane) / hub.FLUSH_STEPS, error)


def _delivery(lane: Lane) -> float:
    """Returns the seconds that a delivery to the sinks adds to the step it falls into."""
    if not lane.delivering:
        return 0.0
    return statistics.median(lane.delivering) - typical_step(lane)


def typical_step(lane: Lane) -> float:
    """Returns the median seconds of a step, over the turns."""
    return statistics.median(statistics.median(turn) for turn in lane.turns if turn)


def report(workload: Workload, lanes: Mapping[Key, Lane]) -> None:
    """Prints the table of one workload.

    Args:
        workload: The workload.
        lanes: Its lanes, measured.
    """
    bare_s = typical_step(lanes[BARE])
    added = {key: added_time(lane, lanes[BARE]) for key, lane in lanes.items() if key != BARE}
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
    parser.add_argument("--rounds", type=int, default=64, help=f"turns of {TURN} steps per way")
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
    # The turns of the others stretch the time between two deliveries; steps are what counts here.
    hub.FLUSH_SECONDS = math.inf
    threads = f"{args.threads} thread" + "s" * (args.threads != 1)
    print(f"torch {torch.__version__}, {platform.machine()}, {threads}, {args.clock} time")
    for name in WORKLOADS if args.workload == "all" else [args.workload]:
        with ExitStack() as stack:
            lanes = Lanes(WORKLOADS[name], stack).build()
            measure(list(lanes.values()), args.rounds, CLOCKS[args.clock])
            report(WORKLOADS[name], lanes)


if __name__ == "__main__":
    main()
