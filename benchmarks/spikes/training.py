"""One run: a small language model, its clipping policy, and what corrupts its gradients."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import gradwatch

VOCABULARY = 128  # ASCII
CONTEXT = 32
BATCH = 16
EVERY = 5  # steps between two evaluations on the held-out text
GUESSING = math.log(VOCABULARY)  # the loss of guessing at random
EARLY = 10  # the step of the spike inside the warm-up
BURST = 20  # steps

Make = Callable[[], object]  # makes what watch(clip=) takes; new for each run: policies have state


@dataclass(frozen=True)
class Policy:
    """A clipping policy, as the arguments of ``watch``.

    Attributes:
        clip: Makes the argument ``clip``.
        skip_spikes: The argument ``skip_spikes``.
        watched: Whether the run uses gradwatch at all.
    """

    clip: Make
    skip_spikes: str | None = None
    watched: bool = True


PLAIN = "plain loop, clip_grad_norm_(1.0)"
AUTO = 'clip="auto"'
AUTO_SKIP = "auto + skip_spikes"
POLICIES = {
    "no clip": Policy(lambda: None),
    PLAIN: Policy(lambda: None, watched=False),
    "fixed 1.0": Policy(lambda: gradwatch.ClipByNorm(1.0)),
    "fixed 0.3 (tuned)": Policy(lambda: gradwatch.ClipByNorm(0.3)),
    "AutoClip p10, published": Policy(lambda: gradwatch.AutoClip(10, 1_000_000, 1, True)),
    "AutoClip p90": Policy(gradwatch.AutoClip),
    "ZClip, published": Policy(lambda: gradwatch.ZClip(update="clipped")),
    "ZClip, winsorized": Policy(gradwatch.ZClip),
    "AdaGC": Policy(gradwatch.AdaGC),
    "AGC": Policy(lambda: gradwatch.AdaptiveGradientClip(exclude=("head.*",))),
    AUTO: Policy(lambda: "auto"),
    AUTO_SKIP: Policy(lambda: "auto", skip_spikes="auto"),
}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=1.0, momentum=0.9),
    "Adam": lambda parameters: torch.optim.Adam(parameters, lr=1e-2),
}

CLEAN, LEFT_OUT = "clean", "left out"
SPIKES = {
    "burst": f"{BURST} steps with noise of 30 times the usual norm added to the gradient",
    "early": f"the same once, 100 times the usual norm, in step {EARLY}",
    "mislabelled": "5 batches with random labels and 30 times the loss",
    "NaN": "one batch with a NaN for a loss",
    "rise": "3 times the loss from the middle on (SGD: a third of the rate)",
}
RESCALED = {"loss x 100": 100.0, "loss x 1e-6": 1e-6}  # and the rate divided by it


@dataclass(frozen=True)
class Task:
    """One run: its policy, scenario, optimizer, seed and number of steps."""

    policy: str
    scenario: str
    optimizer: str
    seed: int
    steps: int

    @property
    def middle(self) -> int:
        """The last step before the spikes."""
        return self.steps // (2 * EVERY) * EVERY

    @property
    def spiked(self) -> range:
        """The steps with a spike; for a rise, all steps after it."""
        first = self.middle + 1
        lengths = {"burst": BURST, "mislabelled": 5, "rise": self.steps - self.middle}
        if self.scenario == "early":
            return range(EARLY, EARLY + 1)
        if self.scenario in ("NaN", LEFT_OUT):
            return range(self.middle + 5, self.middle + 6)
        return range(first, first + lengths.get(self.scenario, 0))


@dataclass
class Run:
    """The result of a run; ``norms``, ``clipped`` and ``applied`` have one entry per step.

    Attributes:
        norms: Norms before the clip.
        clipped: Whether a clip changed the gradients.
        applied: Whether the step was applied.
        curve: Step and held-out loss, every ``EVERY`` steps.
        final: Held-out loss after the last step, on more of the text.
        story: Why the run ended early, if it did.
    """

    norms: list[float] = field(default_factory=list)
    clipped: list[bool] = field(default_factory=list)
    applied: list[bool] = field(default_factory=list)
    curve: list[tuple[int, float]] = field(default_factory=list)
    final: float = math.nan
    story: str = ""

    @property
    def lost(self) -> bool:
        """Whether the model is worse than guessing at random."""
        return not self.final < GUESSING

    def acted(self) -> list[bool]:
        """Returns, for each step, whether it was clipped or skipped."""
        return [c or not a for c, a in zip(self.clipped, self.applied, strict=True)]


class CharLSTM(nn.Module):
    """Predicts each next character with an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.characters = nn.Embedding(VOCABULARY, 32)
        self.lstm = nn.LSTM(32, 96, batch_first=True)
        self.head = nn.Linear(96, VOCABULARY)

    def forward(self, characters: Tensor) -> Tensor:
        """Maps character codes ``[batch, time]`` to logits ``[batch, time, VOCABULARY]``."""
        logits: Tensor = self.head(self.lstm(self.characters(characters))[0])
        return logits


