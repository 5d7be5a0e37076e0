"""Trains a convolutional network with Lightning, under gradwatch.

The images come with scikit-learn: 1,797 real handwritten digits of 8 by 8 pixels.
"""

from __future__ import annotations

import argparse
import logging
import warnings
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, random_split

from _summary import print_summary
from gradwatch_lightning import GradientMonitor

BATCH = 32


class DigitNet(LightningModule):
    """A small convolutional network that classifies digits."""

    def __init__(self, lr: float) -> None:
        """Builds the network."""
        super().__init__()
        self.lr = lr
        self.layers = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, 10),
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Returns the loss of a batch."""
        pictures, digits = batch
        loss = F.cross_entropy(self.layers(pictures), digits)
        self.log("loss/train", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Logs the share of digits that were classified correctly."""
        pictures, digits = batch
        right = self.layers(pictures).argmax(dim=1) == digits
        self.log("accuracy/validation", right.float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Returns SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def digit_loaders() -> tuple[DataLoader[tuple[Tensor, ...]], DataLoader[tuple[Tensor, ...]]]:
    """Loads the digits.

    Returns:
        Batches of images ``[batch, 1, 8, 8]`` from 0 to 1 and of digits ``[batch]``: four fifths
        to train on, one fifth to validate on.
    """
    data = load_digits()
    pictures = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    training, held_out = random_split(
        TensorDataset(pictures, torch.tensor(data.target)), [0.8, 0.2]
    )
    return DataLoader(training, BATCH, shuffle=True), DataLoader(held_out, BATCH)


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=8, help="passes over the images")
    parser.add_argument("--lr", type=float, default=0.1, help="learning rate")
    parser.add_argument("--clip", type=float, default=1.0, help="largest total norm; 0: no clip")
    parser.add_argument(
        "--on-nonfinite",
        choices=("record", "skip", "raise"),
        default="skip",
        help="what to do with a step whose gradients hold a NaN",
    )
    parser.add_argument(
        "--logdir", type=Path, default=Path("runs/train_lightning"), help="folder for TensorBoard"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and batches")
    return parser.parse_args()


def quiet_lightning() -> None:
    """Silences Lightning's remarks about this machine and this PyTorch; errors still show."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    # 1,797 small images in memory do not need a worker process.
    warnings.filterwarnings("ignore", ".*does not have many workers.*")
    warnings.filterwarnings("ignore", ".*LeafSpec.*is deprecated.*")


def main() -> None:
    """Trains, and prints a summary."""
    args = parse_arguments()
    quiet_lightning()
    seed_everything(args.seed, verbose=False)
    training, held_out = digit_loaders()
    monitor = GradientMonitor(clip=args.clip or None, on_nonfinite=args.on_nonfinite)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=args.epochs,
        callbacks=[monitor],
        logger=TensorBoardLogger(args.logdir.parent, name=args.logdir.name),
        log_every_n_steps=1,
        enable_model_summary=False,
    )
    trainer.fit(DigitNet(args.lr), training, held_out)
    print(f"held-out accuracy: {trainer.callback_metrics['accuracy/validation']:.1%}")
    print_summary(monitor.watcher, args.logdir)


if __name__ == "__main__":
    main()
