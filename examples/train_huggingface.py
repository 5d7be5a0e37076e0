"""Trains a small GPT with the Trainer of Hugging Face Transformers, under gradwatch.

The text is on every machine that has Python: the source code of its standard library. The model is
made from a configuration, so nothing is downloaded. --poison-step N breaks one batch, to show how
gradwatch catches it, although the Trainer's own log hides the NaN of its loss.
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torch.utils.tensorboard import SummaryWriter
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback
from transformers.utils.logging import set_verbosity_error

import gradwatch
from _gpt import BATCH, CONTEXT, VOCABULARY, read_library
from _summary import print_summary
from gradwatch_huggingface import GradientMonitorCallback
from gradwatch_tensorboard import TensorBoardWriter


class Windows(Dataset[dict[str, Tensor]]):
    """Every stretch of a text that is as long as the model can read."""

    def __init__(self, text: Tensor) -> None:
        """Takes character codes ``[length]``."""
        self._text = text

    def __len__(self) -> int:
        return len(self._text) // CONTEXT

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        characters = self._text[index * CONTEXT : (index + 1) * CONTEXT]
        return {"input_ids": characters, "labels": characters.clone()}


class PoisonedTrainer(Trainer):
    """Has, in one step, a weight of zero in its loss, as a batch of nothing but padding has."""

    poison_step = 0

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Returns the loss of a batch."""
        loss = super().compute_loss(*args, **kwargs)
        if self.model.training and self.state.global_step + 1 == self.poison_step:
            weights = torch.zeros(BATCH)
            loss = (loss * weights).sum() / weights.sum()
        return loss


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps")
    parser.add_argument("--lr", type=float, default=3e-3, help="learning rate")
    parser.add_argument(
        "--accumulate", type=int, default=2, help="micro-batches of 16 texts in a step"
    )
    parser.add_argument(
        "--clip", type=float, default=1.0, help="largest total norm, by the Trainer; 0: no clip"
    )
    parser.add_argument(
        "--on-nonfinite",
        choices=("record", "skip", "explain", "raise"),
        default="explain",
        help="what to do with a step whose gradients hold a NaN",
    )
    parser.add_argument("--poison-step", type=int, default=0, help="break the loss of this step")
    parser.add_argument(
        "--logdir",
        type=Path,
        default=Path("runs/train_huggingface"),
        help="folder for TensorBoard",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and batches")
    return parser.parse_args()


def main() -> None:
    """Trains, and prints a summary."""
    args = parse_arguments()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    set_verbosity_error()
    set_seed(args.seed)
    training, held_out = read_library()
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=CONTEXT,
        n_embd=64,
        n_layer=2,
        n_head=4,
        bos_token_id=0,
        eos_token_id=0,
    )
    writer = SummaryWriter(args.logdir / time.strftime("%Y%m%d-%H%M%S"), max_queue=1000)
    monitor = GradientMonitorCallback(
        on_nonfinite=args.on_nonfinite,
        # The Trainer's rows have the scalars; this adds the Gradients tab, blocks and events.
        sinks=[TensorBoardWriter(writer, step_scalars=False, layout=False)],
    )
    trainer = PoisonedTrainer(
        GPT2LMHeadModel(config),
        TrainingArguments(
            output_dir=str(args.logdir),
            max_steps=args.steps,
            learning_rate=args.lr,
            per_device_train_batch_size=BATCH,
            gradient_accumulation_steps=args.accumulate,
            max_grad_norm=args.clip,
            logging_steps=10,
            logging_first_step=True,
            eval_strategy="steps",
            eval_steps=args.steps,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            seed=args.seed,
        ),
        train_dataset=Windows(training),
        eval_dataset=Windows(held_out[: 64 * CONTEXT]),
        # The one that closes the writer comes last.
        callbacks=[monitor, TensorBoardCallback(writer)],
    )
    trainer.poison_step = args.poison_step
    try:
        trainer.train()
    except gradwatch.NonFiniteGradientError as error:
        print(f"stopped: {error}")
    losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    if losses:
        print(f"held-out loss: {losses[-1]:.2f} nats per character")
    print_summary(monitor.watcher, args.logdir)


if __name__ == "__main__":
    main()