@cache
def read_library() -> tuple[Tensor, Tensor]:
    """Reads the modules of the standard library; every tenth is held out.

    Returns:
        Character codes to train on and to validate on, each int64 ``[length]``.
    """
    modules = sorted(Path(os.__file__).parent.glob("*.py"))
    parts = [[m for i, m in enumerate(modules) if bool(i % 10) is kept] for kept in (True, False)]
    texts = ["".join(m.read_text(encoding="utf-8", errors="replace") for m in p) for p in parts]
    train, held_out = (
        torch.frombuffer(bytearray(text.encode("ascii", "replace")), dtype=torch.uint8).long()
        for text in texts
    )
    return train, held_out


def draw(text: Tensor, pieces: int, generator: torch.Generator) -> Tensor:
    """Draws random pieces of a text, ``[pieces, CONTEXT + 1]``."""
    starts = torch.randint(len(text) - CONTEXT, (pieces, 1), generator=generator)
    return text[starts + torch.arange(CONTEXT + 1)]


def loss_on(model: nn.Module, pieces: Tensor) -> Tensor:
    """Returns the loss in nats per character, ``[]``."""
    loss: Tensor = F.cross_entropy(model(pieces[:, :-1]).flatten(0, 1), pieces[:, 1:].flatten())
    return loss


def corrupted_loss(task: Task, step: int, model: nn.Module, batch: Tensor, usual: float) -> Tensor:
    """Returns the loss of a batch, with what the scenario does to it at this step.

    Args:
        task: Says which scenario, and at which steps.
        step: Number of the step, from 1.
        model: Maps characters to logits.
        batch: Pieces of text, ``[pieces, CONTEXT + 1]``.
        usual: The usual norm of the gradients.

    Returns:
        The loss ``[]``. To add noise to the gradient, the sum of parameters times noise is added
        to the loss: the gradient of that sum is the noise.
    """
    scale = RESCALED.get(task.scenario, 1.0)
    if step not in task.spiked:
        return loss_on(model, batch) * scale
    chance = torch.Generator().manual_seed(1_000_003 * task.seed + step)
    if task.scenario in ("burst", "early"):
        parameters = list(model.parameters())
        noise = [torch.randn(p.shape, generator=chance) for p in parameters]
        total = torch.linalg.vector_norm(torch.stack([n.norm() for n in noise]))
        factor = usual * (30.0 if task.scenario == "burst" else 100.0) / total
        added = [(p * n).sum() for p, n in zip(parameters, noise, strict=True)]
        return loss_on(model, batch) + factor * torch.stack(added).sum()
    if task.scenario == "mislabelled":
        labels = torch.randint(VOCABULARY, batch[:, 1:].shape, generator=chance)
        return 30.0 * F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), labels.flatten())
    return loss_on(model, batch) * (math.nan if task.scenario == "NaN" else 3.0)


def rate_factor(task: Task, step: int) -> float:
    """Returns the factor of the learning rate at a step; it falls in the last fifth of the run."""
    factor = min(1.0, 5 * (task.steps - step + 1) / task.steps)
    if task.optimizer == "SGD" and task.scenario == "rise" and step in task.spiked:
        factor /= 3.0
    return factor / RESCALED.get(task.scenario, 1.0)


def train(task: Task) -> Run:
    """Trains once, as the task says."""
    torch.manual_seed(task.seed)
    policy, run, model = POLICIES[task.policy], Run(), CharLSTM()
    text, held_out = read_library()
    optimizer = OPTIMIZERS[task.optimizer](model.parameters())
    chance = torch.Generator().manual_seed(task.seed)
    looks = draw(held_out, 640, torch.Generator().manual_seed(0))  # the same for all
    full_rate = optimizer.param_groups[0]["lr"]
    with ExitStack() as stack:
        watcher = None
        if policy.watched:
            watcher = gradwatch.watch(
                model,
                optimizer,
                clip=policy.clip(),  # type: ignore[arg-type]
                on_nonfinite="skip",
                skip_spikes=policy.skip_spikes,
            )
            stack.enter_context(watcher)
        for step in range(1, task.steps + 1):
            batch = draw(text, BATCH, chance)
            if task.scenario == LEFT_OUT and step in task.spiked:
                continue
            optimizer.param_groups[0]["lr"] = full_rate * rate_factor(task, step)
            usual = statistics.median(run.norms[-20:]) if run.norms else 0.0
            corrupted_loss(task, step, model, batch, usual).backward()
            try:
                _step(run, model, optimizer, watcher)
            except gradwatch.NonFiniteGradientError as error:
                run.story = str(error)
                return run
            if step % EVERY == 0:
                run.curve.append((step, _look(model, looks[:64])))
    run.final = _look(model, looks)
    return run


def _step(
    run: Run,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    watcher: gradwatch.Watcher | None,
) -> None:
    if watcher is None:
        norm = float(nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        optimizer.step()
        clipped, applied = not norm <= 1.0, True
    else:
        optimizer.step()
        record = watcher.last
        if record is None:
            raise RuntimeError("gradwatch has no record of the step")
        norm, clipped = record.grad_norm, record.clipped
        applied = record.outcome == "applied"
    optimizer.zero_grad()
    run.norms.append(norm)
    run.clipped.append(bool(clipped) and applied)
    run.applied.append(applied)


@torch.no_grad()
def _look(model: nn.Module, pieces: Tensor) -> float:
    return float(loss_on(model, pieces))
