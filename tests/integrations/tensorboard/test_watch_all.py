"""The models of a program in TensorBoard: a run for each that has stepped."""

import gc

import pytest
import torch
from torch import nn

import gradwatch
from gradwatch_tensorboard import TensorBoardWriter
from tests.support.board import Board


@pytest.fixture(autouse=True)
def no_models_of_other_tests():
    """Has optimizers collected that are still in a cycle: they would be found."""
    gc.collect()


class Generator(nn.Linear):
    """A model."""


class Discriminator(nn.Linear):
    """Another model."""


class Unused(nn.Linear):
    """A model that is never stepped."""


@pytest.mark.filterwarnings("ignore:gradwatch")
def test_the_gradients_tab_lists_each_model(tmp_path):
    """By its name; a model that is never stepped has neither an event file nor a folder."""
    with gradwatch.watch_all(sinks=lambda name: [TensorBoardWriter(tmp_path / name)]):
        models = [kind(3, 1) for kind in (Generator, Discriminator, Unused)]
        optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in models]
        for _ in range(5):
            for model, optimizer in zip(models, optimizers, strict=True):
                model(torch.ones(4, 3)).square().mean().backward()
                if not isinstance(model, Unused):
                    optimizer.step()
                optimizer.zero_grad()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Discriminator", "Generator"]
    with Board(tmp_path) as board:
        shown = board.get_json("runs")["runs"]
    assert [one["run"] for one in shown] == ["Discriminator", "Generator"]
    assert [one["optimizers"][0]["last_step"] for one in shown] == [5, 5]
